"""Windows, against transformers 4.57.6, the tokenizers themselves, and plain references; their cache; the collator."""

import copy
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, DistilBertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from qa import windows
from qa.columns import write_arrow
from qa.read_squad import EXAMPLE_FEATURES
from qa.windows import (
    QADataCollator,
    WindowSettings,
    data_limits,
    features_fingerprint,
    keep_negative_windows,
    make_features,
)
from utils_qa import AnswerSettings, postprocess_qa_predictions

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("features.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    return tmp_path / "datasets"


def on_disk(examples: Dataset) -> Dataset:
    path = Path(datasets.config.HF_DATASETS_CACHE, f"{examples._fingerprint}.arrow")
    write_arrow(str(path), examples.features, [examples.data.table])
    return Dataset.from_file(str(path))


def golden_examples() -> Dataset:
    """As a selection, of which neither the table nor its order are what is asked for."""
    stored = on_disk(make_examples(tuple(example.values()) for example in reversed(GOLDEN["examples"])))
    return stored.select(range(len(stored) - 1, -1, -1))


def golden_tokenizer(tokenizer_class=BertTokenizer):
    return tokenizer_class(vocab={token: i for i, token in enumerate(GOLDEN["vocabulary"])})


def golden_features(*setting: int, **options) -> Dataset:
    return make_features(golden_examples(), golden_tokenizer(), WindowSettings(*setting), **options)


def byte_level_bpe(pre_tokenizer=None, alphabet=None) -> Tokenizer:
    """Trained on little text, so that most characters outside ASCII stay several tokens of one byte each."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([example["context"] for example in GOLDEN["examples"][:20]], trainer)
    return tokenizer


def roberta_tokenizer():
    model = json.loads(byte_level_bpe().to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def with_template(backend: Tokenizer, post_processor=None):
    backend.post_processor = post_processor or processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )


def modernbert_tokenizer():
    """As the hub's (and DeBERTa's): byte-level BPE, tokens with the space before them, BERT's template."""
    return with_template(byte_level_bpe())


def robbert_tokenizer():
    """As the hub's: its pre-tokenizer drops the space that its post-processor takes for one to trim."""
    space = {"add_prefix_space": True}
    parts = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(**space), pre_tokenizers.Punctuation()]
    backend = byte_level_bpe(pre_tokenizers.Sequence(parts))
    return with_template(backend, processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, **space))


def metaspace_tokenizer():
    """As SentencePiece's: a space is a letter of the word after it."""
    return with_template(byte_level_bpe(pre_tokenizers.Metaspace(), alphabet=[chr(code) for code in range(33, 127)]))


TOKENIZERS = {
    "bert": golden_tokenizer,
    "bert of single characters": lambda: uncased_tokenizer(),
    "distilbert": lambda: golden_tokenizer(DistilBertTokenizer),
    "roberta": roberta_tokenizer,
    "modernbert": modernbert_tokenizer,
    "robbert": robbert_tokenizer,
    "metaspace": metaspace_tokenizer,
}
TOKENIZERS_MADE = {}  # by the property tests, which would make one for each example


def token_characters(tokenizer, text: str) -> list[tuple[int, int]]:
    """Each token's characters without white space around them, and after them the combining marks that are in no token.

    A token of nothing else has none: it starts where the next one does and ends where the one before it does.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None  # it trims in its own way
    spans = []
    for start, end in backend.encode(text, add_special_tokens=False).offsets:
        while start < len(text) and text[start].isspace():
            start += 1
        while end > 0 and text[end - 1].isspace():
            end -= 1
        spans.append((start, end))
    in_tokens = {character for span in spans for character in range(*span)}
    whole = []
    for start, end in spans:
        while (
            start < end < len(text) and end not in in_tokens and unicodedata.category(text[end]) in ("Mn", "Mc", "Me")
        ):
            end += 1
        whole.append((start, end))
    return whole


def labels(window: dict) -> tuple[int, int]:
    return window["start_positions"], window["end_positions"]


def windows_by_example(features: Dataset, num_examples: int) -> list[list[dict]]:
    windows = [[] for _ in range(num_examples)]
    for window in features:
        windows[window["example_index"]].append(window)
    return windows


# ---- Windows and labels against transformers 4.57.6


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
    ours = windows_by_example(make_features(examples, tokenizer, setting), len(examples))
    golden = {example["id"]: [] for example in GOLDEN["examples"]}
    for window in GOLDEN["windows"][number]:
        golden[window["id"]].append(window)

    no_window, inexact = [], []
    for example, our_windows in zip(examples, ours, strict=True):
        their_windows = golden[example["id"]]
        if not their_windows:
            no_window.append(example["id"])
            (window,) = our_windows
            expected = tokenizer([example["question"]], [""])
            assert window["input_ids"] == expected["input_ids"][0]
            assert window["token_type_ids"] == expected["token_type_ids"][0]
            assert labels(window) == (0, 0)
            continue
        for window, their in zip(our_windows, their_windows, strict=True):
            assert window["input_ids"] == their["input_ids"], example["id"]
            assert "".join(map(str, window["token_type_ids"])) == their["token_type_ids"], example["id"]
            assert window["length"] == len(their["input_ids"])
            label, their_label = labels(window), (their["start_position"], their["end_position"])
            if label == their_label:
                continue
            inexact.append(example["id"])
            assert label[0] > 0, example["id"]
            (start,), (answer,) = example["answers"]["answer_start"], example["answers"]["text"]
            char_start = window["char_starts"][label[0] - window["context_start"]]
            char_end = window["char_ends"][label[1] - window["context_start"]]
            assert char_start < start or start + len(answer) < char_end, example["id"]
            assert their_label == (0, 0) or (their_label[0] <= label[0] and label[1] <= their_label[1])
    assert no_window == ["empty context", "context of spaces"]
    assert len(set(inexact)) <= 4


def answer_tokens(example, spans: list[tuple[int, int]]) -> list[int]:
    """Which of the context's tokens share a character with the first answer."""
    answers = example["answers"]
    answers = zip(answers["answer_start"][:1], answers["text"][:1], strict=True)
    return [
        k
        for start, text in answers
        for k, span in enumerate(spans)
        if max(span[0], start) < min(span[1], start + len(text))
    ]


def expected_labels(window: dict, first_token: int, answer: list[int]) -> tuple[int, int]:
    """first_token: the window's first context token. answer: as `answer_tokens` gives it."""
    if not answer or answer[0] < first_token or answer[-1] >= first_token + len(window["char_starts"]):
        return 0, 0
    return tuple(window["context_start"] + token - first_token for token in (answer[0], answer[-1]))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_is_whole_words_whatever_the_tokenizer_does_with_spaces(name):
    tokenizer, context = TOKENIZERS[name](), "in  Warsaw born \u3000the old\tking\n1895 won "
    as_loaded = tokenizer.backend_tokenizer.to_str()
    golds = [(word.start(i), word[i]) for word in re.finditer(r"\s*(\S+)\s*", context) for i in (0, 1)]
    rows = [(str(i), "who", context, gold, start) for i, (start, gold) in enumerate(golds)]
    examples = make_examples(rows)
    features = make_features(examples, tokenizer, WindowSettings())
    assert tokenizer.backend_tokenizer.to_str() == as_loaded
    for window in features:
        first, last = (label - window["context_start"] for label in labels(window))
        answer = context[window["char_starts"][first] : window["char_ends"][last]]
        assert answer == golds[window["example_index"]][1].strip()

    logits = np.random.default_rng(0).normal(size=(2, len(features), max(features["length"])))
    for n_best in postprocess_qa_predictions(examples, features, logits, AnswerSettings()).n_best.values():
        for each in n_best:
            assert each["text"] == context[each["start"] : each["end"]] == each["text"].strip()
            assert each["start"] <= each["end"]


def test_answer_of_whitespace_or_dropped_characters(caplog):
    context = "the  king\u200b won"
    rows = [("1", "who", context, "  ", 3), ("2", "who", context, " king\u200b", 4), ("3", "who", context, "\u200b", 9)]
    features = make_features(make_examples(rows), golden_tokenizer(), WindowSettings())
    king = features[1]["input_ids"].index(golden_tokenizer().convert_tokens_to_ids("king"))
    assert [labels(window) for window in features] == [(0, 0), (king, king), (0, 0)]
    assert features["answer_length"][:] == [0, 1, 0]
    assert "2 answers are made of characters that the tokenizer drops" in caplog.text
    assert "[UNK]" not in caplog.text


def test_a_text_that_the_tokenizer_cannot_read_is_named(caplog):
    rows = [("1", "who", "the king was born", "", 0), ("2", "who", "กษัตริย์ ประสูติ the", "", 0)]
    make_features(make_examples(rows), golden_tokenizer(), WindowSettings())
    assert "28.6% of the contexts' tokens are [UNK], of which a model reads nothing: use one" in caplog.text


# ---- Any tokenizer, against its own way to cut a pair into overlapping windows, on texts that nobody thought of

TEXT_PIECES = st.one_of(
    st.sampled_from(
        "the king of and was born old 1895 Quentin café cafe\u0301 東京 😀 👩\u200d🎨 don't U.S. [SEP] </s>".split()
    ),
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u202f", "\u3000", "\u200b", "-", "—", ".", "(", "\x00"]
    ),
    st.text(max_size=6),
    st.text("ab é\u0301\u0323\u093e\u0947\u20dd\u200d.\u2603\ufe0f", max_size=20),
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


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=examples_and_settings())
@hypothesis.example(([("0", "", " and", " a", 0)], WindowSettings(6, 1, 1)))  # RoBERTa's token of the space is empty
def test_windows_are_the_tokenizers_own_and_labels_the_tokens_of_the_answer(name, case):
    rows, setting = case
    tokenizer = TOKENIZERS_MADE.setdefault(name, TOKENIZERS[name]())
    examples = make_examples(rows)
    ours = windows_by_example(make_features(examples, tokenizer, setting), len(examples))
    for example, our_windows in zip(examples, ours, strict=True):
        whole = tokenizer(example["context"], add_special_tokens=False)
        spans = token_characters(tokenizer, example["context"])
        answer = answer_tokens(example, spans)
        covered = set()
        for i, window in enumerate(our_windows):
            assert window["length"] == len(window["input_ids"]) <= setting.max_seq_length
            number = len(window["char_starts"])
            here = slice(i * setting.doc_stride, i * setting.doc_stride + number)
            context_start = window["context_start"]
            assert window["input_ids"][context_start : context_start + number] == whole["input_ids"][here]
            assert list(zip(window["char_starts"], window["char_ends"], strict=True)) == spans[here]
            assert labels(window) == expected_labels(window, here.start, answer)
            assert window["answer_length"] == (answer[-1] - answer[0] + 1 if answer else 0)
            covered |= set(range(here.start, here.stop))
        assert covered == set(range(len(spans)))
        if window["question_length"] <= setting.max_query_length:
            assert_the_tokenizers_own(our_windows, example, tokenizer, setting)


def assert_the_tokenizers_own(windows: list[dict], example: dict, tokenizer, setting: WindowSettings) -> None:
    question = example["question"].lstrip()
    question_length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = setting.max_seq_length - question_length - tokenizer.num_special_tokens_to_add(pair=True)
    expected = tokenizer(
        [question],
        [example["context"]],
        truncation="only_second",
        max_length=setting.max_seq_length,
        stride=room - setting.doc_stride,
        return_overflowing_tokens=True,
    )
    assert len(windows) == len(expected["input_ids"])
    for i, window in enumerate(windows):
        assert window["question_length"] == question_length
        assert ("token_type_ids" in window) == ("token_type_ids" in expected)
        for name in ("input_ids", "token_type_ids"):
            assert name not in expected or window[name] == expected[name][i]
        positions = [k for k, sequence in enumerate(expected.sequence_ids(i)) if sequence == 1]
        assert positions == list(range(window["context_start"], window["context_start"] + len(window["char_starts"])))


# ---- Letters with combining marks, which some tokenizers drop

MARKED = {  # the answer is the word in brackets
    "Hindi": "कोच [जॉन एलवे] थे।",
    "Hindi, at the end": "कोच [जॉन एलवे]",
    "Hebrew": "[שָׁלוֹם] רב",
    "Vietnamese, decomposed": unicodedata.normalize("NFD", "ở [Hà Nội], Việt"),
    "two marks": "an [e\u0323\u0302] here",
    "enclosing mark": "number [7\u20dd] of",
}


def uncased_tokenizer(strip_accents: bool = True) -> BertTokenizer:
    """WordPieces of one character each, for all that the texts come to without their marks, and with them."""
    text = "".join(MARKED.values()) + "why?"
    characters = sorted(set(unicodedata.normalize("NFD", text).lower() + text.lower()) - {" "})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, strip_accents=strip_accents)


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("strip_accents", [True, False])
def test_an_answer_has_its_last_mark(strip_accents, name):
    before, answer, after = re.split(r"[\[\]]", MARKED[name])
    tokenizer, context = uncased_tokenizer(strip_accents), before + answer + after
    examples = make_examples([("1", "why?", context, answer, len(before))])
    holding = [w for w in make_features(examples, tokenizer, WindowSettings(20, 4, 8)) if labels(w)[0]]
    assert holding
    for window in holding:
        first, last = (label - window["context_start"] for label in labels(window))
        assert context[window["char_starts"][first] : window["char_ends"][last]] == answer
    plain = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    dropped = strip_accents and unicodedata.category(answer[-1]) == "Mn"
    assert (plain[-1][1] < len(answer)) == dropped  # what the tokenizer alone would say


# ---- Windows without an answer, and what the data cannot give


def test_negative_windows():
    features = golden_features(64, 16, 24)
    hold = [i for i, start in enumerate(features["start_positions"]) if start > 0]
    numbered = features.add_column("number", list(range(len(features))))
    for share in (0.0, 0.1, 0.5, 1.0):
        kept = keep_negative_windows(numbered, share, seed=1)["number"][:]
        assert kept == sorted(kept) and [i for i in kept if i in hold] == hold
        assert len(kept) - len(hold) == round(share * (len(features) - len(hold)))
        assert keep_negative_windows(numbered, share, seed=1)["number"][:] == kept
    half, other_half = (keep_negative_windows(numbered, 0.5, seed)["number"][:] for seed in (1, 2))
    assert half != other_half


def test_negative_windows_of_which_none_is_left():
    examples = make_examples([("1", "who", "the king", "", 0)])
    features = make_features(examples, golden_tokenizer(), WindowSettings())
    assert len(keep_negative_windows(features, 1.0, 0)) == 1
    with pytest.raises(ValueError, match="--negative_windows 0.0 leaves nothing to train on: no window holds"):
        keep_negative_windows(features, 0.0, 0)


def test_limits_of_the_data():
    rows = [
        ("1", "who who who", "the king " * 40, "king the king", 4),
        ("2", "who", "the king was old", "king", 4),
        ("3", "who", "the king " * 40, "the king " * 20, 0),
    ]
    examples, tokenizer, setting = make_examples(rows), golden_tokenizer(), WindowSettings(30, 10, 2)
    features = make_features(examples, tokenizer, setting)
    assert data_limits(features, 2, 2) == [
        "2 of 3 (66.7%) questions have a context longer than one window",
        "1 of 3 (33.3%) questions are cut at --max_query_length 2",
        "2 of 3 (66.7%) answers are longer than --max_answer_length 2 and can never be given",
        "1 of 3 (33.3%) answers lie in no window as a whole and can never be given",
    ]
    assert data_limits(features, 40, 3) == [line for line in data_limits(features, 2, 2) if "window" in line]
    assert data_limits(make_features(examples.select([1]), tokenizer, setting), 2, 2) == []
    to_predict = make_features(examples.remove_columns("answers"), tokenizer, setting)
    assert len(data_limits(to_predict, 2, 2)) == 2
    assert not {"start_positions", "end_positions", "answer_length"} & set(to_predict.column_names)


def test_of_several_answers_the_shortest_has_the_length_and_the_first_the_labels():
    (row,) = make_examples([("1", "who", "the old king was born", "old king was", 4)])
    row["answers"] = {"text": ["old king was", "king", " ", "old king"], "answer_start": [4, 8, 3, 4]}
    features = make_features(Dataset.from_list([row], EXAMPLE_FEATURES), golden_tokenizer(), WindowSettings())
    assert features["answer_length"][:] == [1]
    assert [token - features[0]["context_start"] for token in labels(features[0])] == [1, 3]


# ---- What is refused


def test_doc_stride_that_leaves_tokens_uncovered():
    examples = make_examples([("1", "who " * 9, "the king " * 40, "", 0), ("2", "who", "the king", "", 0)])
    tokenizer = golden_tokenizer()
    make_features(examples, tokenizer, WindowSettings(40, 28, 30))
    make_features(examples, tokenizer, WindowSettings(40, 33, 4))
    with pytest.raises(ValueError, match=r"--doc_stride 29 .* \(9 tokens\) leaves 28 of --max_seq_length 40"):
        make_features(examples, tokenizer, WindowSettings(40, 29, 30))
    with pytest.raises(ValueError, match=r"--doc_stride 1 .* leaves 0 of --max_seq_length 8"):
        make_features(examples, tokenizer, WindowSettings(8, 1))


def test_settings_below_one_and_no_questions():
    for name in ("max_seq_length", "doc_stride", "max_query_length"):
        with pytest.raises(ValueError, match=f"--{name} is 0, must be at least 1"):
            WindowSettings(**{name: 0})
    with pytest.raises(ValueError, match="no question"):
        make_features(make_examples([]), golden_tokenizer(), WindowSettings())


# ---- Cache


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*features*"))


@dataclass
class AllFlags(WindowSettings):
    """As the flags of the program, of which windows are a part."""

    train_file: str = "train.json"


def test_second_run_reads_the_cache(datasets_cache, monkeypatch):
    first = golden_features()
    (path,) = cache_files(datasets_cache)
    used = golden_tokenizer()
    used("use it", padding="max_length", max_length=5, truncation=True)  # changes its state and its pickle
    examples = golden_examples().select(range(len(first.unique("example_index"))))
    with monkeypatch.context() as patch:
        patch.setattr(windows, "_tokenize", None)
        assert make_features(examples, used, AllFlags())[:] == first[:]
    used("use it", padding="max_length", max_length=5, truncation=True)
    inode = path.stat().st_ino
    assert make_features(examples, used, WindowSettings(), overwrite_cache=True)[:] == first[:]
    assert cache_files(datasets_cache) == [path] and path.stat().st_ino != inode


def test_an_edit_of_the_program_makes_new_features(datasets_cache, tmp_path, monkeypatch):
    """With the same fingerprint, so that a run goes on that was begun before the edit."""
    first = golden_features()
    edited = tmp_path / "windows.py"
    edited.write_bytes(Path(windows.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(windows, "__file__", str(edited))
    assert features_fingerprint(golden_features()) == features_fingerprint(first)
    assert len(cache_files(datasets_cache)) == 2


def test_any_change_makes_new_features_and_another_fingerprint(datasets_cache):
    row = ("1", "who was born", "the king was born in the old city of the river king", "king", 4)
    tokenizer, setting = golden_tokenizer(), WindowSettings(14, 5, 3)
    other_vocabulary = {token: i for i, token in enumerate(reversed(GOLDEN["vocabulary"]))}

    def asked_of(*contexts: str) -> list[tuple]:
        return [(str(i), "who", context, "", 0) for i, context in enumerate(contexts)]

    rows_of_variants = [
        [row],
        [("1", "who was old", *row[2:])],
        [(*row[:2], "the king was old", *row[3:])],
        [(*row[:3], "was", 9)],
        [(*row[:3], "", 0)],
        [row, ("2", *row[1:])],
        *(asked_of(*contexts) for contexts in ("aba", "abb", "baa")),  # the same texts in other rows
        *(asked_of(*contexts) for contexts in (("the king", "was"), ("the ", "kingwas"))),  # the same bytes, end to end
    ]
    variants = [
        *((make_examples(rows), tokenizer, setting) for rows in rows_of_variants),
        (make_examples([row]).remove_columns("answers"), tokenizer, setting),
        (make_examples([row]), BertTokenizer(vocab=other_vocabulary), setting),
        (make_examples([row]), golden_tokenizer(DistilBertTokenizer), setting),
        *((make_examples([row]), tokenizer, WindowSettings(*other)) for other in ((13, 5, 3), (14, 4, 3), (14, 5, 2))),
    ]
    fingerprints = set()
    for count, variant in enumerate(variants, start=1):
        examples, *how = variant
        fingerprints.add(features_fingerprint(make_features(on_disk(examples), *how)))
        assert len(cache_files(datasets_cache)) == count, f"variant {count} took the features of another"
        assert len(fingerprints) == count, f"variant {count} has the fingerprint of another"
    # ids and titles are in no feature
    make_features(on_disk(make_examples([("other", *row[1:])])), tokenizer, setting)
    assert len(cache_files(datasets_cache)) == len(variants)


def test_fingerprint_is_of_the_rows_however_they_are_stored():
    features = golden_features(64, 16, 24)
    part = features.select(range(7, 30))
    backwards = part.select(range(len(part) - 1, -1, -1))
    copied = Dataset.from_list(part.to_list(), features=features.features)
    assert features_fingerprint(part) == features_fingerprint(copied) != features_fingerprint(features)
    assert features_fingerprint(backwards) != features_fingerprint(part)
    assert features_fingerprint(backwards.select(range(len(part) - 1, -1, -1))) == features_fingerprint(part)


def test_processes_and_batches_change_nothing(datasets_cache, monkeypatch):
    features = golden_features(64, 16, 24)
    (path,) = cache_files(datasets_cache)
    rows, alone = features[:], path.read_bytes()
    golden_features(64, 16, 24, num_proc=2, overwrite_cache=True)
    assert path.read_bytes() == alone
    monkeypatch.setattr(windows, "BYTES_PER_BATCH", 1)
    monkeypatch.setattr(windows, "WINDOWS_PER_BATCH", 3)
    assert golden_features(64, 16, 24, overwrite_cache=True)[:] == rows


# ---- Collator


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_collator_pads_as_the_tokenizer(name):
    tokenizer = TOKENIZERS[name]()
    features = make_features(golden_examples(), tokenizer, WindowSettings(64, 16, 24))
    rows = [{**features[i], "window": i} for i in (0, 30, 5)]
    inputs = [{key: row[key] for key in ("input_ids", "token_type_ids") if key in row} for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for options, padding in [
        ({}, {"padding": "longest"}),
        ({"pad_to_multiple_of": 8}, {"padding": "longest", "pad_to_multiple_of": 8}),
        ({"pad_to_max_length": 70}, {"padding": "max_length", "max_length": 70}),
    ]:
        batch = QADataCollator(tokenizer, **options)(rows)
        expected = dict(tokenizer.pad(inputs, return_tensors="pt", **padding))
        for key in ("start_positions", "end_positions", "window"):
            expected[key] = torch.tensor([row[key] for row in rows])
        assert batch.keys() == expected.keys()
        for key in expected:
            assert batch[key].dtype == torch.int64 and torch.equal(batch[key], expected[key]), key
    to_predict = {key: rows[0][key] for key in ("input_ids", "example_index")}
    assert QADataCollator(tokenizer)([to_predict]).keys() == {"input_ids", "attention_mask"}
