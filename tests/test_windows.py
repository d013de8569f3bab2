"""Windows, against transformers 4.57.6, the tokenizers themselves, and plain references; their cache; the collator."""

import json
import random
import re
import unicodedata
from pathlib import Path

import datasets
import hypothesis
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    CanineTokenizer,
    DistilBertTokenizer,
    ElectraTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from qa import read_squad, windows
from qa.read_squad import EXAMPLE_FEATURES
from qa.windows import (
    QADataCollator,
    WindowSettings,
    check_tokenizer,
    data_limits,
    keep_negative_windows,
    make_features,
    make_train_features,
)
from utils_qa import postprocess_qa_predictions

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("features.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


def golden_examples() -> Dataset:
    return make_examples(tuple(example.values()) for example in GOLDEN["examples"])


def golden_tokenizer(tokenizer_class=BertTokenizer):
    return tokenizer_class(vocab={token: i for i, token in enumerate(GOLDEN["vocabulary"])})


def byte_level_bpe() -> Tokenizer:
    """Trained on little text, so that most characters outside ASCII stay several tokens of one byte each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([example["context"] for example in GOLDEN["examples"][:20]], trainer)
    return tokenizer


def roberta_tokenizer():
    model = json.loads(byte_level_bpe().to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def modernbert_tokenizer():
    """As the hub's: byte-level BPE, tokens' offsets with the space before them, BERT's template, no token types."""
    backend = byte_level_bpe()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )


TOKENIZERS = {
    "bert": golden_tokenizer,
    "electra": lambda: golden_tokenizer(ElectraTokenizer),
    "distilbert": lambda: golden_tokenizer(DistilBertTokenizer),
    "roberta": roberta_tokenizer,
    "modernbert": modernbert_tokenizer,
}


def with_marks(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each token's characters, and after them the combining marks that are in no token."""
    in_tokens = {character for span in spans for character in range(*span)}
    whole = []
    for start, end in spans:
        while (
            start < end < len(text) and end not in in_tokens and unicodedata.category(text[end]) in ("Mn", "Mc", "Me")
        ):
            end += 1
        whole.append((start, end))
    return whole


def windows_by_example(features: Dataset, num_examples: int) -> list[list[dict]]:
    windows = [[] for _ in range(num_examples)]
    for window in features:
        windows[window["example_index"]].append(window)
    return windows


# ----------------------------------------------------------------------------------------------------------------------
# Windows and labels against transformers 4.57.6


@pytest.mark.parametrize("number", range(len(GOLDEN["settings"])))
def test_windows_equal_transformers_4(number):
    """Equal in all but two things, both on purpose.

    An empty context: 4.57.6 makes no window and the question is lost; ours is one window, in which there is no answer.

    Labels of answers that start or end inside a token: 4.57.6 starts from whole whitespace words and looks in them for
    the tokens of the answer; where it does not find those, the label stays at whole words. Ours are the tokens that
    the answer's characters touch, which lie in those words.

    (Also different, and in neither's hands: characters that Unicode got after version 8, which the tokenizers library
    takes for other kinds of characters than the Python tokenizer does.)
    """
    examples, tokenizer, setting = golden_examples(), golden_tokenizer(), WindowSettings(*GOLDEN["settings"][number])
    ours = windows_by_example(make_train_features(examples, tokenizer, setting), len(examples))
    offsets = windows_by_example(make_features(examples, tokenizer, setting), len(examples))
    golden = {example["id"]: [] for example in GOLDEN["examples"]}
    for window in GOLDEN["windows"][number]:
        golden[window["id"]].append(window)

    no_window, inexact = [], []
    for example, our_windows, our_offsets in zip(examples, ours, offsets, strict=True):
        their_windows = golden[example["id"]]
        if not their_windows:
            no_window.append(example["id"])
            (window,) = our_windows
            expected = tokenizer([example["question"]], [""])
            assert window["input_ids"] == expected["input_ids"][0]
            assert window["token_type_ids"] == expected["token_type_ids"][0]
            assert (window["start_positions"], window["end_positions"]) == (0, 0)
            continue
        assert len(our_windows) == len(their_windows), example["id"]
        for window, at, their in zip(our_windows, our_offsets, their_windows, strict=True):
            assert window["input_ids"] == at["input_ids"] == their["input_ids"], example["id"]
            types = "".join(map(str, window["token_type_ids"]))
            assert types == their["token_type_ids"], example["id"]
            assert window["length"] == len(their["input_ids"])
            label = window["start_positions"], window["end_positions"]
            their_label = their["start_position"], their["end_position"]
            if label == their_label:
                continue
            inexact.append(example["id"])
            assert label[0] > 0, example["id"]
            (start,), (answer,) = example["answers"]["answer_start"], example["answers"]["text"]
            char_start = at["char_starts"][label[0] - at["context_start"]]
            char_end = at["char_ends"][label[1] - at["context_start"]]
            assert char_start < start or start + len(answer) < char_end, example["id"]
            assert their_label == (0, 0) or (their_label[0] <= label[0] and label[1] <= their_label[1])
    assert no_window == ["empty context", "context of spaces"]
    assert len(set(inexact)) <= 4


def test_golden_examples_have_what_they_are_for():
    tokenizer = golden_tokenizer()
    features = make_features(golden_examples(), tokenizer, WindowSettings(*GOLDEN["settings"][2]))
    ids = [example["id"] for example in GOLDEN["examples"]]
    windows = dict(zip(ids, windows_by_example(features, len(ids)), strict=True))
    assert len(windows["long"]) > 10
    assert tokenizer.unk_token_id in windows["unknown words"][0]["input_ids"]
    assert windows["question longer than max_query_length"][0]["context_start"] == 12 + 2
    assert windows["question of one token"][0]["context_start"] == 1 + 2
    labels = {window["id"]: set() for window in GOLDEN["windows"][2]}
    for window in GOLDEN["windows"][2]:
        labels[window["id"]].add((window["start_position"], window["end_position"]))
    assert labels["long answer"] == {(0, 0)}  # in no window as a whole
    assert len(labels["long, answer at the end"]) == 2  # in one window, not in the others


# ----------------------------------------------------------------------------------------------------------------------
# Any tokenizer, against its own way to cut a pair into overlapping windows


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_equal_the_tokenizers_own(name):
    tokenizer, reference = TOKENIZERS[name](), TOKENIZERS[name]()
    examples = golden_examples()
    setting = WindowSettings(max_seq_length=100, doc_stride=13, max_query_length=80)
    labelled = windows_by_example(make_train_features(examples, tokenizer, setting), len(examples))
    located = windows_by_example(make_features(examples, tokenizer, setting), len(examples))
    compared = 0
    for example, our_labelled, our_located in zip(examples, labelled, located, strict=True):
        question = example["question"].lstrip()
        question_length = len(reference(question, add_special_tokens=False)["input_ids"])
        if question_length > setting.max_query_length:
            continue
        compared += 1
        room = setting.max_seq_length - question_length - reference.num_special_tokens_to_add(pair=True)
        expected = reference(
            [question],
            [example["context"]],
            truncation="only_second",
            max_length=setting.max_seq_length,
            stride=room - setting.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert len(our_labelled) == len(our_located) == len(expected["input_ids"]), example["id"]
        for i, (window, at) in enumerate(zip(our_labelled, our_located, strict=True)):
            assert window["input_ids"] == at["input_ids"] == expected["input_ids"][i]
            assert window.get("token_type_ids") == at.get("token_type_ids")
            assert window.get("token_type_ids") == (
                expected["token_type_ids"][i] if "token_type_ids" in expected else None
            )
            context = [k for k, sequence in enumerate(expected.sequence_ids(i)) if sequence == 1]
            assert list(range(at["context_start"], at["context_start"] + len(at["char_starts"]))) == (context or [])
            spans = [expected["offset_mapping"][i][k] for k in context]
            whole = reference(example["context"], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            whole = dict(zip(whole, with_marks(example["context"], whole), strict=True))
            assert list(zip(at["char_starts"], at["char_ends"], strict=True)) == [whole[span] for span in spans]
            label = (window["start_positions"], window["end_positions"])
            assert label == label_of_window(example, context, spans, reference), example["id"]
    assert compared > 70
    assert ("token_type_ids" in make_features(examples, tokenizer, setting).column_names) == (
        name in ("bert", "electra")
    )


def label_of_window(example, positions, spans, tokenizer) -> tuple[int, int]:
    """The tokens of the window that share a character with the answer, unless the answer has others outside it."""
    if not example["answers"]["text"]:
        return 0, 0
    start = example["answers"]["answer_start"][0]
    end = start + len(example["answers"]["text"][0])
    whole = tokenizer(example["context"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    touched = [span for span in whole if max(span[0], start) < min(span[1], end)]
    here = [p for p, span in zip(positions, spans, strict=True) if max(span[0], start) < min(span[1], end)]
    return (here[0], here[-1]) if here and len(here) == len(touched) else (0, 0)


@pytest.mark.parametrize("name", ["roberta", "modernbert"])
def test_answer_of_one_character_that_is_several_tokens(name):
    tokenizer = TOKENIZERS[name]()
    context = "the 😀 won"
    examples = make_examples([("1", "who", context, "😀", 4), ("2", "who", context, " won", 5)])
    train = make_train_features(examples, tokenizer, WindowSettings())
    tokens = tokenizer.convert_ids_to_tokens(train[0]["input_ids"])
    emoji_bytes = len(tokenizer.tokenize("😀"))
    assert emoji_bytes > 1
    first = next(
        i
        for i, span in enumerate(tokenizer("who", context, return_offsets_mapping=True)["offset_mapping"])
        if span[1] == 5 and i > tokens.index("</s>")
    )
    assert train[0]["start_positions"] == first
    space_is_a_token = tokens[first] == "Ġ"
    assert train[0]["end_positions"] == first + emoji_bytes - 1 + space_is_a_token
    text = "".join(tokens[train[1]["start_positions"] : train[1]["end_positions"] + 1])
    assert text == "Ġwon"  # an answer that starts in whitespace


def test_answer_of_whitespace_or_dropped_characters(caplog):
    context = "the  king\u200b won"
    rows = [("1", "who", context, "  ", 3), ("2", "who", context, " king\u200b", 4), ("3", "who", context, "\u200b", 9)]
    features = make_train_features(make_examples(rows), golden_tokenizer(), WindowSettings())
    labels = [(window["start_positions"], window["end_positions"]) for window in features]
    king = features[1]["input_ids"].index(golden_tokenizer().convert_tokens_to_ids("king"))
    assert labels == [(0, 0), (king, king), (0, 0)]
    assert "2 answers are made of characters that the tokenizer drops" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Properties, on texts that nobody thought of

TEXT_PIECES = st.one_of(
    st.sampled_from(
        "the king of and was born old 1895 Quentin café cafe\u0301 東京 😀 👩\u200d🎨 don't U.S. [SEP] </s>".split()
    ),
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u202f", "\u3000", "\u200b", "-", "—", ".", "(", "\x00"]
    ),
    st.text(max_size=6),
)
TEXTS = st.lists(TEXT_PIECES, max_size=60).map(lambda pieces: "".join(pieces).encode("utf-8", "ignore").decode())


@st.composite
def examples_and_settings(draw):
    contexts = draw(st.lists(TEXTS, min_size=1, max_size=3))
    rows = []
    for number in range(draw(st.integers(1, 5))):
        context = draw(st.sampled_from(contexts))
        start = draw(st.integers(0, max(len(context) - 1, 0)))
        answer = context[start : draw(st.integers(start, min(start + 40, len(context))))]
        rows.append((str(number), draw(TEXTS), context, answer, start))
    max_query_length = draw(st.integers(1, 12))
    doc_stride = draw(st.integers(1, 20))
    max_seq_length = max_query_length + 4 + doc_stride + draw(st.integers(0, 20))  # RoBERTa has 4 special tokens
    return rows, WindowSettings(max_seq_length, doc_stride, max_query_length)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=examples_and_settings())
@hypothesis.example(
    case=([("0", "", " and", " a", 0)], WindowSettings(6, 1, 1))
)  # RoBERTa's token of the space holds nothing
def test_every_token_is_covered_and_labels_contain_the_answer(name, case):
    rows, setting = case
    tokenizer = TOKENIZERS_MADE.setdefault(name, TOKENIZERS[name]())
    examples = make_examples(rows)
    labelled = windows_by_example(make_train_features(examples, tokenizer, setting), len(examples))
    located = windows_by_example(make_features(examples, tokenizer, setting), len(examples))
    for example, our_labelled, our_located in zip(examples, labelled, located, strict=True):
        context = example["context"]
        whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        spans = with_marks(context, whole["offset_mapping"])
        tokens = list(zip(whole["input_ids"], spans, strict=True))
        covered = []
        for i, window in enumerate(our_located):
            assert window["length"] == len(window["input_ids"]) <= setting.max_seq_length
            first = window["context_start"]
            ids = window["input_ids"][first : first + len(window["char_starts"])]
            start = i * setting.doc_stride
            here = list(zip(ids, zip(window["char_starts"], window["char_ends"], strict=True), strict=True))
            assert here == tokens[start : start + len(here)]
            covered += range(start, start + len(here))
        assert set(covered) == set(range(len(tokens)))

        if not example["answers"]["text"]:
            assert all(window["start_positions"] == window["end_positions"] == 0 for window in our_labelled)
            continue
        start = example["answers"]["answer_start"][0]
        end = start + len(example["answers"]["text"][0])
        in_tokens = {char for _, span in tokens for char in range(*span)}
        answer_chars = [char for char in range(start, end) if char in in_tokens]
        for window, at in zip(our_labelled, our_located, strict=True):
            if window["start_positions"] == 0:
                continue
            label = [window[key] - at["context_start"] for key in ("start_positions", "end_positions")]
            assert 0 <= label[0] <= label[1] < len(at["char_starts"])
            assert at["char_starts"][label[0]] <= answer_chars[0] < at["char_ends"][label[0]]
            assert at["char_starts"][label[1]] <= answer_chars[-1] < at["char_ends"][label[1]]
            if answer_chars[0] == start and answer_chars[-1] == end - 1:
                assert example["answers"]["text"][0] in context[at["char_starts"][label[0]] : at["char_ends"][label[1]]]


TOKENIZERS_MADE = {}


# ----------------------------------------------------------------------------------------------------------------------
# Letters with combining marks, which some tokenizers drop

MARKED = {  # the answer is the word in brackets
    "Hindi": "कोच [जॉन एलवे] थे।",
    "Hindi, at the end": "कोच [जॉन एलवे]",
    "Arabic": "قال [أولاً] ثم",
    "Hebrew": "[שָׁלוֹם] רב",
    "Vietnamese, decomposed": unicodedata.normalize("NFD", "ở [Hà Nội], Việt"),
    "Vietnamese, composed": unicodedata.normalize("NFC", "ở [Hà Nội], Việt"),
    "two marks": "an [e\u0323\u0302] here",
    "enclosing mark": "number [7\u20dd] of",
    "variation selector": "a [snowman \u2603\ufe0f] there",
}


def uncased_tokenizer(strip_accents: bool = True) -> BertTokenizer:
    """WordPieces of one character each, for all that the texts come to without their marks, and with them."""
    text = "".join(MARKED.values()) + "why?"
    characters = sorted(set(unicodedata.normalize("NFD", text).lower() + text.lower()) - {" "})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, strip_accents=strip_accents)


def answers_of_right_logits(examples: Dataset, tokenizer, setting: WindowSettings) -> dict[str, str]:
    """What is answered if the labels that are trained on have the highest logits."""
    train, features = make_train_features(examples, tokenizer, setting), make_features(examples, tokenizer, setting)
    logits = torch.zeros(2, len(train), setting.max_seq_length)
    for kind, name in enumerate(("start_positions", "end_positions")):
        logits[kind, range(len(train)), train[name][:]] = 9.0
    return postprocess_qa_predictions(examples, features, tuple(logits.numpy())).answers


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("max_seq_length", [64, 20])
@pytest.mark.parametrize("strip_accents", [True, False])
def test_an_answer_has_its_last_mark(strip_accents, max_seq_length, name):
    before, answer, after = re.split(r"[\[\]]", MARKED[name])
    tokenizer = uncased_tokenizer(strip_accents)
    examples = make_examples([("1", "why?", before + answer + after, answer, len(before))])
    assert answers_of_right_logits(examples, tokenizer, WindowSettings(max_seq_length, 4, 8)) == {"1": answer}
    plain = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    dropped = strip_accents and unicodedata.category(answer[-1]) == "Mn"
    assert (plain[-1][1] < len(answer)) == dropped  # what the tokenizer alone would say


@pytest.mark.parametrize("pieces", [False, True])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text("ab é\u0301\u0323\u093e\u0947\u20dd\u200d.\u2603\ufe0f", max_size=60), min_size=1, max_size=4
    )
)
def test_a_mark_in_no_token_goes_with_the_letter_before_it(pieces, texts):
    tokenizer = uncased_tokenizer()
    examples = make_examples((str(i), "why?", text, "", 0) for i, text in enumerate(texts))
    with pytest.MonkeyPatch.context() as patch:
        if pieces:
            patch.setattr(windows, "CHARACTERS_PER_PIECE", 16)
            patch.setattr(windows, "PIECE_OVERLAP", 8)
        features = make_features(examples, tokenizer, WindowSettings(128, 32), overwrite_cache=True)
    for text, window in zip(texts, features, strict=True):
        own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert list(zip(window["char_starts"], window["char_ends"], strict=True)) == with_marks(text, own)


# ----------------------------------------------------------------------------------------------------------------------
# Long texts, which the tokenizer sees in pieces


def long_text(rng: random.Random) -> str:
    words = (
        "the king of was born 1895 Quentin café cafe\u0301 東京 😀 👩\u200d🎨 don't U.S. [SEP] </s> ， \u200b".split()
    )
    return "".join(rng.choice(words) + rng.choice(["", " ", "  ", "\n", "\u00a0", "-"]) for _ in range(400))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_a_long_text_are_tokenized_as_the_whole(name, monkeypatch):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    setting = WindowSettings(64, 16, 24)
    texts = [long_text(rng) for _ in range(6)] + ["the king", "", "the " * 73, "the " * 75]
    rows = [(str(i), "who", text, "", 0) for i, text in enumerate([*texts, *texts[:3]])]
    whole = make_features(make_examples(rows), tokenizer, setting)[:]
    monkeypatch.setattr(windows, "CHARACTERS_PER_PIECE", 300)
    monkeypatch.setattr(windows, "PIECE_OVERLAP", 150)
    monkeypatch.setattr(windows, "BYTES_PER_BATCH", 500)
    monkeypatch.setattr(windows, "BATCHES_AT_ONCE", 2)
    asked = []
    monkeypatch.setattr(windows, "_encode", lambda encode, b, _do=windows._encode: asked.extend(b) or _do(encode, b))
    assert make_features(make_examples(rows), tokenizer, setting, overwrite_cache=True)[:] == whole
    # none was a text that had to be tokenized as a whole
    assert max(len(text) for batch in asked for text in batch) == 300 + 2 * 150


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize(
    "text",
    [
        "a" * 3000,
        "the king " + "\u6771" * 1500 + " was" * 300,
        " " * 2000,
        "x" * 449 + " king",
        "the king " * 33 + "b" * 900,
    ],
)
def test_pieces_of_a_text_without_places_to_cut(name, text, monkeypatch):
    tokenizer = TOKENIZERS[name]()
    examples = make_examples([("1", "who", text, "", 0), ("2", "who", "the king", "", 0)])
    whole = make_features(examples, tokenizer, WindowSettings(64, 16, 24))[:]
    monkeypatch.setattr(windows, "CHARACTERS_PER_PIECE", 300)
    monkeypatch.setattr(windows, "PIECE_OVERLAP", 150)
    assert make_features(examples, tokenizer, WindowSettings(64, 16, 24), overwrite_cache=True)[:] == whole


# ----------------------------------------------------------------------------------------------------------------------
# Windows without an answer, and what the data cannot give


def test_negative_windows():
    features = make_train_features(golden_examples(), golden_tokenizer(), WindowSettings(64, 16, 24))
    hold = [i for i, start in enumerate(features["start_positions"]) if start > 0]
    others = [i for i in range(len(features)) if i not in hold]
    numbered = features.add_column("number", list(range(len(features))))
    for share in (0.0, 0.1, 0.5, 1.0):
        kept = keep_negative_windows(numbered, share, seed=1)["number"][:]
        assert kept == sorted(kept) and [i for i in kept if i in hold] == hold
        assert len(kept) - len(hold) == round(share * len(others))
        assert keep_negative_windows(numbered, share, seed=1)["number"][:] == kept
    assert (
        keep_negative_windows(numbered, 0.5, seed=2)["number"][:]
        != keep_negative_windows(numbered, 0.5, 1)["number"][:]
    )
    assert keep_negative_windows(features, 1.0, 1)[:] == features[:]


def test_negative_windows_of_which_none_is_left():
    examples = make_examples([("1", "who", "the king", "", 0)])
    features = make_train_features(examples, golden_tokenizer(), WindowSettings())
    assert len(keep_negative_windows(features, 1.0, 0)) == 1
    with pytest.raises(
        ValueError, match="--negative_windows 0.0 leaves nothing to train on: no window holds an answer"
    ):
        keep_negative_windows(features, 0.0, 0)


def plain_limits(rows, golds, tokenizer, setting: WindowSettings, max_answer_length: int) -> list[tuple[int, int]]:
    """(count, of) of what data_limits tells, window by window. golds: (text, start) of each row's gold answers."""
    longest, not_held, answered, cut, long_contexts = 0, 0, 0, 0, set()
    for (_, question, context, _, _), answers in zip(rows, golds, strict=True):
        spans = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        question_length = len(tokenizer(question.lstrip(), add_special_tokens=False)["input_ids"])
        cut += question_length > setting.max_query_length
        special = tokenizer.num_special_tokens_to_add(pair=True)
        room = setting.max_seq_length - special - min(question_length, setting.max_query_length)
        seen, start = [], 0
        while True:
            seen.append(range(start, min(start + room, len(spans))))
            if start + room >= len(spans):
                break
            start += setting.doc_stride
        if len(seen) > 1:
            long_contexts.add(context)
        touched = [
            [k for k, span in enumerate(spans) if max(span[0], start) < min(span[1], start + len(text))]
            for text, start in answers
        ]
        touched = [tokens for tokens in touched if tokens]
        if touched:
            answered += 1
            longest += min(tokens[-1] - tokens[0] + 1 for tokens in touched) > max_answer_length
            not_held += not any(t[0] in window and t[-1] in window for t in touched for window in seen)
    contexts = len({row[2] for row in rows})
    return [(longest, answered), (not_held, answered), (len(long_contexts), contexts), (cut, len(rows))]


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=examples_and_settings(), more=st.lists(st.integers(0, 200), max_size=3), most=st.integers(1, 12))
def test_limits_of_the_data(name, case, more, most):
    rows, setting = case
    tokenizer = TOKENIZERS_MADE.setdefault(name, TOKENIZERS[name]())
    examples = make_examples(rows)
    golds = [[(answer, start)] if answer else [] for *_, answer, start in rows]
    features = make_train_features(examples, tokenizer, setting)
    expected = plain_limits(rows, golds, tokenizer, setting, most)
    assert limits_told(data_limits(features, most, setting.max_query_length)) == [x for x in expected if x[0]]
    assert data_limits(features.select([0]), most, setting.max_query_length) == data_limits(
        features, most, setting.max_query_length
    )
    # In evaluation one of several gold answers is enough.
    for row, answers in zip(rows, golds, strict=True):
        answers += [(row[2][start : start + 9], start) for start in more if start < len(row[2])]
    several = [{"text": [a[0] for a in answers], "answer_start": [a[1] for a in answers]} for answers in golds]
    examples = Dataset.from_list(
        [{**row, "answers": answers} for row, answers in zip(examples, several, strict=True)], features=EXAMPLE_FEATURES
    )
    features = make_features(examples, tokenizer, setting)
    expected = plain_limits(rows, golds, tokenizer, setting, most)
    assert limits_told(data_limits(features, most, setting.max_query_length)) == [x for x in expected if x[0]]


def limits_told(lines: list[str]) -> list[tuple[int, int]]:
    return [tuple(map(int, re.match(r"(\d+) of (\d+) \(", line).groups())) for line in lines]


def test_limits_are_told_from_the_cache_too(monkeypatch):
    examples = make_examples(
        [("1", "who who who", "the king " * 40, "king the king", 4), ("2", "who", "the king was old", "king", 4)]
    )
    setting = WindowSettings(max_seq_length=30, doc_stride=10, max_query_length=2)
    lines = data_limits(make_train_features(examples, golden_tokenizer(), setting), 2, 2)
    assert lines == [
        "1 of 2 (50.0%) answers are longer than --max_answer_length 2 and can never be given",
        "1 of 2 (50.0%) contexts are longer than one window",
        "1 of 2 (50.0%) questions are cut at --max_query_length 2",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(windows, "_tokenize_contexts", None)
        assert data_limits(make_train_features(examples, golden_tokenizer(), setting), 2, 2) == lines
    alone = make_train_features(examples.select([1]), golden_tokenizer(), setting, overwrite_cache=True)
    assert data_limits(alone, 2, 2) == []


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_doc_stride_that_leaves_tokens_uncovered():
    examples = make_examples([("1", "who " * 9, "the king " * 40, "", 0), ("2", "who", "the king", "", 0)])
    tokenizer = golden_tokenizer()
    make_features(examples, tokenizer, WindowSettings(max_seq_length=40, doc_stride=28, max_query_length=30))
    make_features(examples, tokenizer, WindowSettings(max_seq_length=40, doc_stride=33, max_query_length=4))
    with pytest.raises(ValueError, match=r"--doc_stride 29 .* \(9 tokens\) leaves 28 of --max_seq_length 40"):
        make_features(examples, tokenizer, WindowSettings(max_seq_length=40, doc_stride=29, max_query_length=30))
    with pytest.raises(ValueError, match=r"--doc_stride 1 .* leaves 0 of --max_seq_length 8"):
        make_train_features(examples, tokenizer, WindowSettings(max_seq_length=8, doc_stride=1))


@pytest.mark.parametrize("name", ["max_seq_length", "doc_stride", "max_query_length"])
def test_window_settings_below_one(name):
    with pytest.raises(ValueError, match=f"--{name} 0: must be at least 1"):
        WindowSettings(**{name: 0})


def test_check_tokenizer():
    check_tokenizer(golden_tokenizer())
    with pytest.raises(ValueError, match="CanineTokenizer .* is a slow tokenizer"):
        check_tokenizer(CanineTokenizer())
    left = golden_tokenizer()
    left.padding_side = "left"
    with pytest.raises(ValueError, match="BertTokenizer .* pads on the left"):
        check_tokenizer(left)
    with pytest.raises(ValueError, match="has no padding token"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe()))


def test_no_examples():
    with pytest.raises(ValueError, match="no question"):
        make_features(make_examples([]), golden_tokenizer(), WindowSettings())


# ----------------------------------------------------------------------------------------------------------------------
# Cache


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*features*"))


def test_second_run_reads_the_cache(datasets_cache, monkeypatch):
    examples, tokenizer = golden_examples(), golden_tokenizer()
    first = make_train_features(examples, tokenizer, WindowSettings())
    (path,) = cache_files(datasets_cache)
    written = path.stat().st_mtime_ns, path.stat().st_ino

    tokenizer("use it", padding="max_length", max_length=40, truncation=True)  # changes its state and its pickle
    monkeypatch.setattr(windows, "_tokenize_contexts", None)
    again = make_train_features(examples.select(range(len(examples))), tokenizer, WindowSettings())
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    assert again[:] == first[:]
    fresh = make_train_features(golden_examples(), golden_tokenizer(), WindowSettings())
    assert fresh[:] == first[:]
    assert cache_files(datasets_cache) == [path]


def test_state_of_the_tokenizer_changes_nothing():
    used = golden_tokenizer()
    used("use it", padding="max_length", max_length=5, truncation=True)
    for make in (make_train_features, make_features):
        ours = make(golden_examples(), used, WindowSettings(), overwrite_cache=True)[:]
        used("use it", padding="max_length", max_length=5, truncation=True)
        assert ours == make(golden_examples(), golden_tokenizer(), WindowSettings(), overwrite_cache=True)[:]


def test_overwrite_cache(datasets_cache):
    make_features(golden_examples(), golden_tokenizer(), WindowSettings())
    (path,) = cache_files(datasets_cache)
    before = path.stat().st_ino
    make_features(golden_examples(), golden_tokenizer(), WindowSettings(), overwrite_cache=True)
    assert cache_files(datasets_cache) == [path] and path.stat().st_ino != before


def test_any_change_makes_new_features(datasets_cache):
    row = ("1", "who was born", "the king was born", "king", 4)
    base = make_examples([row]), golden_tokenizer(), WindowSettings()
    lower = golden_tokenizer()
    other_word = BertTokenizer(vocab={token: i for i, token in enumerate([*GOLDEN["vocabulary"], "born1"])})
    cased = BertTokenizer(vocab=lower.get_vocab(), do_lower_case=False)
    variants = [
        (make_train_features, *base),
        (make_features, *base),
        (make_train_features, make_examples([("1", "who was old", *row[2:])]), *base[1:]),
        (make_train_features, make_examples([(*row[:2], "the king was old", *row[3:])]), *base[1:]),
        (make_train_features, make_examples([(*row[:3], "was", 9)]), *base[1:]),
        (make_train_features, make_examples([(*row[:3], "", 0)]), *base[1:]),
        (make_train_features, make_examples([row, ("2", *row[1:])]), *base[1:]),
        (make_train_features, base[0], other_word, base[2]),
        (make_train_features, base[0], cased, base[2]),
        (make_train_features, base[0], golden_tokenizer(DistilBertTokenizer), base[2]),
        (make_train_features, *base[:2], WindowSettings(max_seq_length=383)),
        (make_train_features, *base[:2], WindowSettings(doc_stride=127)),
        (make_train_features, *base[:2], WindowSettings(max_query_length=63)),
    ]
    for count, (make, examples, tokenizer, setting) in enumerate(variants, start=1):
        make(examples, tokenizer, setting)
        assert len(cache_files(datasets_cache)) == count, f"variant {count} took the features of another"
    # ids and titles are in no feature
    make_train_features(make_examples([("other", *row[1:])]), *base[1:])
    assert len(cache_files(datasets_cache)) == len(variants)


def test_the_hash_of_the_data_is_that_of_earlier_versions(monkeypatch):
    """Checkpoints hold it: with another one no run that an earlier version began could go on."""
    monkeypatch.setattr("tokenizers.__version__", "0")
    settings = WindowSettings(32, 8, 12)
    for make, expected in (
        (make_train_features, "cache-train-features-91c923b40c7e19830e4861e7ccf655f4"),
        (make_features, "cache-eval-features-a00a361c79b601eec02206fc1821d951"),
    ):
        features = make(golden_examples(), golden_tokenizer(), settings)
        assert Path(features.cache_files[0]["filename"]).name.startswith(f"{expected}-v")


def test_same_texts_in_other_rows_differ(datasets_cache):
    for contexts in ("aba", "abb", "baa"):
        rows = [(str(i), "who", f"the king {letter}", "", 0) for i, letter in enumerate(contexts)]
        make_features(make_examples(rows), golden_tokenizer(), WindowSettings())
    assert len(cache_files(datasets_cache)) == 3


def test_texts_that_join_to_the_same_bytes_differ(datasets_cache):
    make_features(
        make_examples([("1", "who", "the king", "", 0), ("2", "who", "was", "", 0)]),
        golden_tokenizer(),
        WindowSettings(),
    )
    make_features(
        make_examples([("1", "who", "the ", "", 0), ("2", "who", "kingwas", "", 0)]),
        golden_tokenizer(),
        WindowSettings(),
    )
    assert len(cache_files(datasets_cache)) == 2


@pytest.mark.parametrize("make", [make_train_features, make_features])
def test_more_processes_write_the_same_bytes(make, datasets_cache, monkeypatch):
    monkeypatch.setattr(windows, "TEXTS_PER_BATCH", 7)
    make(golden_examples(), golden_tokenizer(), WindowSettings(64, 16, 24))
    (path,) = cache_files(datasets_cache)
    alone = path.read_bytes()
    monkeypatch.setattr(windows, "TEXTS_PER_BATCH", 1000)
    make(golden_examples(), golden_tokenizer(), WindowSettings(64, 16, 24), num_proc=2, overwrite_cache=True)
    assert path.read_bytes() == alone


def test_features_do_not_depend_on_batches(monkeypatch):
    expected = make_features(golden_examples(), golden_tokenizer(), WindowSettings(32, 8, 12))[:]
    monkeypatch.setattr(windows, "WINDOWS_PER_BATCH", 3)
    monkeypatch.setattr(read_squad, "ROWS_PER_RECORD_BATCH", 2)
    assert (
        make_features(golden_examples(), golden_tokenizer(), WindowSettings(32, 8, 12), overwrite_cache=True)[:]
        == expected
    )


def test_selected_and_shuffled_examples():
    """Rows come from the examples as the caller sees them, not from the table under a selection."""
    examples, tokenizer, setting = golden_examples(), golden_tokenizer(), WindowSettings()
    chosen = [7, 3, 3, 20]
    expected = windows_by_example(make_train_features(examples, tokenizer, setting), len(examples))
    ours = windows_by_example(make_train_features(examples.select(chosen), tokenizer, setting), len(chosen))
    for i, index in enumerate(chosen):
        assert [{**window, "example_index": index} for window in ours[i]] == expected[index]


def test_examples_in_several_chunks():
    parts = [golden_examples().select(range(start, start + 10)) for start in (0, 5, 20)]
    whole = Dataset.from_list([row for part in parts for row in part], features=EXAMPLE_FEATURES)
    chunked = datasets.concatenate_datasets(parts)
    for make in (make_train_features, make_features):
        expected = make(whole, golden_tokenizer(), WindowSettings(32, 8, 12))[:]
        assert make(chunked, golden_tokenizer(), WindowSettings(32, 8, 12), overwrite_cache=True)[:] == expected


def test_half_written_files_are_never_read(datasets_cache, monkeypatch):
    expected = make_features(golden_examples(), golden_tokenizer(), WindowSettings())[:]
    (path,) = cache_files(datasets_cache)
    path.unlink()
    slice_tokens, calls = windows._ranges, []

    def fail_late(*args):
        calls.append(args)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        return slice_tokens(*args)

    monkeypatch.setattr(windows, "_ranges", fail_late)
    monkeypatch.setattr(windows, "WINDOWS_PER_BATCH", 8)
    with pytest.raises(OSError):
        make_features(golden_examples(), golden_tokenizer(), WindowSettings())
    assert cache_files(datasets_cache) == []
    # and what a killed process leaves is passed over
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", datasets_cache)
    path.with_name(path.name + ".0123abcd.writing").write_bytes(b"half")
    assert make_features(golden_examples(), golden_tokenizer(), WindowSettings())[:] == expected


# ----------------------------------------------------------------------------------------------------------------------
# Collator


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_collator_pads_as_the_tokenizer(name):
    tokenizer = TOKENIZERS[name]()
    features = make_train_features(golden_examples(), tokenizer, WindowSettings(64, 16, 24))
    rows = [features[i] for i in (0, 30, 5)]
    inputs = [{key: row[key] for key in ("input_ids", "token_type_ids") if key in row} for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for options, padding in [
        ({}, {"padding": "longest"}),
        ({"pad_to_multiple_of": 8}, {"padding": "longest", "pad_to_multiple_of": 8}),
        ({"pad_to_max_length": 70}, {"padding": "max_length", "max_length": 70}),
    ]:
        batch = QADataCollator(tokenizer, **options)(rows)
        expected = dict(tokenizer.pad(inputs, return_tensors="pt", **padding))
        expected["start_positions"] = torch.tensor([row["start_positions"] for row in rows])
        expected["end_positions"] = torch.tensor([row["end_positions"] for row in rows])
        assert batch.keys() == expected.keys()
        for key in expected:
            assert batch[key].dtype == torch.int64 and torch.equal(batch[key], expected[key]), key
    evaluation = make_features(golden_examples(), tokenizer, WindowSettings())
    assert "start_positions" not in QADataCollator(tokenizer)([evaluation[0]])
