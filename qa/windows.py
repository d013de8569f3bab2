"""Questions in, windows out: `make_train_features`, `make_features` and the collator.

Every distinct context and question is tokenized once, the windows of question and context that fit the model are
sliced with NumPy from flat token arrays, and the result is cached as Arrow on disk.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

from qa.columns import Texts, arrow_notes, distinct_texts, write_arrow
from qa.files import QAError
from utils_qa import GOLD

logger = logging.getLogger(__name__)

FEATURES_VERSION = 4  # part of every cache file's name: raise it when other features are made of the same questions

TEXTS_PER_BATCH = 1000  # texts in one call of the tokenizer,
BYTES_PER_BATCH = 2**19  # and of how many bytes together, unless it is one text: bounds the memory of what it returns
BATCHES_AT_ONCE = 32  # of them, one of which is encoded while another is converted
CHARACTERS_PER_PIECE = 2**18  # of a text that is longer, the tokenizer sees pieces
PIECE_OVERLAP = 2**13  # characters before and after a piece that its tokens may depend on
LIMITS = "limits"  # the note in a file of features that `data_limits` reads
WINDOWS_PER_BATCH = 2000  # windows sliced at once; bounds the memory of the index arrays


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
                raise QAError(f"--{field.name} {getattr(self, field.name)}: must be at least 1")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer that is slow, pads on the left or has no padding token."""
    name = f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'no name'}"
    if not tokenizer.is_fast:
        raise QAError(f"{name} is a slow tokenizer: it gives no character offsets; use a model with a fast one")
    if tokenizer.padding_side != "right":
        raise QAError(f"{name} pads on the {tokenizer.padding_side}: use a model whose tokenizer pads on the right")
    if tokenizer.pad_token_id is None:
        raise QAError(f"{name} has no padding token: use a model whose tokenizer has one")


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
    list<int32>, one entry for each context token of the window: character offsets into the context, end exclusive;
    combining marks that the tokenizer drops go with the letter before them.
    Where `examples` have a column answers, gold_start and gold_end int32 are what the labels would be in training; a
    model that was given labels would compute a loss of its own, over the padding too.
    """
    return _cached_features(examples, tokenizer, windows, False, num_proc, overwrite_cache, desc)


class Tokens(NamedTuple):
    """Tokens of many texts, end to end: text t has the entries from offsets[t] to offsets[t + 1]."""

    offsets: np.ndarray  # (num_texts + 1,) int64
    ids: np.ndarray  # (num_tokens,) int32
    char_starts: np.ndarray  # (num_tokens,) int32
    char_ends: np.ndarray  # (num_tokens,) int32, exclusive; after the marks that go with the token's last letter


class Spans(NamedTuple):
    """Characters of gold answers; all (num_answers,) int64, by example."""

    example: np.ndarray  # row of the example
    context: np.ndarray  # which of the distinct contexts
    start: np.ndarray
    end: np.ndarray  # exclusive


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
        raise QAError("there is no question to make features of")
    contexts, questions = distinct_texts(examples, "context"), _stripped(distinct_texts(examples, "question"))
    answers = _answer_spans(examples, contexts.row, labelled)

    name = f"cache-{'train' if labelled else 'eval'}-features-"
    name += _fingerprint(contexts, questions, answers if labelled else None, tokenizer, windows)
    name += f"-v{FEATURES_VERSION}"
    if not labelled and answers is not None:  # their limits stand in the file too
        name += f"-{hashlib.sha256(b''.join(map(memoryview, answers))).hexdigest()[:16]}"
    files = examples.cache_files
    directory = os.path.dirname(files[0]["filename"]) if files else datasets.config.HF_DATASETS_CACHE
    path = os.path.join(directory, f"{name}.arrow")
    if overwrite_cache or not os.path.exists(path):
        backend = _plain_backend(tokenizer)
        context_tokens = _tokenize_contexts(contexts.distinct, backend, num_proc, f"{desc} (contexts)")
        question_tokens = _tokenize_questions(questions.distinct, backend, num_proc, f"{desc} (questions)")
        features, tables, limits = _window_tables(
            contexts.row, context_tokens, questions.row, question_tokens, answers, labelled, tokenizer, windows
        )
        write_arrow(path, features, tables, {LIMITS: json.dumps(limits)})
    return Dataset.from_file(path)


def _stripped(questions: Texts) -> Texts:
    """Without the whitespace before them, which takes room from the context and says nothing."""
    stripped = pc.utf8_ltrim_whitespace(questions.distinct).dictionary_encode()
    return Texts(stripped.dictionary, stripped.indices.to_numpy()[questions.row])


def _answer_spans(examples: Dataset, context_row: np.ndarray, first_only: bool) -> Spans | None:
    """Where the gold answers stand, or the first of each question; None where there is no column of them."""
    if "answers" not in examples.column_names:
        return None
    answers = examples.with_format("arrow", columns=["answers"])[:]["answers"].combine_chunks()
    texts, starts = answers.field("text"), answers.field("answer_start")
    counts = pc.list_value_length(texts).to_numpy().astype(np.int64)
    if first_only:
        counts = np.minimum(counts, 1)
    example = np.repeat(np.arange(len(counts)), counts)
    here = _ranges(texts.offsets.to_numpy()[:-1].astype(np.int64), counts)
    first = starts.values.to_numpy()[_ranges(starts.offsets.to_numpy()[:-1].astype(np.int64), counts)].astype(np.int64)
    length = pc.utf8_length(texts.values).to_numpy()[here]
    return Spans(example, context_row[example].astype(np.int64), first, first + length)


def _fingerprint(contexts: Texts, questions: Texts, labels: Spans | None, tokenizer, windows: WindowSettings) -> str:
    """Hash of all that decides what is trained on or answered, however `examples` came to be.

    It stands in each checkpoint, so that it must stay what it is from one version of this program to the next. The
    tokenizer counts by what it is, not by its pickle, which changes with every other use of it.
    """
    digest = hashlib.sha256()
    for texts in (contexts, questions):
        digest.update(pc.binary_length(texts.distinct).to_numpy().astype(np.int32))
        digest.update(_utf8_bytes(texts.distinct))
        digest.update(texts.row)
    if labels is not None:
        spans = np.full((len(contexts.row), 2), -1, np.int64)  # of each question, -1 where it has no answer
        spans[labels.example] = np.stack([labels.start, labels.end], axis=1)
        digest.update(spans)
    settings = [
        2,
        tokenizers.__version__,
        labels is not None,
        dataclasses.astuple(windows),
        tokenizer.model_input_names,
        tokenizer.split_special_tokens,
        _plain_backend(tokenizer).to_str(),
    ]
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:32]


def _utf8_bytes(texts: pa.LargeStringArray):
    """The texts' UTF-8 bytes, end to end, without a copy."""
    _, offsets, values = texts.buffers()
    offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return b"" if values is None else values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))


def _plain_backend(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the tokenizers library, set to neither cut nor pad."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _tokenize_contexts(texts: pa.Array, backend: tokenizers.Tokenizer, num_proc: int | None, desc: str) -> Tokens:
    num_pieces = -(-(pc.utf8_length(texts).to_numpy() - PIECE_OVERLAP) // CHARACTERS_PER_PIECE)
    num_pieces = np.maximum(num_pieces, 1).astype(np.int64)  # (num_texts,)
    if num_pieces.max() == 1:
        return _with_marks(_context_tokens_of(texts, backend, num_proc, desc), texts)
    pieces = [texts.slice(i, 1) if n == 1 else _pieces(texts[i].as_py(), n) for i, n in enumerate(num_pieces.tolist())]
    tokens = _context_tokens_of(pa.concat_arrays(pieces), backend, num_proc, desc)
    return _with_marks(_join_pieces(tokens, num_pieces, texts, backend), texts)


def _with_marks(tokens: Tokens, texts: pa.Array) -> Tokens:
    """Tokens that end after the combining marks which stand behind them and which no token holds.

    A tokenizer that strips accents drops such marks, but a letter without its marks is not what the text says.
    """
    marked = np.flatnonzero(pc.match_substring_regex(texts, r"\p{M}").to_numpy(zero_copy_only=False))
    if not len(marked):
        return tokens
    char_ends = tokens.char_ends.copy()
    for text in marked.tolist():
        here = slice(tokens.offsets[text], tokens.offsets[text + 1])
        starts, ends = tokens.char_starts[here], tokens.char_ends[here]
        characters = np.frombuffer(texts[text].as_py().encode("utf-32-le"), np.uint32)
        length = len(characters)
        in_tokens = np.bincount(starts, minlength=length + 1) - np.bincount(ends, minlength=length + 1)
        dropped = _is_mark()[characters] & (np.cumsum(in_tokens)[:length] == 0)
        # From each place on, where the next character is that is no dropped mark.
        after = np.append(np.where(dropped, length, np.arange(length)), length)
        after = np.minimum.accumulate(after[::-1])[::-1]
        char_ends[here] = np.where(starts < ends, after[ends], ends)
    return tokens._replace(char_ends=char_ends)


@functools.cache
def _is_mark() -> np.ndarray:
    """Of each code point, whether it is a combining mark (Unicode's categories Mn, Mc and Me)."""
    marks = (unicodedata.category(chr(code)).startswith("M") for code in range(sys.maxunicode + 1))
    return np.fromiter(marks, bool, sys.maxunicode + 1)


def _pieces(text: str, num_pieces: int) -> pa.LargeStringArray:
    firsts = (k * CHARACTERS_PER_PIECE for k in range(num_pieces))
    ends = PIECE_OVERLAP, CHARACTERS_PER_PIECE + PIECE_OVERLAP
    return pa.array([text[max(first - ends[0], 0) : first + ends[1]] for first in firsts], pa.large_string())


def _join_pieces(tokens: Tokens, num_pieces: np.ndarray, texts: pa.Array, backend: tokenizers.Tokenizer) -> Tokens:
    """The tokens of whole texts, from those of their pieces.

    Tokens depend on what stands near them: on their word, for most tokenizers. So two pieces are joined where they have
    the same tokens all around the place where they meet; a text whose pieces do not agree (one word without an end) is
    tokenized as a whole.
    """
    offsets, columns = [0], []
    for i, (first, num) in enumerate(zip(np.cumsum(num_pieces) - num_pieces, num_pieces, strict=True)):
        pieces = [_shifted(tokens, first + k, max(k * CHARACTERS_PER_PIECE - PIECE_OVERLAP, 0)) for k in range(num)]
        for k in range(1, num):
            joint = k * CHARACTERS_PER_PIECE
            around = joint - PIECE_OVERLAP // 2, joint + PIECE_OVERLAP // 2
            left, right = (
                piece[:, (piece[1] >= around[0]) & (piece[2] <= around[1])] for piece in (pieces[k - 1], pieces[k])
            )
            if not left.size or not np.array_equal(left, right):
                whole = _context_tokens({"texts": [[texts[i].as_py()]]}, backend)
                pieces = [np.stack([whole[name].combine_chunks().values.to_numpy() for name in whole.column_names])]
                break
            pieces[k - 1] = pieces[k - 1][:, pieces[k - 1][1] < joint]
            pieces[k] = pieces[k][:, pieces[k][1] >= joint]
        columns += pieces
        offsets.append(offsets[-1] + sum(piece.shape[1] for piece in pieces))
    return Tokens(np.array(offsets), *np.concatenate(columns, axis=1))


def _shifted(tokens: Tokens, text: int, characters: int) -> np.ndarray:
    """(3, num_tokens) int32: ids, char_starts and char_ends of one text, so many characters further on."""
    here = slice(tokens.offsets[text], tokens.offsets[text + 1])
    return np.stack([tokens.ids[here], tokens.char_starts[here] + characters, tokens.char_ends[here] + characters])


def _context_tokens_of(texts: pa.Array, backend: tokenizers.Tokenizer, num_proc: int | None, desc: str) -> Tokens:
    ids, char_starts, char_ends = _map_texts(_context_tokens, texts, backend, num_proc, desc)
    offsets = ids.offsets.to_numpy().astype(np.int64)
    return Tokens(offsets, ids.values.to_numpy(), char_starts.values.to_numpy(), char_ends.values.to_numpy())


def _tokenize_questions(texts: pa.Array, backend: tokenizers.Tokenizer, num_proc: int | None, desc: str) -> Tokens:
    (ids,) = _map_texts(_question_tokens, texts, backend, num_proc, desc)
    nowhere = np.zeros(0, np.int32)
    return Tokens(ids.offsets.to_numpy().astype(np.int64), ids.values.to_numpy(), nowhere, nowhere)


def _map_texts(function, texts: pa.Array, backend, num_proc: int | None, desc: str) -> list[pa.ListArray]:
    """The columns that `function` makes of the texts, batch by batch in `num_proc` processes."""
    batches = pa.ListArray.from_arrays(_batch_offsets(pc.binary_length(texts).to_numpy()), texts)
    tokenized = Dataset(pa.table({"texts": batches})).map(
        functools.partial(function, backend=backend),
        batched=True,
        batch_size=BATCHES_AT_ONCE,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=["texts"],
        new_fingerprint="tokens",  # kept in memory only, so nobody looks for it; saves hashing texts and tokenizer
        desc=desc,
    )
    return [column.combine_chunks() for column in tokenized.data.columns]


def _batch_offsets(lengths: np.ndarray) -> np.ndarray:
    """(num_batches + 1,) int32: where each batch of texts starts and ends. lengths: bytes of each text."""
    offsets, size = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if i > offsets[-1] and (size + length > BYTES_PER_BATCH or i - offsets[-1] >= TEXTS_PER_BATCH):
            offsets.append(i)
            size = 0
        size += length
    return np.array([*offsets, len(lengths)], np.int32)


# The backend itself tokenizes, because the tokenizer's own call builds Python lists of everything before it returns.


def _context_tokens(rows: dict[str, list[list[str]]], backend: tokenizers.Tokenizer) -> pa.Table:
    tables = []
    for encodings in _encode(backend.encode_batch, rows["texts"]):
        offsets = _offsets([len(encoding) for encoding in encodings])
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, offsets[-1])
        pairs = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        spans = np.fromiter(pairs, np.int32, 2 * offsets[-1]).reshape(-1, 2).T.copy()
        columns = {"input_ids": ids, "char_starts": spans[0], "char_ends": spans[1]}
        tables.append(pa.table({name: pa.ListArray.from_arrays(offsets, column) for name, column in columns.items()}))
    return pa.concat_tables(tables)


def _question_tokens(rows: dict[str, list[list[str]]], backend: tokenizers.Tokenizer) -> pa.Table:
    tables = []
    for encodings in _encode(backend.encode_batch_fast, rows["texts"]):  # without character offsets
        offsets = _offsets([len(encoding) for encoding in encodings])
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, offsets[-1])
        tables.append(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)}))
    return pa.concat_tables(tables)


def _encode(encode, batches: list[list[str]]) -> Iterator[list[tokenizers.Encoding]]:
    """The encodings of each batch. The next batch is being encoded, without Python's lock, while one is worked on."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(encode, batches[0], add_special_tokens=False)
        for batch in batches[1:]:
            encodings, following = following.result(), executor.submit(encode, batch, add_special_tokens=False)
            yield encodings
        yield following.result()


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
        raise QAError(f"{type(tokenizer).__name__} of {tokenizer.name_or_path} makes no token of the text 'a'")
    parts = slice(None, question[0]), slice(question[-1] + 1, context[0]), slice(context[-1] + 1, None)
    return PairTemplate(
        *(ids[part] for part in parts), *(types[part] for part in parts), types[question[0]], types[context[0]]
    )


def _place_windows(context_lengths, question_lengths, num_special: int, settings: WindowSettings) -> Windows:
    """Window i of an example starts at context token i * doc_stride; its last is the first that reaches the end."""
    question_lengths = np.minimum(question_lengths, settings.max_query_length)
    room = settings.max_seq_length - num_special - question_lengths  # (num_examples,) context tokens of a window
    if settings.doc_stride > room.min():
        raise QAError(
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
    context_row, context_tokens: Tokens, question_row, question_tokens: Tokens, answers, labelled, tokenizer, settings
):
    """(features, tables, limits): the windows' schema, a generator of tables that together hold them, `_limits`."""
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
    first, last = (None, None) if answers is None else _answer_tokens(answers, context_tokens)
    if labelled and (missed := np.count_nonzero((answers.start >= 0) & (first < 0))):
        logger.warning(f"{missed} answers are made of characters that the tokenizer drops: trained on as no answer")
    if answers is not None:
        answered, first_gold = np.unique(answers.example, return_index=True)
        spans = np.full((2, len(context_row)), -1)
        spans[:, answered] = first[first_gold], last[first_gold]
        first_here, last_here = spans[:, windows.example] - windows.start
        inside = (spans[0, windows.example] >= 0) & (first_here >= 0) & (last_here < windows.length)
        names = ("start_positions", "end_positions") if labelled else GOLD
        for name, token_here in zip(names, (first_here, last_here), strict=True):
            columns[name] = np.where(inside, context_start + token_here, 0)
    if not labelled:
        columns["context_start"] = context_start
    limits = _limits(
        windows, context_row, np.diff(question_tokens.offsets)[question_row], answers, first, last, settings
    )

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

    with_types = "token_type_ids" in tokenizer.model_input_names
    features = {"input_ids": List(Value("int32"))}
    if with_types:
        features["token_type_ids"] = List(Value("int8"))
    features |= {name: Value("int32") for name in columns}
    if not labelled:
        features |= {"char_starts": List(Value("int32")), "char_ends": List(Value("int32"))}

    def tables():
        for low in range(0, len(windows.example), WINDOWS_PER_BATCH):
            batch = slice(low, low + WINDOWS_PER_BATCH)
            table = {name: pa.array(values[batch], pa.int32()) for name, values in columns.items()}
            question, context = first_question_token[batch], first_context_token[batch]
            starts = _columns(0, questions_in_pool + question, before, contexts_in_pool + context, before + between)
            lengths = _columns(before, windows.question_length[batch], between, windows.length[batch], after)
            tokens, offsets = _ranges(starts.ravel(), lengths.ravel()), _offsets(table["length"])
            table["input_ids"] = pa.ListArray.from_arrays(offsets, pool[tokens])
            if with_types:
                table["token_type_ids"] = pa.ListArray.from_arrays(offsets, pool_types[tokens])
            if not labelled:
                length = windows.length[batch]
                tokens, offsets = _ranges(context, length), _offsets(length)
                table["char_starts"] = pa.ListArray.from_arrays(offsets, context_tokens.char_starts[tokens])
                table["char_ends"] = pa.ListArray.from_arrays(offsets, context_tokens.char_ends[tokens])
            yield pa.table({name: table[name] for name in features})

    return Features(features), tables(), limits


def _columns(*columns: int | np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _answer_tokens(answers: Spans, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(first, last), both (num_answers,): the context tokens that the answer's characters touch, or -1, -1.

    Where several tokens share a character (byte-level BPE) all of them belong to the answer. Characters of the answer
    that are in no token (whitespace, controls) are passed over; an answer of such characters only has no token.
    """
    # One sorted array for all contexts: the character offsets of context c lie in [c * width, (c + 1) * width).
    width = int(max(tokens.char_ends.max(initial=0), answers.end.max(initial=0))) + 1
    base = np.repeat(np.arange(len(tokens.offsets) - 1) * width, np.diff(tokens.offsets))
    holding = np.flatnonzero(tokens.char_starts < tokens.char_ends)  # byte-level BPE's token for a space holds nothing
    first = np.searchsorted((base + tokens.char_ends)[holding], answers.start + answers.context * width, side="right")
    last = np.searchsorted((base + tokens.char_starts)[holding], answers.end + answers.context * width) - 1
    touched = (answers.start >= 0) & (answers.start < answers.end) & (first <= last)
    begin = tokens.offsets[answers.context]
    holding = np.append(holding, 0)  # what lies outside is not touched, but indexed all the same
    return np.where(touched, holding[first] - begin, -1), np.where(touched, holding[last] - begin, -1)


# ---- What the data cannot give ----


def _limits(windows: Windows, context_row, question_lengths, answers: Spans | None, first, last, settings) -> dict:
    """What is counted once, for `data_limits`, which knows the other flags.

    A question's answer is as long as its shortest gold answer, and is held if one of them lies wholly in a window.
    first, last: (num_answers,) context tokens of each gold answer, -1 where it has none.
    """
    num_windows = np.bincount(windows.example)
    limits = {
        "questions": len(context_row),
        "cut_questions": int(np.count_nonzero(question_lengths > settings.max_query_length)),
        "contexts": len(np.unique(context_row)),
        "long_contexts": len(np.unique(context_row[num_windows > 1])),
        "not_held": 0,
        "answer_lengths": {},
    }
    if answers is None:
        return limits
    given = first >= 0
    example, first, last = answers.example[given], first[given], last[given]
    # Of the windows that begin before the answer does, the latest reaches furthest.
    latest = np.minimum(first // settings.doc_stride, num_windows[example] - 1)
    latest += (np.cumsum(num_windows) - num_windows)[example]
    held = last < windows.start[latest] + windows.length[latest]
    answered, begin = np.unique(example, return_index=True)
    if len(answered):
        lengths, counts = np.unique(np.minimum.reduceat(last - first + 1, begin), return_counts=True)
        limits["not_held"] = int(np.count_nonzero(~np.logical_or.reduceat(held, begin)))
        limits["answer_lengths"] = dict(zip(lengths.tolist(), counts.tolist(), strict=True))
    return limits


def count_limits(features: Dataset, max_answer_length: int) -> dict[str, tuple[int, int]]:
    """What a model cannot get from these features, or not give, each as (how many, of how many).

    too_long: answers of more than `max_answer_length` tokens; not_held: answers that lie in no window as a whole;
    long_contexts: those of more than one window; cut_questions: those longer than the features' `max_query_length`.
    features: of `make_train_features` or `make_features`, or a selection of their windows.
    """
    limits = json.loads(arrow_notes(features.cache_files[0]["filename"])[LIMITS])
    lengths = {int(length): count for length, count in limits["answer_lengths"].items()}
    answers = sum(lengths.values())
    return {
        "too_long": (sum(count for length, count in lengths.items() if length > max_answer_length), answers),
        "not_held": (limits["not_held"], answers),
        "long_contexts": (limits["long_contexts"], limits["contexts"]),
        "cut_questions": (limits["cut_questions"], limits["questions"]),
    }


def data_limits(features: Dataset, max_answer_length: int, max_query_length: int) -> list[str]:
    """A line on each thing that `count_limits` has counted, with count and share.

    features: as there, made with this `max_query_length`.
    """
    lines = {
        "too_long": f"answers are longer than --max_answer_length {max_answer_length} and can never be given",
        "not_held": "answers lie in no window as a whole and can never be given",
        "long_contexts": "contexts are longer than one window",
        "cut_questions": f"questions are cut at --max_query_length {max_query_length}",
    }
    counts = count_limits(features, max_answer_length)
    return [
        f"{counts[name][0]} of {counts[name][1]} ({counts[name][0] / counts[name][1]:.1%}) {line}"
        for name, line in lines.items()
        if counts[name][0]
    ]


def keep_negative_windows(features: Dataset, share: float, seed: int) -> Dataset:
    """Training features with all windows that hold an answer and `share` of the others, in their order.

    Which ones is drawn by the seed alone. Raises ValueError where none is left.
    """
    starts = features.with_format("arrow", columns=["start_positions"])[:]["start_positions"].to_numpy()
    positive, negative = np.flatnonzero(starts > 0), np.flatnonzero(starts == 0)
    kept = np.random.default_rng(seed).permutation(negative)[: round(share * len(negative))]
    if len(positive) + len(kept) == 0:
        raise QAError(f"--negative_windows {share} leaves nothing to train on: no window holds an answer; raise it")
    if share == 1:
        return features
    logger.info(
        f"Training windows: {len(positive)} hold an answer; of the {len(negative)} others {len(kept)} are trained on "
        f"(--negative_windows {share})."
    )
    return features.select(np.sort(np.concatenate([positive, kept])))


# ---- Batches ----


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
