"""What is trained on: answers that moved, contexts held out, flags that do not fit."""

import json
import logging
from unicodedata import normalize

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_examples

from qa.files import QAError
from qa.read_squad import EXAMPLE_FEATURES, read_squad_file
from qa.train_questions import align_answers, find_answer, hold_out, warn_of_flags, warn_of_misplaced_answers


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


# ---- Where a text stands ----


@pytest.mark.parametrize(
    ("context", "text", "start", "span"),
    [
        ("the king and the king", "king", 2**31 - 1, (17, 21)),
        ("the king", " \n", 3, None),
        ("\u00a0the\u2003king", "the king", 0, (1, 9)),
        ("😀 the king", "the king", 4, (2, 10)),  # UTF-16's place, one further
        ("a.b", "a.b", 0, (0, 3)),
        # At the start itself, in another case or form of Unicode, before all other places.
        ("Der Rat. Ein rat, der Rat", "rat", 4, (4, 7)),
        ("Die STRASSE, die Straße", "straße", 4, (4, 11)),
        ("Die Straße, die STRASSE", "STRASSE", 4, (4, 10)),
        ("à I\u0307zmir, İZMİR", "izmir", 10, (10, 15)),
        ("Ο ΑΛΈΞΑΝΔΡΟΣ ζει", "Αλέξανδρος", 2, (2, 12)),
        ("au cafe\u0301 noir", "Café", 3, (3, 8)),
        ("제주 한국".translate({0xD55C: "\u1112\u1161\u11ab"}), "한국", 3, (3, 7)),
        ("ß\tX  İ y x i\u0307 Y", "X İ Y", 2, (2, 8)),
        # Elsewhere on whole words: the nearest as it is written, then in another case.
        ("Rat rat Rate Verrat", "rat", 18, (4, 7)),
        ("Rat RAT Rate Verrat", "rat", 18, (4, 7)),
        ("мир Мирный. Кумир МИР", "Мир", 10, (18, 21)),
        ("कमल कमला", "कमल", 6, (0, 3)),
        ("كتاب والكتاب", "كتاب", 9, (0, 4)),
        ("한국은 한국", "한국", 1, (4, 6)),
        ("1890, 18, 90", "18", 1, (6, 8)),
        ("cafe\u0301 cafe", "cafe", 1, (6, 10)),
        # Within a word only in writing without spaces between words, or at the start itself.
        ("Verrat und Rates", "rat", 4, None),
        ("Das ß", "s", 2, (2, 3)),
        ("Ein ß", "s", 2, None),
        ("Die Donaudampfschifffahrt", "Dampfschiff", 9, (9, 20)),
        ("彼は東京都に住む", "東京", 5, (2, 4)),
        ("ฉันอยู่กรุงเทพมหานคร", "กรุงเทพ", 2, (7, 14)),
        ("か\u3099く かく", "か", 1, (4, 5)),
        # Without a start only where it stands once.
        ("the King", "king", 0, (4, 8)),
        ("the King and the KING", "king", 0, None),
        ("the King, the king, kingly", "king", 0, (14, 18)),
        ("the King", "king", -1, (4, 8)),
    ],
)
def test_find_answer(context, text, start, span):
    assert find_answer(context, text, start) == span


def every_place(context: str, text: str) -> list[tuple[int, int]]:
    """All spans that are the text but for case, form and white space, none cut off: a search that tries every span."""

    def plain(text):
        return " ".join(normalize("NFC", normalize("NFC", text).casefold()).split())

    ends = range(len(context) + 1)
    spans = [(begin, end) for begin in ends for end in ends if plain(context[begin:end]) == plain(text)]
    spans = [(begin, end) for begin, end in spans if context[begin:end] == context[begin:end].strip()]
    return [(begin, end) for begin, end in spans if context[end : end + 1] != "\u0301"]


LETTERS = "aAß éE\u0301か\n."


@given(
    st.text(alphabet=LETTERS, max_size=14).filter(lambda text: "\u0301" not in text.replace("E\u0301", "")),
    st.text(alphabet="aAsßéÉか ", max_size=4).filter(str.strip),
    st.integers(-2, 16),
)
def test_find_answer_finds_what_trying_every_span_finds(context, text, start):
    """Never within a word but at the start itself, and no further from it than a place that is as good."""

    def within_a_word(place):
        before, after = context[:place][-1:], context[place:][:1]
        return all(character.isalpha() and character != "か" or character == "\u0301" for character in (before, after))

    def as_written(span):
        return normalize("NFC", " ".join(context[slice(*span)].split())) == " ".join(text.split())

    spans = every_place(context, text)
    whole = [span for span in spans if not within_a_word(span[0]) and not within_a_word(span[1])]
    at_start = [span for span in spans if span[0] == start]
    best = [span for span in at_start if span in whole] or list(filter(as_written, whole)) or whole or at_start
    if start <= 0 and len(best) > 1:
        best = []
    assert find_answer(context, text, start) == min(best, key=lambda span: (abs(span[0] - start), span), default=None)


# ---- Repair, drop, refuse ----

CONTEXT = "The bridge of 1890 is made\r\nof steel. The other is of stone."
MOVED = [
    ("right", "?", CONTEXT, "bridge", 4),
    ("off by two", "?", CONTEXT, "1890", 16),
    ("zero", "?", CONTEXT, "stone", 0),
    ("white space", "?", CONTEXT, "made of steel", 20),
    ("no start", "?", CONTEXT, "other", -1),
    ("no start, three places", "?", CONTEXT, "of", -1),
    ("nowhere", "?", CONTEXT, "iron", 30),
    ("beyond the end", "?", CONTEXT, "iron", 2**31 - 1),
    ("no answer", "?", CONTEXT, "", 0),
]
REPAIRED = {"off by two": (14, 18), "zero": (54, 59), "white space": (22, 36), "no start": (42, 47)}


def test_repair(caplog):
    examples = make_examples(MOVED)
    with caplog.at_level(logging.WARNING, logger="qa"):
        aligned, changes = align_answers(examples, "train.json")
    expected = []
    for id_, question, context, text, start in [row for row in MOVED if row[0] in {"right", "no answer", *REPAIRED}]:
        begin, end = REPAIRED.get(id_, (start, start + len(text)))
        expected.append((id_, question, context, context[begin:end], begin))
    assert aligned.features == EXAMPLE_FEATURES and aligned.to_list() == make_examples(expected).to_list()
    assert changes == [
        {
            "id": id_,
            "text": text,
            "answer_start": start,
            "repaired_start": REPAIRED.get(id_, (None, None))[0],
            "repaired_end": REPAIRED.get(id_, (None, None))[1],
        }
        for id_, _, _, text, start in MOVED[1:8]
    ]
    repaired, left_out = caplog.messages
    assert "train.json: 4 of 9 questions have an answer that does not stand at its answer_start as written" in repaired
    how = "at most 2 characters away (the answer_start of 1 is 0); first ids: off by two, zero, white space, no start"
    assert repaired.endswith(f"trained on where it stands, {how}")
    assert "3 of 9 questions are left out of training" in left_out
    assert left_out.endswith("first ids: no start, three places, nowhere, beyond the end")


def test_empty_questions_are_left_out(caplog):
    empty = [("a", "", CONTEXT, "stone", 0), ("b", " \u3000", CONTEXT, "iron", 1)]
    aligned, changes = align_answers(make_examples([*empty, MOVED[0]]), "train.json", "refuse")
    assert aligned["id"][:] == ["right"] and changes == [] and caplog.messages == []  # the reader has said it
    with pytest.raises(QAError, match="train.json: each question is empty; nothing to train on"):
        align_answers(make_examples(empty), "train.json")


def test_changes_stand_in_the_order_of_the_questions():
    rows = [(str(i), "?", f"el río {i % 3}", "Río", 1) for i in range(9)]
    assert [change["id"] for change in align_answers(make_examples(rows), "f")[1]] == [row[0] for row in rows]


def test_further_answers_stay():
    rows = make_examples(MOVED[1:2]).to_list()
    rows[0]["answers"] = {"text": ["1890", "x"], "answer_start": [16, 3]}
    aligned, _ = align_answers(Dataset.from_list(rows, features=EXAMPLE_FEATURES), "train.json")
    assert aligned[0]["answers"] == {"text": ["1890", "x"], "answer_start": [14, 3]}


def test_drop(caplog):
    rows = make_examples(MOVED).to_list()
    rows[0]["answers"]["text"] = [""]
    with caplog.at_level(logging.WARNING, logger="qa"):
        kept, changes = align_answers(Dataset.from_list(rows, features=EXAMPLE_FEATURES), "train.json", "drop")
    assert kept.to_list() == rows[8:]
    assert [change["id"] for change in changes] == [row["id"] for row in rows[:8]]
    assert {change["repaired_start"] for change in changes} == {None}
    assert "train.json: 8 of 9 questions are left out" in caplog.text and "right, off by two, zero" in caplog.text


@pytest.mark.parametrize("misplaced", ["repair", "drop", "refuse"])
def test_good_answers_stay_and_none_left_is_an_error(misplaced, caplog):
    good = make_examples([MOVED[0], MOVED[8]])
    assert align_answers(good, "train.json", misplaced) == (good, []) and caplog.text == ""
    line = "nothing to train on" if misplaced != "refuse" else "train.json: 1 of 1 questions have .* first ids: nowhere"
    with pytest.raises(QAError, match=line):
        align_answers(make_examples(MOVED[6:7]), "train.json", misplaced)


def test_misplaced_answers_of_validation_questions_are_counted(caplog):
    with caplog.at_level(logging.WARNING, logger="qa"):
        warn_of_misplaced_answers("validation", make_examples([MOVED[0], MOVED[8]]), "dev.json")
        assert caplog.messages == []
        warn_of_misplaced_answers("validation", make_examples(MOVED), "dev.json")
    assert "dev.json: 7 of 9 validation questions have a first answer that does not stand" in caplog.text


def test_repaired_examples_keep_their_file(tmp_path):
    """Their features are then kept beside it, as those of other examples."""
    make_examples(MOVED).save_to_disk(tmp_path / "saved")
    aligned, _ = align_answers(Dataset.load_from_disk(tmp_path / "saved"), "train.json")
    assert aligned.cache_files[0]["filename"].startswith(str(tmp_path / "saved"))


def test_repairing_what_is_left_of_held_out_questions_keeps_each_context_once(tmp_path):
    common = {"question": "who?", "answers": ["king"]}
    rows = [{"id": f"{c}-{q}", "context": f"the king of town {c}", **common} for c in range(10) for q in range(20)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    before = hold_out({"train": read_squad_file(tmp_path / "train.json", tmp_path / "cache")}, 20, 42, "f")["train"]
    examples, changes = align_answers(before, "f")
    assert len(changes) == len(examples) == 160 and examples.features == before.features
    assert examples["context"][:] == before["context"][:] and examples["id"][:] == before["id"][:]
    assert examples["answers"][0] == {"text": ["king"], "answer_start": [4]}
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


# ---- Held out ----


def questions(contexts: int) -> Dataset:
    """Three a context, which do not stand together."""
    return make_examples([(f"{q}-{c}", f"{q}?", f"context {c}", "", 0) for q in range(3) for c in range(contexts)])


@pytest.mark.parametrize(
    ("contexts", "percentage", "held"), [(20, 10, 2), (7, 50, 4), (3, 1, 1), (2, 99, 1), (200, 5, 10)]
)
def test_hold_out(contexts, percentage, held, caplog):
    examples = questions(contexts)
    with caplog.at_level(logging.INFO, logger="qa"):
        splits = hold_out({"train": examples, "test": None}, percentage, 42, "train.json")
    train, validation = splits["train"], splits["validation"]
    assert "test" in splits
    assert not set(train["context"]) & set(validation["context"])
    assert len(set(validation["context"])) == held and len(validation) == 3 * held
    assert sorted([*train["id"], *validation["id"]]) == sorted(examples["id"])
    (line,) = caplog.messages
    assert f"train.json: {held} contexts with {3 * held} questions are held out" in line
    assert f"{contexts - held} with {len(train)} left to train on" in line


def test_the_seed_chooses_the_contexts_and_their_order_stays():
    def held(seed):
        return hold_out({"train": questions(50)}, 20, seed, "f")["validation"]["id"][:]

    first = held(1)
    assert first == held(1) != held(2)
    assert first == [id_ for id_ in questions(50)["id"] if id_ in first]


def test_one_context_cannot_be_held_out():
    with pytest.raises(QAError, match="train.json holds one context only"):
        hold_out({"train": questions(1)}, 50, 42, "train.json")


# ---- Flags ----


def test_flags_that_do_not_fit_the_questions(caplog):
    answered, both = make_examples(MOVED[:8]), make_examples(MOVED)
    with caplog.at_level(logging.WARNING, logger="qa"):
        assert warn_of_flags("train", answered, "f", False) is None
        assert warn_of_flags("train", both, "f", True) is None
        assert warn_of_flags("validation", answered, "f", True) is None
        assert caplog.messages == []
        line = warn_of_flags("validation", both, "f", False)
        assert "1 of 9 validation questions have no answer, but --version_2_with_negative is not given" in line
        line = warn_of_flags("train", answered, "f", True)
        assert "--version_2_with_negative is given, but each of 8 train questions has an answer" in line
    assert len(caplog.messages) == 2
