"""Questions in, windows out: `make_train_features`, `make_features` and the collator.

Every distinct context and question is tokenized once, the windows of question and context that fit the model are
sliced with NumPy from flat token arrays, and the result is cached as Arrow on disk.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from qa.read_squad import write_arrow

logger = logging.getLogger(__name__)

FEATURES_VERSION = 2  # part of every cache file's name: raise it when other features are made of the same questions

TEXTS_PER_BATCH = 1000  # texts in one call of the tokenizer
WINDOWS_PER_BATCH = 8192  # windows sliced at once; bounds the memory of the index arrays


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
        write_arrow(path, features, tables)
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
