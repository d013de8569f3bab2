"""What is trained on: answers that moved, contexts held out, flags that do not fit."""

import json
import logging
import re

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_windows import golden_tokenizer
from tiny import make_examples

from qa.read_squad import EXAMPLE_FEATURES, read_squad_file
from qa.train_questions import hold_out, locate, place_answers, warn_of_flags
from qa.windows import WindowSettings, make_train_features


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


# ---- Where a text stands ----


@pytest.mark.parametrize(
    ("context", "text", "start", "span"),
    [
        ("the king and the king", "king", 4, (4, 8)),
        ("the king and the king", "king", 5, (4, 8)),  # off by one
        ("the king and the king", "king", 0, (4, 8)),
        ("the king and the king", "king", 11, (17, 21)),
        ("a b a", "a", 2, (0, 1)),  # as near: the earlier
        ("the king and the king", "king", 2**31 - 1, (17, 21)),
        ("the king and the king", "king", -1, None),  # no start, and two places
        ("the king and the queen", "king", -1, (4, 8)),
        ("the king\r\nof\tSpain", "king of  Spain", 3, (4, 18)),
        ("king  of; king of; king of", "king\nof", 8, (10, 17)),
        ("the king", " king ", 5, (4, 8)),
        ("the king", "queen", 4, None),
        ("the king", "", 4, None),
        ("the king", " \n", 3, None),
        ("", "king", 0, None),
        ("   ", "king of", 1, None),
        ("\u00a0the\u2003king", "the king", 0, (1, 9)),
        ("😀 the king", "the king", 4, (2, 10)),  # UTF-16's place, one further
        ("aaaa", "aa", 1, (1, 3)),  # occurrences may overlap
        ("the kingdom", "king", 0, (4, 8)),
    ],
)
def test_locate(context, text, start, span):
    assert locate(context, text, start) == span


def every_place(context: str, text: str) -> list[tuple[int, int]]:
    """All spans of the text, by a search that tries every place."""
    exact = [(i, i + len(text)) for i in range(len(context)) if context.startswith(text, i)]
    if exact:
        return exact
    pattern = re.compile(r"\s+".join(map(re.escape, text.split())))
    return [found.span() for i in range(len(context)) if (found := pattern.match(context, i))]


@given(
    st.text(alphabet="ab \n", max_size=14),
    st.text(alphabet="ab \n", max_size=4).filter(str.strip),
    st.integers(-2, 16),
)
def test_locate_finds_what_trying_every_place_finds(context, text, start):
    places = every_place(context, text)
    if start < 0:
        expected = places[0] if len(places) == 1 else None
    else:
        expected = min(places, key=lambda span: (abs(span[0] - start), span), default=None)
    assert locate(context, text, start) == expected


# ---- Repair, drop, refuse ----


def test_drop_misplaced_answers(caplog):
    context = "the king was born"
    good = [("g1", "who", context, "king", 4), ("g2", "who", context, "", 0), ("g3", "who", context, "born", 13)]
    bad = [
        ("b1", "who", context, "king", 5),
        ("b2", "who", context, "the", -17),
        ("b3", "who", context, "born", 2**31 - 1),
    ]
    examples = make_examples([good[0], bad[0], good[1], bad[1], bad[2], good[2]])
    empty = {
        "id": "b4",
        "title": "",
        "context": context,
        "question": "?",
        "answers": {"text": [""], "answer_start": [0]},
    }
    examples = Dataset.from_list([*examples.to_list(), empty], features=EXAMPLE_FEATURES)
    with caplog.at_level(logging.WARNING, logger="qa"):
        kept, changes = place_answers(examples, "train.json", "drop")
    assert kept["id"][:] == ["g1", "g2", "g3"]
    assert "train.json: 4 of 7 questions are left out" in caplog.text and "b1, b2, b3, b4" in caplog.text
    assert [change["id"] for change in changes] == ["b1", "b2", "b3", "b4"]
    caplog.clear()
    assert place_answers(make_examples(good), "train.json", "drop")[0]["id"][:] == ["g1", "g2", "g3"]
    assert caplog.text == ""
    with pytest.raises(ValueError, match="train.json: no question's answer stands at its answer_start"):
        place_answers(make_examples(bad), "train.json", "drop")
    with pytest.raises(ValueError, match='train.json: missing key "answers"'):
        place_answers(make_examples(good).remove_columns("answers"), "train.json", "drop")


CONTEXT = "The bridge of 1890 is made\r\nof steel. The other is of stone."
MOVED = [
    ("right", "?", CONTEXT, "bridge", 4),
    ("off by two", "?", CONTEXT, "1890", 16),
    ("zero", "?", CONTEXT, "stone", 0),
    ("white space", "?", CONTEXT, "made of steel", 20),
    ("no start", "?", CONTEXT, "other", -1),
    ("no start, three places", "?", CONTEXT, "of", -1),
    ("nowhere", "?", CONTEXT, "iron", 30),
    ("no answer", "?", CONTEXT, "", 0),
]


def test_repair(caplog):
    examples = make_examples(MOVED)
    with caplog.at_level(logging.WARNING, logger="qa"):
        placed, changes = place_answers(examples, "train.json")
    assert placed.features == EXAMPLE_FEATURES
    assert placed["id"][:] == ["right", "off by two", "zero", "white space", "no start", "no answer"]
    for row, before in zip(placed, [examples[i] for i in (0, 1, 2, 3, 4, 7)], strict=True):
        assert row["context"] == before["context"] and row["question"] == before["question"]
        for text, start, given_text in zip(*row["answers"].values(), before["answers"]["text"], strict=True):
            assert row["context"][start : start + len(text)] == text
            assert text.split() == given_text.split()
    assert placed[3]["answers"] == {"text": ["made\r\nof steel"], "answer_start": [22]}
    assert changes == [
        {"id": "off by two", "text": "1890", "answer_start": 16, "repaired_start": 14, "repaired_end": 18},
        {"id": "zero", "text": "stone", "answer_start": 0, "repaired_start": 54, "repaired_end": 59},
        {"id": "white space", "text": "made of steel", "answer_start": 20, "repaired_start": 22, "repaired_end": 36},
        {"id": "no start", "text": "other", "answer_start": -1, "repaired_start": 42, "repaired_end": 47},
        {
            "id": "no start, three places",
            "text": "of",
            "answer_start": -1,
            "repaired_start": None,
            "repaired_end": None,
        },
        {"id": "nowhere", "text": "iron", "answer_start": 30, "repaired_start": None, "repaired_end": None},
    ]
    repaired, left_out = caplog.messages
    assert "train.json: 4 of 8 questions have an answer that does not stand at its answer_start" in repaired
    assert repaired.endswith("first ids: off by two, zero, white space, no start")
    assert "2 of 8 questions are left out of training" in left_out
    assert left_out.endswith("first ids: no start, three places, nowhere")


def test_the_labels_are_those_of_the_place_found():
    """The windows of a repaired answer equal those of the same answer where it stands."""
    right = [(id_, q, c, {"made of steel": "made\r\nof steel"}.get(a, a), 0) for id_, q, c, a, _ in MOVED[:5]]
    right = [(id_, q, c, a, c.index(a)) for id_, q, c, a, _ in right]
    settings = WindowSettings(24, 8, 8)
    expected = make_train_features(make_examples(right), golden_tokenizer(), settings)
    repaired = make_train_features(place_answers(make_examples(MOVED[:5]), "f")[0], golden_tokenizer(), settings)
    assert repaired[:] == expected[:] and any(expected["start_positions"])
    assert repaired.cache_files == expected.cache_files  # so that --misplaced_answers is part of what a run resumes


def test_further_answers_stay():
    rows = make_examples(MOVED[1:2]).to_list()
    rows[0]["answers"] = {"text": ["1890", "x"], "answer_start": [16, 3]}
    placed, _ = place_answers(Dataset.from_list(rows, features=EXAMPLE_FEATURES), "train.json")
    assert placed[0]["answers"] == {"text": ["1890", "x"], "answer_start": [14, 3]}


def test_refuse():
    with pytest.raises(ValueError) as error:
        place_answers(make_examples(MOVED), "train.json", "refuse")
    assert "train.json: 6 of 8 questions have an answer" in str(error.value) and "first ids: off by two" in str(
        error.value
    )
    examples = make_examples(MOVED[:1])
    assert place_answers(examples, "train.json", "refuse") == (examples, [])


def test_nothing_left():
    with pytest.raises(ValueError, match="nothing to train on"):
        place_answers(make_examples(MOVED[6:7]), "train.json")


def test_repaired_examples_keep_their_file(tmp_path):
    """Their features are then kept beside it, as those of other examples."""
    make_examples(MOVED).save_to_disk(tmp_path / "saved")
    placed, _ = place_answers(Dataset.load_from_disk(tmp_path / "saved"), "train.json")
    assert placed.cache_files[0]["filename"].startswith(str(tmp_path / "saved"))


# ---- Held out ----


def questions(contexts: int, each: int = 3) -> Dataset:
    # The questions of a context do not stand together.
    return make_examples([(f"{q}-{c}", f"{q}?", f"context {c}", "", 0) for q in range(each) for c in range(contexts)])


def test_repairing_held_out_questions_keeps_each_context_once(tmp_path):
    rows = [
        {"id": f"{c}-{q}", "context": f"the king of town {c}", "question": "who?", "answers": ["king"]}
        for c in range(10)
        for q in range(20)
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    before = hold_out({"train": read_squad_file(file, tmp_path / "cache")}, 20, 42, "f")["train"]
    examples, changes = place_answers(before, "f")
    assert len(changes) == len(examples) == 160
    assert examples.features == before.features
    assert examples["context"][:] == before["context"][:] and examples["id"][:] == before["id"][:]
    assert set(examples["answers"][0]["text"]) == {"king"} and examples["answers"][0]["answer_start"] == [4]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


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


def test_the_seed_chooses():
    def held(seed):
        return hold_out({"train": questions(50)}, 20, seed, "f")["validation"]["id"][:]

    assert held(1) == held(1) != held(2)
    order = questions(50)["id"][:]
    assert held(1) == [id_ for id_ in order if id_ in set(held(1))]


def test_one_context_cannot_be_held_out():
    with pytest.raises(ValueError, match="train.json holds one context only"):
        hold_out({"train": questions(1)}, 50, 42, "train.json")


# ---- Flags ----


def test_flags_that_do_not_fit_the_questions(caplog):
    none, both = make_examples(MOVED[:7]), make_examples(MOVED)
    with caplog.at_level(logging.WARNING, logger="qa"):
        assert warn_of_flags("train", none, "f", False) is None
        assert warn_of_flags("train", both, "f", True) is None
        assert warn_of_flags("validation", none, "f", True) is None
        assert caplog.messages == []
        line = warn_of_flags("validation", both, "f", False)
        assert "1 of 8 validation questions have no answer, but --version_2_with_negative is not given" in line
        assert "scores 0 (NoAns_exact, NoAns_f1)" in line
        line = warn_of_flags("train", none, "f", True)
        assert "--version_2_with_negative is given, but each of 7 train questions has an answer" in line
    assert len(caplog.messages) == 2
