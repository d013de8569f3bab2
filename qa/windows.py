"""Questions in, windows out: `make_features`, what a model cannot get from them, and the collator.

Each distinct context and question is tokenized once; the windows of question and context that fit the model are sliced
with NumPy from flat token arrays and cached as Arrow on disk.
"""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import torch
from datasets import Dataset, DatasetInfo, Features, List, Value
from transformers import PreTrainedTokenizerBase

from qa.columns import Texts, column, distinct_texts, lists, write_arrow
from qa.files import QAError, require_at_least_1

logger = logging.getLogger(__name__)

TEXTS_PER_BATCH = 1000  # texts in one call of the tokenizer, fewer where they come to more than
BYTES_PER_BATCH = 2**19  # on average: bounds the memory of what the tokenizer returns
WINDOWS_PER_BATCH = 2000  # windows sliced at once: bounds the memory of the index arrays
UNKNOWN_SHARE = 0.05  # of the contexts' tokens: above it the tokenizer is that of another language or case
IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last white space


@dataclass
class WindowSettings:
    """How contexts are cut into windows. Raises QAError for a value below 1."""

    max_seq_length: int = field(default=384, metadata={"help": "Most tokens of a window, special tokens included."})
    doc_stride: int = field(default=128, metadata={"help": "Context tokens from one window's start to the next one's."})
    max_query_length: int = field(default=64, metadata={"help": "Most tokens of a question; the rest is cut."})

    def __post_init__(self):
        require_at_least_1(self, *(setting.name for setting in fields(WindowSettings)))


def make_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    windows: WindowSettings,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    desc: str = "Making features",
) -> Dataset:
    """One row a window, for training and evaluation, in the order of `examples` and of the windows in each context.

    Columns, unpadded; positions count the window's tokens from 0, lengths count tokens:
    input_ids list<int32>; token_type_ids list<int8>, if the tokenizer's model takes them; length int32;
    example_index int32, the row in `examples`; question_length int32, of the whole question, before it is cut;
    context_start int32, position of the first context token;
    char_starts, char_ends list<int32>, for each context token of the window its characters in the context, end
    exclusive, without white space at both ends: combining marks that the tokenizer drops go with the letter before
    them; a token of white space alone starts at the next character that is none, and ends after the last one;
    and where `examples` have a column answers:
    start_positions, end_positions int32, of the first gold answer's first and last token, 0 ([CLS]) where the window
    does not hold it whole or there is none;
    answer_length int32, of the shortest gold answer in the whole context, 0 where there is none.

    `num_proc` processes tokenize and change nothing. The result is read from the cache next to `examples` unless
    `overwrite_cache`; of examples in memory it is in memory. Raises QAError: no questions, or a doc_stride that leaves
    tokens uncovered.
    """
    if len(examples) == 0:
        raise QAError("there is no question to make features of")
    contexts, questions = distinct_texts(examples, "context"), distinct_texts(examples, "question")
    # Whitespace before a question takes room from the context and says nothing.
    questions = questions._replace(distinct=pc.utf8_ltrim_whitespace(questions.distinct))
    answers = column(examples, "answers") if "answers" in examples.column_names else None

    path = None
    if files := examples.cache_files:
        key = _cache_key(contexts, questions, answers, tokenizer, windows)
        path = os.path.join(os.path.dirname(files[0]["filename"]), f"cache-features-{key}.arrow")
    if path is None or overwrite_cache or not os.path.exists(path):
        context_tokens = _tokenize(contexts, tokenizer, num_proc, f"{desc} (contexts)")
        question_tokens = _tokenize(questions, tokenizer, num_proc, f"{desc} (questions)")
        unknown = np.count_nonzero(context_tokens.ids == tokenizer.unk_token_id) / max(len(context_tokens.ids), 1)
        if unknown > UNKNOWN_SHARE:
            unread = f"{unknown:.1%} of the contexts' tokens are {tokenizer.unk_token}, of which a model reads nothing"
            logger.warning(f"{unread}: use one whose tokenizer is of their language and case")
        features, tables = _feature_tables(context_tokens, question_tokens, answers, tokenizer, windows)
        if path is None:
            return Dataset(pa.concat_tables(tables).cast(features.arrow_schema), DatasetInfo(features=features))
        write_arrow(path, features, tables)
    return Dataset.from_file(path)


class Windows(NamedTuple):
    """Which part of which context each window holds; all (num_windows,) int64."""

    example: np.ndarray  # row of the example
    question_length: np.ndarray  # tokens of the question that the window holds
    start: np.ndarray  # first context token, counted in the whole context
    length: np.ndarray  # context tokens


def place_windows(context_lengths, question_lengths, num_special: int, settings: WindowSettings) -> Windows:
    """Window i of an example starts at context token i * doc_stride; its last is the first that reaches the end.

    context_lengths, question_lengths: (num_examples,) tokens. num_special: special tokens around question and context.
    """
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
    start = settings.doc_stride * _ranges(np.zeros_like(num_windows), num_windows)
    length = np.minimum(context_lengths[example] - start, room[example])
    return Windows(example, question_lengths[example], start, length)


class Tokens(NamedTuple):
    """The tokens of distinct texts, end to end, and which text each row has."""

    row: np.ndarray  # (num_rows,) index of the row's text
    offsets: np.ndarray  # (num_texts + 1,) int64: text t has the tokens from offsets[t] to offsets[t + 1]
    ids: np.ndarray  # (num_tokens,) int32
    char_starts: np.ndarray  # (num_tokens,) int32
    char_ends: np.ndarray  # (num_tokens,) int32, exclusive; after the marks that go with the token's last letter

    @property
    def first(self) -> np.ndarray:  # (num_rows,) index of the first token
        return self.offsets[self.row]

    @property
    def length(self) -> np.ndarray:  # (num_rows,) tokens
        return np.diff(self.offsets)[self.row]


def _feature_tables(
    contexts: Tokens, questions: Tokens, answers: pa.StructArray | None, tokenizer, settings: WindowSettings
) -> tuple[Features, Iterator[pa.Table]]:
    """The columns of the features, and tables that together hold them."""
    special_ids, special_types, bounds = _pair_template(tokenizer)
    before, _, between, _, after = np.diff(bounds)
    windows = place_windows(contexts.length, questions.length, before + between + after, settings)

    # All tokens that a window can hold, end to end; each window is five ranges of them.
    pool = np.concatenate([special_ids, questions.ids, contexts.ids])
    text_types = np.repeat(special_types[[bounds[1], bounds[3]]], [len(questions.ids), len(contexts.ids)])
    pool_types = np.concatenate([special_types, text_types])
    first_question_token = len(special_ids) + questions.first[windows.example]
    first_context_token = contexts.first[windows.example] + windows.start
    contexts_in_pool = len(special_ids) + len(questions.ids)
    starts = (bounds[0], first_question_token, bounds[2], contexts_in_pool + first_context_token, bounds[4])
    lengths = (before, windows.question_length, between, windows.length, after)
    starts, lengths = (np.stack(np.broadcast_arrays(*parts), axis=1) for parts in (starts, lengths))  # (num_windows, 5)

    columns = {
        "length": lengths.sum(1),
        "example_index": windows.example,
        "question_length": questions.length[windows.example],
        "context_start": lengths[:, :3].sum(1),
    }
    if answers is not None:
        columns |= _labels(answers, contexts, windows, columns["context_start"])
    dtypes = {"input_ids": "int32", "token_type_ids": "int8", "char_starts": "int32", "char_ends": "int32"}
    if "token_type_ids" not in tokenizer.model_input_names:
        del dtypes["token_type_ids"]
    features = {name: List(Value(dtype)) for name, dtype in dtypes.items()} | dict.fromkeys(columns, Value("int32"))

    def tables():
        for low in range(0, len(windows.example), WINDOWS_PER_BATCH):
            batch = slice(low, low + WINDOWS_PER_BATCH)
            table = {name: pa.array(values[batch], pa.int32()) for name, values in columns.items()}
            tokens = _ranges(starts[batch].ravel(), lengths[batch].ravel())
            table["input_ids"] = lists(lengths[batch].sum(1), pool[tokens])
            table["token_type_ids"] = lists(lengths[batch].sum(1), pool_types[tokens])
            tokens = _ranges(first_context_token[batch], windows.length[batch])
            table["char_starts"] = lists(windows.length[batch], contexts.char_starts[tokens])
            table["char_ends"] = lists(windows.length[batch], contexts.char_ends[tokens])
            yield pa.table({name: table[name] for name in features})

    return Features(features), tables()


def _pair_template(tokenizer) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(ids int32, types int8, bounds) of a short pair: bounds are where question and context start and end in it.

    What is neither, at both ends and between, are the special tokens that stand around every pair.
    """
    pair = tokenizer("a", "a", return_token_type_ids=True, return_attention_mask=False)
    text = np.array([-1 if index is None else index for index in pair.sequence_ids(0)])
    question, context = np.flatnonzero(text == 0).tolist(), np.flatnonzero(text == 1).tolist()
    bounds = [0, question[0], question[-1] + 1, context[0], context[-1] + 1, len(text)]
    return np.array(pair["input_ids"], np.int32), np.array(pair["token_type_ids"], np.int8), bounds


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: (sum of lengths,) int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


def _labels(answers: pa.StructArray, contexts: Tokens, windows: Windows, context_start) -> dict[str, np.ndarray]:
    """The columns start_positions, end_positions and answer_length, all (num_windows,)."""
    example = pc.list_parent_indices(answers.field("text")).to_numpy()  # (num_answers,), as are the next four
    start = pc.list_flatten(answers.field("answer_start")).to_numpy().astype(np.int64)
    end = start + pc.utf8_length(pc.list_flatten(answers.field("text"))).to_numpy()
    first, last = _answer_tokens(contexts, contexts.row[example], start, end)

    answered, golds = np.unique(example, return_index=True)  # of each question the first answer
    if dropped := np.count_nonzero((start[golds] >= 0) & (first[golds] < 0)):
        logger.warning(f"{dropped} answers are made of characters that the tokenizer drops: labelled as no answer")
    span = np.full((2, len(contexts.row)), -1)
    span[:, answered] = first[golds], last[golds]
    span = span[:, windows.example]  # (2, num_windows): first and last context token
    held = (span[0] >= windows.start) & (span[1] < windows.start + windows.length)
    positions = np.where(held, context_start + span - windows.start, 0)

    too_long = len(contexts.ids) + 1  # for any answer
    shortest = np.full(len(contexts.row), too_long)
    np.minimum.at(shortest, example, np.where(first < 0, too_long, last - first + 1))
    answer_length = np.where(shortest == too_long, 0, shortest)[windows.example]
    return {"start_positions": positions[0], "end_positions": positions[1], "answer_length": answer_length}


def _answer_tokens(tokens: Tokens, text, char_start, char_end) -> tuple[np.ndarray, np.ndarray]:
    """(first, last): the tokens of `text` that characters from `char_start` to `char_end` touch, or -1, -1; all (n,).

    Where several tokens share a character (byte-level BPE) all of them belong to the answer. Characters of the answer
    that are in no token (whitespace, controls) are passed over; an answer of such characters only has no token.
    """
    # One sorted array for all texts: the characters of text t lie in [t * width, (t + 1) * width).
    width = int(max(tokens.char_ends.max(initial=0), char_end.max(initial=0))) + 1
    base = np.repeat(np.arange(len(tokens.offsets) - 1) * width, np.diff(tokens.offsets))
    here = text.astype(np.int64) * width
    holding = np.flatnonzero(tokens.char_starts < tokens.char_ends)  # byte-level BPE's token for a space holds nothing
    first = np.searchsorted((base + tokens.char_ends)[holding], here + char_start, side="right")
    last = np.searchsorted((base + tokens.char_starts)[holding], here + char_end) - 1
    touched = (char_start >= 0) & (char_start < char_end) & (first <= last)
    holding = np.append(holding, 0)  # what lies outside is not touched, but indexed all the same
    return tuple(np.where(touched, holding[place] - tokens.offsets[text], -1) for place in (first, last))


def _tokenize(texts: Texts, tokenizer, num_proc: int | None, desc: str) -> Tokens:
    num_bytes = pc.sum(pc.binary_length(texts.distinct)).as_py()
    tokenized = Dataset(pa.table({"text": texts.distinct})).map(
        _token_table,
        fn_kwargs={"backend": _plain_backend(tokenizer)},
        batched=True,
        batch_size=min(max(BYTES_PER_BATCH * len(texts.distinct) // max(num_bytes, 1), 1), TEXTS_PER_BATCH),
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        remove_columns=["text"],
        new_fingerprint="tokens",  # kept in memory only, so nobody looks for it; saves hashing texts and tokenizer
        desc=desc,
    )
    columns = [chunks.combine_chunks() for chunks in tokenized.data.columns]  # ids, char_starts, char_ends
    offsets = columns[0].offsets.to_numpy().astype(np.int64)
    return Tokens(texts.row, offsets, *(values.values.to_numpy() for values in columns))


def _plain_backend(tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the tokenizers library, which is faster when called itself, as one that neither cuts nor pads.

    Nor has it a post-processor: without special tokens to add, all that one does is to trim offsets, by rules that do
    not go with every pre-tokenizer. Shares the parts of the tokenizer, which stays as it is.
    """
    backend = tokenizer.backend_tokenizer
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = tokenizer.split_special_tokens
    return plain


def _token_table(rows: dict[str, list[str]], backend: tokenizers.Tokenizer) -> pa.Table:
    """One row a text; columns input_ids, char_starts and char_ends, all list<int32>."""
    texts = rows["text"]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    lengths = [len(encoding) for encoding in encodings]
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, sum(lengths))
    spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    starts, ends = np.fromiter(spans, np.int32, 2 * sum(lengths)).reshape(-1, 2).T
    starts, ends = _trim(texts, lengths, starts, ends)
    marked = pc.match_substring_regex(pa.array(texts, pa.large_string()), r"\p{M}").to_numpy(zero_copy_only=False)
    stops = np.cumsum(lengths)
    for number in np.flatnonzero(marked):
        here = slice(stops[number] - lengths[number], stops[number])
        _extend_over_marks(texts[number], starts[here], ends[here])
    columns = {"input_ids": ids, "char_starts": starts, "char_ends": ends}
    return pa.table({name: lists(lengths, values) for name, values in columns.items()})


def _trim(texts: list[str], lengths: list[int], starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), moved on and back over white space, inside their texts, which have so many tokens (`lengths`)."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)  # (num_characters,) of all texts
    solid = ~IS_SPACE[np.minimum(codes, len(IS_SPACE) - 1)]
    places = np.flatnonzero(solid)
    passed = np.append(0, np.cumsum(solid))  # (num_characters + 1,): how many of `places` lie before each character
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    stop = np.repeat(np.cumsum(sizes), lengths)  # (num_tokens,), as is `begin`: of the token's text
    begin = stop - np.repeat(sizes, lengths)
    starts = np.minimum(np.append(places, len(codes))[passed[begin + starts]], stop) - begin
    ends = np.maximum(np.append(0, places + 1)[passed[begin + ends]], begin) - begin
    return starts.astype(np.int32), ends.astype(np.int32)


def _extend_over_marks(text: str, starts: np.ndarray, ends: np.ndarray) -> None:
    """Moves the ends of tokens behind the combining marks that follow and are in no token.

    A tokenizer that strips accents drops such marks, but a letter without its marks is not what the text says.
    """
    holding = starts < ends
    following = np.append(starts[holding], len(text))[np.searchsorted(starts[holding], ends)]
    for token in np.flatnonzero(holding & (ends < following)):
        while ends[token] < following[token] and unicodedata.category(text[ends[token]]).startswith("M"):
            ends[token] += 1


def _cache_key(contexts: Texts, questions: Texts, answers, tokenizer, windows: WindowSettings) -> str:
    """Hash of all that `make_features` depends on: of this file too, so that after an edit no older windows are read.

    The tokenizer counts by what it is, not by its pickle, which changes with every other use of it.
    """
    settings = [
        [getattr(windows, setting.name) for setting in fields(WindowSettings)],
        tokenizer.model_input_names,
        tokenizer.split_special_tokens,
        tokenizers.__version__,
        _plain_backend(tokenizer).to_str(),
        _pair_template(tokenizer),
    ]
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(settings).encode())
    for values in (*contexts, *questions, *([] if answers is None else [answers])):
        digest.update(pa.record_batch([values], ["values"]).serialize())
    return digest.hexdigest()[:32]


def features_fingerprint(features: Dataset) -> str:
    """Hash of the rows of features, in their order: of all that is trained on or answered, wherever it was read from.

    Equal for equal features of other files, in other caches, of other versions of the program, and of a selection.
    """
    digest = hashlib.sha256()
    for table in features.with_format("arrow").iter(batch_size=WINDOWS_PER_BATCH):
        for values in table.combine_chunks().columns:
            values = values.chunk(0)
            if pa.types.is_list(values.type):
                digest.update(values.value_lengths().to_numpy())
                values = values.flatten()
            digest.update(values.to_numpy())
    return digest.hexdigest()[:32]


def data_limits(features: Dataset, max_answer_length: int, max_query_length: int) -> list[str]:
    """A line on each thing that a model cannot get from these features, or not give, with count and share.

    features: all windows of each question, made with this `max_query_length`. Of several gold answers the shortest is
    the one that may be too long, the first the one that may lie in no window.
    """
    example = column(features, "example_index").to_numpy()
    _, first, num_windows = np.unique(example, return_index=True, return_counts=True)  # all (num_questions,)
    question_length = column(features, "question_length").to_numpy()[first]
    limits = [
        (num_windows > 1, len(first), "questions have a context longer than one window"),
        (question_length > max_query_length, len(first), f"questions are cut at --max_query_length {max_query_length}"),
    ]
    if "answer_length" in features.column_names:
        answer_length = column(features, "answer_length").to_numpy()[first]
        answers = np.count_nonzero(answer_length)
        too_long = f"answers are longer than --max_answer_length {max_answer_length} and can never be given"
        not_held = (answer_length > 0) & (np.maximum.reduceat(column(features, "start_positions"), first) == 0)
        limits += [
            (answer_length > max_answer_length, answers, too_long),
            (not_held, answers, "answers lie in no window as a whole and can never be given"),
        ]
    counts = [(np.count_nonzero(found), total, what) for found, total, what in limits]
    return [f"{count} of {total} ({count / total:.1%}) {what}" for count, total, what in counts if count]


def keep_negative_windows(features: Dataset, share: float, seed: int) -> Dataset:
    """Features with all windows that hold an answer and `share` of the others, in their order.

    Which ones is drawn by the seed alone. Raises QAError where none is left.
    """
    starts = column(features, "start_positions").to_numpy()
    positive, negative = np.flatnonzero(starts > 0), np.flatnonzero(starts == 0)
    kept = np.random.default_rng(seed).permutation(negative)[: round(share * len(negative))]
    if len(positive) + len(kept) == 0:
        raise QAError(f"--negative_windows {share} leaves nothing to train on: no window holds an answer; raise it")
    if share == 1:
        return features
    counts = f"{len(positive)} hold an answer; of the {len(negative)} others {len(kept)} are trained on"
    logger.info(f"Training windows: {counts} (--negative_windows {share}).")
    return features.select(np.sort(np.concatenate([positive, kept])))


@dataclass
class QADataCollator:
    """Rows of features in, a padded batch out: int64 tensors of shape (batch, padded length).

    The padded length is that of the longest row, raised to a multiple of `pad_to_multiple_of`, or `pad_to_max_length`.
    Of shape (batch,), where the rows have them: start_positions, end_positions and window. Other columns stay behind.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        multiple = self.pad_to_multiple_of or 1
        padded_length = -(-(self.pad_to_max_length or lengths.max()) // multiple) * multiple
        holding = np.arange(padded_length) < lengths[:, None]  # (batch, padded length)
        batch = {"attention_mask": holding.astype(np.int64)}
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        for name in padding.keys() & rows[0].keys() & set(self.tokenizer.model_input_names):
            batch[name] = np.full(holding.shape, padding[name])
            batch[name][holding] = np.concatenate([row[name] for row in rows])
        for name in ("start_positions", "end_positions", "window"):
            if name in rows[0]:
                batch[name] = np.array([row[name] for row in rows], np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}
