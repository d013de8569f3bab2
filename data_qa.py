"""SQuAD in, windows out.

Examples come from the hub or from files in any SQuAD layout (`load_examples`). `make_train_features` and
`make_features` turn them into windows of question and context that fit the model: every distinct context and question
is tokenized once, the windows are sliced with NumPy from flat token arrays, and the result is cached as Arrow on disk.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import reprlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

import hub
from utils_qa import one_line

logger = logging.getLogger(__name__)

# Part of every cache file's name: raise them when the code below makes something else of the same input.
READER_VERSION = 1
FEATURES_VERSION = 2

TEXTS_PER_BATCH = 1000  # texts in one call of the tokenizer
WINDOWS_PER_BATCH = 8192  # windows sliced at once; bounds the memory of the index arrays
ROWS_PER_RECORD_BATCH = 1000  # as datasets writes them

EXAMPLE_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load_examples(
    dataset_name: str | None,
    dataset_config_name: str | None,
    files: dict[str, str | None],
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Dataset]:
    """Examples of each split ("train", "validation", "test") from the hub, from files, or from both.

    `files` maps a split to a path; a file takes the place of the hub dataset's split of that name. Every split has the
    columns of `EXAMPLE_FEATURES`, "answers" only where the source has gold answers.

    Raises ValueError: the dataset is not found or has other columns, a file is not SQuAD, a split holds no question.
    """
    splits = _load_hub_dataset(dataset_name, dataset_config_name, cache_dir, token) if dataset_name else {}
    for split, path in files.items():
        if path is not None:
            splits[split] = read_squad_file(path, cache_dir)
    return splits


def _load_hub_dataset(name: str, config_name: str | None, cache_dir: str | None, token) -> dict[str, Dataset]:
    what = f"--dataset_name {name}: cannot be loaded from the hub or its cache"
    with hub.loading(what, name, "dataset", token=token, cache_dir=cache_dir) as id_:
        dataset_splits = datasets.load_dataset(id_, config_name, cache_dir=cache_dir, token=token)
    return {
        split: _conform_hub_split(dataset, f"{name} ({split})")
        for split, dataset in dataset_splits.items()
        if split in ("train", "validation", "test")
    }


def _conform_hub_split(dataset: Dataset, source: str) -> Dataset:
    """The columns of EXAMPLE_FEATURES, in their types; "title" may be missing, and "answers" where there are none."""
    for column in ("id", "context", "question"):
        if column not in dataset.column_names:
            raise ValueError(f'{source}: no column "{column}"; found {", ".join(dataset.column_names)}')
    if len(dataset) == 0:
        raise ValueError(f"{source}: holds no question")
    if "title" not in dataset.column_names:
        dataset = dataset.add_column("title", pa.array([""] * len(dataset)))
    features = Features({name: kind for name, kind in EXAMPLE_FEATURES.items() if name in dataset.column_names})
    dataset = dataset.select_columns(list(features))
    if dataset.features != features:
        try:
            dataset = dataset.cast(features)
        except (pa.ArrowInvalid, TypeError, ValueError) as error:
            raise ValueError(f"{source}: its columns are not those of SQuAD: {' '.join(str(error).split())}") from error
    _check_hub_rows(dataset.with_format("arrow")[:], source)
    return dataset


def _check_hub_rows(table: pa.Table, source: str) -> None:
    for column in table.column_names:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise ValueError(f'{source}: row {row} has no value in column "{column}"')
    if pc.count_distinct(table["id"]).as_py() < len(table):
        counts = pc.value_counts(table["id"])
        duplicate = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(f"{source}: id {duplicate!r} stands more than once")
    if "answers" in table.column_names:
        texts, starts = (pc.struct_field(table["answers"], name) for name in ("text", "answer_start"))
        uneven = pc.not_equal(pc.list_value_length(texts), pc.list_value_length(starts))
        row = pc.index(pc.fill_null(uneven, True), True).as_py()
        if row >= 0:
            raise ValueError(f"{source}: row {row} has not as many answer_starts as answer texts")
        for name, values in (("text", texts), ("answer_start", starts)):
            if pc.list_flatten(values).null_count:
                raise ValueError(f'{source}: column "answers" has an answer without "{name}"')


def read_squad_file(path: str, cache_dir: str | None = None) -> Dataset:
    """Examples of one file: columns id, title, context, question and, where the file has gold answers, answers.

    Layouts: SQuAD's own (`{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}`), flat rows (`{"data":
    [{"id", "context", "question", "answers"}]}`), a list of flat rows, and JSON lines of flat rows. `is_impossible`
    (SQuAD 2.0) gives empty answers. The result is kept in `cache_dir` (default: the datasets cache) under the sha256 of
    the file's bytes.

    Raises ValueError of one line that names the file and the place in it.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    name = f"squad-{hashlib.sha256(content).hexdigest()[:32]}-v{READER_VERSION}.arrow"
    cache_path = os.path.join(os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE), "squad_files", name)
    if not os.path.exists(cache_path):
        table = _parse_squad(content, path)
        features = Features({name: EXAMPLE_FEATURES[name] for name in table.column_names})
        _write_arrow(cache_path, features, [table])
    return Dataset.from_file(cache_path)


def _parse_squad(content: bytes, path: str) -> pa.Table:
    rows: dict[str, list] = {name: [] for name in ("id", "title", "context", "question", "answers")}
    places: dict[str, str] = {}
    for row, place in _squad_rows(_parse_json(content, path), path):
        id_ = row[0]
        if id_ in places:
            raise ValueError(f"{path}: {place}: id {_shown(id_)} is already the id of {places[id_]}")
        places[id_] = place
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
    if not places:
        raise ValueError(f"{path}: holds no question")
    answers = rows.pop("answers")
    table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
    if all(answer is None for answer in answers):
        return table
    if any(answer is None for answer in answers):
        place = places[rows["id"][next(i for i, answer in enumerate(answers) if answer is None)]]
        raise ValueError(f'{path}: {place}: missing key "answers", which other questions of the file have')
    offsets = np.cumsum([0] + [len(answer) for answer in answers], dtype=np.int32)
    texts, starts = zip(*chain.from_iterable(answers), strict=True) if offsets[-1] else ((), ())
    struct = pa.StructArray.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(texts, pa.string())),
            pa.ListArray.from_arrays(offsets, pa.array(starts, pa.int32())),
        ],
        names=["text", "answer_start"],
    )
    return table.append_column("answers", struct)


def _parse_json(content: bytes, path: str) -> Any:
    """The file's JSON value, or an iterator over the values of its lines."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start}: not UTF-8 text") from error
    if not text or text.isspace():
        raise ValueError(f"{path}: is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().count("\n") == 0:
            return _parse_json_lines(text, path)
        raise ValueError(f"{path}: line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: JSON that cannot be read: {one_line(error)}") from error


def _parse_json_lines(text: str, path: str) -> Iterator[Any]:
    for number, line in enumerate(re.finditer(r"[^\n]*\n?", text), start=1):
        if line[0] and not line[0].isspace():
            try:
                yield json.loads(line[0])
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} column {error.colno}: not JSON: {error.msg}") from error
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{path}: line {number}: JSON that cannot be read: {one_line(error)}") from error


def _squad_rows(root: Any, path: str) -> Iterator[tuple[tuple, str]]:
    """Yields ((id, title, context, question, answers), place): answers is a list of (text, start), or None."""
    if isinstance(root, dict):
        if "data" in root:
            items, name = _typed(root["data"], list, "data", path), "data[{}]"
        elif "context" in root:
            items, name = [root], "row {}"
        else:
            raise ValueError(f'{path}: missing key "data": neither the layout of SQuAD nor flat rows')
    else:
        items, name = root if isinstance(root, Iterator) else _typed(root, list, "the file", path), "row {}"
    for i, item in enumerate(items):
        place = name.format(i)
        _typed(item, dict, place, path)
        title = "" if item.get("title") is None else _string(item, "title", place, path)
        if "paragraphs" in item:
            for j, paragraph in enumerate(_typed(item["paragraphs"], list, f"{place}.paragraphs", path)):
                yield from _paragraph_rows(paragraph, title, f"{place}.paragraphs[{j}]", path)
        elif "context" in item:
            context = _string(item, "context", place, path)
            yield _question_row(item, title, context, place, path), place
        else:
            raise ValueError(f'{path}: {place}: missing key "paragraphs" (layout of SQuAD) or "context" (flat rows)')


def _paragraph_rows(paragraph: Any, title: str, place: str, path: str) -> Iterator[tuple[tuple, str]]:
    _typed(paragraph, dict, place, path)
    context = _string(paragraph, "context", place, path)
    for k, question in enumerate(_typed(_required(paragraph, "qas", place, path), list, f"{place}.qas", path)):
        question_place = f"{place}.qas[{k}]"
        _typed(question, dict, question_place, path)
        yield _question_row(question, title, context, question_place, path), question_place


def _question_row(item: dict, title: str, context: str, place: str, path: str) -> tuple:
    id_ = _required(item, "id", place, path)
    id_ = str(id_) if type(id_) is int else _string(item, "id", place, path)
    question = _string(item, "question", place, path)
    if item.get("is_impossible") is not None and _typed(item["is_impossible"], bool, f"{place}.is_impossible", path):
        answers = []
    elif item.get("answers") is None:
        answers = None
    else:
        answers = _answers(item["answers"], f"{place}.answers", path)
    return id_, title, context, question, answers


def _answers(value: Any, place: str, path: str) -> list[tuple[str, int]]:
    """Either {"text": [...], "answer_start": [...]} or [{"text", "answer_start"}, ...]."""
    if isinstance(value, dict):
        texts = _typed(_required(value, "text", place, path), list, f"{place}.text", path)
        starts = _typed(_required(value, "answer_start", place, path), list, f"{place}.answer_start", path)
        if len(texts) != len(starts):
            raise ValueError(f"{path}: {place}: {len(texts)} texts but {len(starts)} answer_starts")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    answers = []
    for i, answer in enumerate(_typed(value, list, place, path)):
        answer_place = f"{place}[{i}]"
        _typed(answer, dict, answer_place, path)
        text = _string(answer, "text", answer_place, path)
        start = _typed(_required(answer, "answer_start", answer_place, path), int, f"{answer_place}.answer_start", path)
        if not -(2**31) <= start < 2**31:
            raise ValueError(f"{path}: {answer_place}.answer_start: {_shown(start)} is outside every text")
        answers.append((text, start))
    return answers


def _shown(value: Any) -> str:
    """The beginning of a value for a message, however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}


def _required(item: dict, key: str, place: str, path: str) -> Any:
    if key not in item:
        raise ValueError(f'{path}: {place}: missing key "{key}"')
    return item[key]


def _typed(value: Any, kind: type, place: str, path: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path}: {place}: must be {JSON_NAMES[kind]}, is {_shown(value)}")
    return value


def _string(item: dict, key: str, place: str, path: str) -> str:
    value = _typed(_required(item, key, place, path), str, f"{place}.{key}", path)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: {place}.{key}: character {error.start} is half of a surrogate pair") from error
    return value


def drop_misplaced_answers(examples: Dataset, source: str) -> Dataset:
    """Training examples without those whose (first) answer is empty or does not stand at its answer_start.

    Logs their count and first ids. Raises ValueError when `examples` has no answers or none remain.
    """
    if "answers" not in examples.column_names:
        raise ValueError(f'{source}: missing key "answers": without gold answers it cannot be trained on')
    misplaced, misplaced_ids = [], []
    for batch in examples.select_columns(["id", "context", "answers"]).with_format("arrow").iter(4096):
        rows = zip(*(batch[name].to_pylist() for name in ("id", "context", "answers")), strict=True)
        for id_, context, answers in rows:
            wrong = False
            if answers["text"]:
                text, start = answers["text"][0], answers["answer_start"][0]
                wrong = not text or start < 0 or not context.startswith(text, start)
            misplaced.append(wrong)
            if wrong:
                misplaced_ids.append(id_)
    if not misplaced_ids:
        return examples
    logger.warning(
        f"{source}: {len(misplaced_ids)} of {len(examples)} questions are left out of training, because the answer's "
        f"text does not stand at its answer_start; first ids: {', '.join(misplaced_ids[:5])}"
    )
    if len(misplaced_ids) == len(examples):
        raise ValueError(f"{source}: no question's answer stands at its answer_start; nothing to train on")
    return examples.select(np.flatnonzero(~np.array(misplaced)))


# ----------------------------------------------------------------------------------------------------------------------
# Features


@dataclass(frozen=True)
class WindowSettings:
    """How a context is cut into windows; all three count tokens.

    `doc_stride` is the step from one window's start to the next in the context, as in the original BERT.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"--{field.name} {getattr(self, field.name)}: must be at least 1")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer that is slow, pads on the left or has no padding token."""
    name = f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'no name'}"
    if not tokenizer.is_fast:
        raise ValueError(f"{name} is a slow tokenizer: it gives no character offsets; use a model with a fast one")
    if tokenizer.padding_side != "right":
        raise ValueError(f"{name} pads on the {tokenizer.padding_side}: use a model whose tokenizer pads on the right")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name} has no padding token: use a model whose tokenizer has one")


def make_train_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    windows: WindowSettings,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    desc: str = "Tokenizing training examples",
) -> Dataset:
    """One row a window, with labels; rows stand in the order of `examples`, and of the windows in each context.

    Columns, unpadded: input_ids list<int32>; token_type_ids list<int8> if the tokenizer's model takes them; length
    int32, the window's tokens; example_index int32, the row in `examples`; start_positions and end_positions int32, the
    first and last token of the first answer, 0 ([CLS]) when it does not lie wholly in the window or there is none.

    `num_proc` processes tokenize and change nothing. The result is read from the cache next to `examples` unless
    `overwrite_cache`. Raises ValueError: no questions, unfit tokenizer, a doc_stride that leaves tokens uncovered.
    """
    return _cached_features(examples, tokenizer, windows, True, num_proc, overwrite_cache, desc)


def make_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    windows: WindowSettings,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    desc: str = "Tokenizing examples",
) -> Dataset:
    """One row a window, with what turns tokens back into text; otherwise as `make_train_features`.

    Instead of labels: context_start int32, the window position of the first context token; char_starts and char_ends
    list<int32>, one entry for each context token of the window: character offsets into the context, end exclusive.
    """
    return _cached_features(examples, tokenizer, windows, False, num_proc, overwrite_cache, desc)


class Texts(NamedTuple):
    """A column of texts: the distinct ones, and for each row which of them it holds."""

    distinct: pa.Array  # (num_distinct,) string
    row: np.ndarray  # (num_rows,) int32


class Tokens(NamedTuple):
    """Tokens of many texts, end to end: text t has the entries from offsets[t] to offsets[t + 1]."""

    offsets: np.ndarray  # (num_texts + 1,) int64
    ids: np.ndarray  # (num_tokens,) int32
    char_starts: np.ndarray  # (num_tokens,) int32
    char_ends: np.ndarray  # (num_tokens,) int32, exclusive


class PairTemplate(NamedTuple):
    """Special tokens around the two texts of a pair: `before` question `between` context `after`."""

    before: np.ndarray  # int32 token ids
    between: np.ndarray
    after: np.ndarray
    before_types: np.ndarray  # int8 token types of the same
    between_types: np.ndarray
    after_types: np.ndarray
    question_type: np.int8
    context_type: np.int8


class Windows(NamedTuple):
    """Which part of which context each window holds; all (num_windows,) int64."""

    example: np.ndarray  # row of the example
    question_length: np.ndarray  # tokens of the question
    start: np.ndarray  # first context token, counted in the whole context
    length: np.ndarray  # context tokens


def _cached_features(examples, tokenizer, windows, labelled, num_proc, overwrite_cache, desc) -> Dataset:
    check_tokenizer(tokenizer)
    if len(examples) == 0:
        raise ValueError("there is no question to make features of")
    columns = ["context", "question", "answers"] if labelled else ["context", "question"]
    table = examples.select_columns(columns).with_format("arrow")[:]
    contexts = _distinct(table["context"])
    # Whitespace before a question takes room from the context and says nothing.
    questions = _distinct(pc.utf8_ltrim_whitespace(table["question"]))
    answer_spans = _first_answer_spans(table["answers"]) if labelled else None

    fingerprint = _fingerprint(contexts, questions, answer_spans, tokenizer, windows)
    files = examples.cache_files
    directory = os.path.dirname(files[0]["filename"]) if files else datasets.config.HF_DATASETS_CACHE
    path = os.path.join(directory, f"cache-{'train' if labelled else 'eval'}-features-{fingerprint}.arrow")
    if overwrite_cache or not os.path.exists(path):
        backend = _plain_backend(tokenizer)
        context_tokens = _tokenize_contexts(contexts.distinct, backend, num_proc, f"{desc} (contexts)")
        question_tokens = _tokenize_questions(questions.distinct, backend, num_proc, f"{desc} (questions)")
        features, tables = _window_tables(
            contexts.row, context_tokens, questions.row, question_tokens, answer_spans, tokenizer, windows
        )
        _write_arrow(path, features, tables)
    return Dataset.from_file(path)


def _distinct(column: pa.ChunkedArray) -> Texts:
    chunks = column.dictionary_encode().chunks  # Arrow gives all chunks the dictionary of the whole column
    return Texts(chunks[0].dictionary, np.concatenate([chunk.indices.to_numpy() for chunk in chunks]))


def _first_answer_spans(answers: pa.ChunkedArray) -> np.ndarray:
    """(num_examples, 2) int64: characters of the first answer, end exclusive; -1, -1 where there is none."""
    answers = answers.combine_chunks()
    texts, starts = answers.field("text"), answers.field("answer_start")
    has_answer = pc.list_value_length(texts).to_numpy() > 0
    first_text = texts.offsets.to_numpy()[:-1][has_answer]
    first_start = starts.offsets.to_numpy()[:-1][has_answer]
    spans = np.full((len(answers), 2), -1, np.int64)
    spans[has_answer, 0] = starts.values.to_numpy()[first_start]
    spans[has_answer, 1] = spans[has_answer, 0] + pc.utf8_length(texts.values).to_numpy()[first_text]
    return spans


def _fingerprint(contexts: Texts, questions: Texts, answer_spans, tokenizer, windows: WindowSettings) -> str:
    """Hash of all that decides the features, however `examples` came to be.

    The tokenizer counts by what it is, not by its pickle, which changes with every other use of it.
    """
    digest = hashlib.sha256()
    for texts in (contexts, questions):
        digest.update(pc.binary_length(texts.distinct).to_numpy())
        digest.update(_utf8_bytes(texts.distinct))
        digest.update(texts.row)
    digest.update(b"" if answer_spans is None else answer_spans)
    settings = [
        FEATURES_VERSION,
        tokenizers.__version__,
        answer_spans is not None,
        dataclasses.astuple(windows),
        tokenizer.model_input_names,
        tokenizer.split_special_tokens,
        _plain_backend(tokenizer).to_str(),
    ]
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:32]


def _utf8_bytes(texts: pa.Array):
    """The texts' UTF-8 bytes, end to end, without a copy."""
    _, offsets, values = texts.buffers()
    offsets = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return b"" if values is None else values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))


def _plain_backend(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the tokenizers library, set to neither cut nor pad."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _tokenize_contexts(texts: pa.Array, backend: tokenizers.Tokenizer, num_proc: int | None, desc: str) -> Tokens:
    ids, char_starts, char_ends = _map_texts(_context_tokens, texts, backend, num_proc, desc)
    offsets = ids.offsets.to_numpy().astype(np.int64)
    return Tokens(offsets, ids.values.to_numpy(), char_starts.values.to_numpy(), char_ends.values.to_numpy())


def _tokenize_questions(texts: pa.Array, backend: tokenizers.Tokenizer, num_proc: int | None, desc: str) -> Tokens:
    (ids,) = _map_texts(_question_tokens, texts, backend, num_proc, desc)
    nowhere = np.zeros(0, np.int32)
    return Tokens(ids.offsets.to_numpy().astype(np.int64), ids.values.to_numpy(), nowhere, nowhere)


def _map_texts(function, texts: pa.Array, backend, num_proc: int | None, desc: str) -> list[pa.ListArray]:
    """The columns that `function` makes of the texts, batch by batch in `num_proc` processes."""
    tokenized = Dataset(pa.table({"text": texts})).map(
        functools.partial(function, backend=backend),
        batched=True,
        batch_size=TEXTS_PER_BATCH,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=["text"],
        new_fingerprint="tokens",  # kept in memory only, so nobody looks for it; saves hashing texts and tokenizer
        desc=desc,
    )
    return [column.combine_chunks() for column in tokenized.data.columns]


# The backend itself tokenizes, because the tokenizer's own call builds Python lists of everything before it returns.


def _context_tokens(batch: dict[str, list[str]], backend: tokenizers.Tokenizer) -> pa.Table:
    encodings = backend.encode_batch(batch["text"], add_special_tokens=False)
    offsets = _offsets([len(encoding) for encoding in encodings])
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, offsets[-1])
    pairs = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    spans = np.fromiter(pairs, np.int32, 2 * offsets[-1]).reshape(-1, 2).T.copy()
    columns = {"input_ids": ids, "char_starts": spans[0], "char_ends": spans[1]}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def _question_tokens(batch: dict[str, list[str]], backend: tokenizers.Tokenizer) -> pa.Table:
    encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)  # without character offsets
    offsets = _offsets([len(encoding) for encoding in encodings])
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, offsets[-1])
    return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)})


def _offsets(lengths) -> np.ndarray:
    """0 and the running sums of `lengths`: where each list starts and ends in an Arrow list array."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _pair_template(tokenizer) -> PairTemplate:
    """What the tokenizer puts around the two texts of a pair, read from a pair that it encodes."""
    pair = tokenizer("a", "a", return_token_type_ids=True, return_attention_mask=False)
    ids, types = np.array(pair["input_ids"], np.int32), np.array(pair["token_type_ids"], np.int8)
    text = np.array([-1 if index is None else index for index in pair.sequence_ids(0)])
    question, context = np.flatnonzero(text == 0), np.flatnonzero(text == 1)
    if len(question) == 0 or len(context) == 0:
        raise ValueError(f"{type(tokenizer).__name__} of {tokenizer.name_or_path} makes no token of the text 'a'")
    parts = slice(None, question[0]), slice(question[-1] + 1, context[0]), slice(context[-1] + 1, None)
    return PairTemplate(
        *(ids[part] for part in parts), *(types[part] for part in parts), types[question[0]], types[context[0]]
    )


def _place_windows(context_lengths, question_lengths, num_special: int, settings: WindowSettings) -> Windows:
    """Window i of an example starts at context token i * doc_stride; its last is the first that reaches the end."""
    question_lengths = np.minimum(question_lengths, settings.max_query_length)
    room = settings.max_seq_length - num_special - question_lengths  # (num_examples,) context tokens of a window
    if settings.doc_stride > room.min():
        raise ValueError(
            f"--doc_stride {settings.doc_stride} would leave tokens of the context outside all windows: the longest "
            f"question ({question_lengths.max()} tokens) leaves {max(room.min(), 0)} of --max_seq_length "
            f"{settings.max_seq_length}; lower --doc_stride or --max_query_length, or raise --max_seq_length"
        )
    num_windows = 1 + -(-np.maximum(context_lengths - room, 0) // settings.doc_stride)  # (num_examples,)
    example = np.repeat(np.arange(len(num_windows)), num_windows)
    number = np.arange(len(example)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    start = number * settings.doc_stride
    length = np.minimum(context_lengths[example] - start, room[example])
    return Windows(example, question_lengths[example], start, length)


def _window_tables(
    context_row, context_tokens: Tokens, question_row, question_tokens: Tokens, answer_spans, tokenizer, settings
):
    """(features, tables): the schema of the windows, and a generator of tables that together hold them all."""
    template = _pair_template(tokenizer)
    before, between, after = len(template.before), len(template.between), len(template.after)
    windows = _place_windows(
        np.diff(context_tokens.offsets)[context_row],
        np.diff(question_tokens.offsets)[question_row],
        before + between + after,
        settings,
    )
    context_start = before + windows.question_length + between
    columns = {"length": context_start + windows.length + after, "example_index": windows.example}
    if answer_spans is None:
        columns["context_start"] = context_start
    else:
        first, last = _answer_tokens(answer_spans, context_row, context_tokens)
        first, last = first[windows.example] - windows.start, last[windows.example] - windows.start
        inside = (first >= 0) & (last < windows.length)
        columns["start_positions"] = np.where(inside, context_start + first, 0)
        columns["end_positions"] = np.where(inside, context_start + last, 0)

    # All tokens that a window can hold, end to end; each window is five ranges of them.
    pool = np.concatenate([template.before, template.between, template.after, question_tokens.ids, context_tokens.ids])
    question_types = np.full(len(question_tokens.ids), template.question_type)
    context_types = np.full(len(context_tokens.ids), template.context_type)
    special_types = (template.before_types, template.between_types, template.after_types)
    pool_types = np.concatenate([*special_types, question_types, context_types])
    first_question_token = question_tokens.offsets[question_row][windows.example]
    first_context_token = context_tokens.offsets[context_row][windows.example] + windows.start
    questions_in_pool = before + between + after
    contexts_in_pool = questions_in_pool + len(question_tokens.ids)
    starts = _columns(
        0, questions_in_pool + first_question_token, before, contexts_in_pool + first_context_token, before + between
    )
    lengths = _columns(before, windows.question_length, between, windows.length, after)  # (num_windows, 5), as starts

    with_types = "token_type_ids" in tokenizer.model_input_names
    features = {"input_ids": List(Value("int32"))}
    if with_types:
        features["token_type_ids"] = List(Value("int8"))
    features |= {name: Value("int32") for name in columns}
    if answer_spans is None:
        features |= {"char_starts": List(Value("int32")), "char_ends": List(Value("int32"))}

    def tables():
        for low in range(0, len(windows.example), WINDOWS_PER_BATCH):
            batch = slice(low, low + WINDOWS_PER_BATCH)
            table = {name: pa.array(values[batch], pa.int32()) for name, values in columns.items()}
            tokens, offsets = _ranges(starts[batch].ravel(), lengths[batch].ravel()), _offsets(table["length"])
            table["input_ids"] = pa.ListArray.from_arrays(offsets, pool[tokens])
            if with_types:
                table["token_type_ids"] = pa.ListArray.from_arrays(offsets, pool_types[tokens])
            if answer_spans is None:
                length = windows.length[batch]
                tokens, offsets = _ranges(first_context_token[batch], length), _offsets(length)
                table["char_starts"] = pa.ListArray.from_arrays(offsets, context_tokens.char_starts[tokens])
                table["char_ends"] = pa.ListArray.from_arrays(offsets, context_tokens.char_ends[tokens])
            yield pa.table({name: table[name] for name in features})

    return Features(features), tables()


def _columns(*columns: int | np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _answer_tokens(answer_spans: np.ndarray, context_row: np.ndarray, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(first, last), both (num_examples,): the context tokens that the answer's characters touch, or -1, -1.

    Where several tokens share a character (byte-level BPE) all of them belong to the answer. Characters of the answer
    that are in no token (whitespace, controls) are passed over; an answer of such characters only has no token.
    """
    # One sorted array for all contexts: the character offsets of context c lie in [c * width, (c + 1) * width).
    width = int(max(tokens.char_ends.max(initial=0), answer_spans.max(initial=0))) + 1
    base = np.repeat(np.arange(len(tokens.offsets) - 1) * width, np.diff(tokens.offsets))
    spans = answer_spans + context_row[:, None].astype(np.int64) * width
    holding = np.flatnonzero(tokens.char_starts < tokens.char_ends)  # byte-level BPE's token for a space holds nothing
    first = np.searchsorted((base + tokens.char_ends)[holding], spans[:, 0], side="right")
    last = np.searchsorted((base + tokens.char_starts)[holding], spans[:, 1], side="left") - 1
    touched = (answer_spans[:, 0] >= 0) & (first <= last)
    if missed := np.count_nonzero((answer_spans[:, 0] >= 0) & ~touched):
        logger.warning(f"{missed} answers are made of characters that the tokenizer drops: trained on as no answer")
    begin = tokens.offsets[context_row]
    holding = np.append(holding, 0)  # what lies outside is not touched, but indexed all the same
    return np.where(touched, holding[first] - begin, -1), np.where(touched, holding[last] - begin, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Cache and collator


def _write_arrow(path: str, features: Features, tables: Iterable[pa.Table]) -> None:
    """Writes an Arrow file that `Dataset.from_file` reads, beside its place, and renames it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{uuid.uuid4().hex[:8]}.writing"
    schema = features.arrow_schema
    try:
        with pa.OSFile(beside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), max_chunksize=ROWS_PER_RECORD_BATCH)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise


@dataclass
class QADataCollator:
    """Rows of features in, a padded batch out: int64 tensors of shape (batch, padded length), labels (batch,).

    The padded length is that of the longest row, raised to a multiple of `pad_to_multiple_of`, or `pad_to_max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = self.pad_to_max_length or max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        shape = len(rows), -(-longest // multiple) * multiple
        batch = {
            "input_ids": np.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": np.zeros(shape, np.int64),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = np.full(shape, self.tokenizer.pad_token_type_id)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = row["input_ids"]
            batch["attention_mask"][i, :length] = 1
            if "token_type_ids" in batch:
                batch["token_type_ids"][i, :length] = row["token_type_ids"]
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                batch[name] = np.array([row[name] for row in rows], np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}
