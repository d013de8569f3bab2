"""From start and end logits to answers, and from answers to scores.

`AnswerSearch` picks the answer spans from logits, a batch at a time (`postprocess_qa_predictions` from all at once),
`write_predictions` writes them, `squad_scores` compares them with the gold answers. `SquadMetric` is the same
comparison in the interface of `evaluate`.
"""

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from qa.columns import column, distinct_texts
from qa.files import QAError, write_text

QUESTIONS_PER_PIECE = 512  # whose texts are read, and whose n-best lists are written, at once
WINDOWS_PER_CHUNK = 64  # windows searched at once: the spans of one chunk stay in the processor's cache
WINDOWS_PER_MERGE = 256  # windows whose spans are fetched from an accelerator and compared with the best at once
GOLD = ("gold_start", "gold_end")  # columns of features: the labels of evaluation, which no model takes as inputs
LARGEST_LOGIT = np.finfo(np.float32).max / 2  # the sum of two still is a float32


class NBest(Mapping):
    """The n-best list of each question, by question id.

    A list holds, best first, dicts {text, probability, start_logit, end_logit, start, end}; start and end are
    character offsets into the context, the null answer has text "" and None for both. All lists stand in one Arrow
    table, and dicts are made when asked for.
    """

    def __init__(self, ids: list[str], table: pa.Table, bounds: list[int]):
        """`table`: one row an entry, columns as above. Question i has the rows from bounds[i] to bounds[i + 1]."""
        self.table = table
        self.bounds = bounds
        self._index = {id_: i for i, id_ in enumerate(ids)}

    def __getitem__(self, id_: str) -> list[dict]:
        i = self._index[id_]
        return self.table[self.bounds[i] : self.bounds[i + 1]].to_pylist()

    def __iter__(self):
        return iter(self._index)

    def __len__(self):
        return len(self._index)


class QAPredictions(NamedTuple):
    """What the model answers, by question id, in the order of the examples.

    `answers`: the text that counts.
    `n_best`: the answers that came close, see NBest.
    `null_odds`: score of the null answer minus score of the best other one; None without `version_2_with_negative`.
    `best_non_null`: the best answer that is not empty, whatever its null odds; "" only if the question has no span.
    """

    answers: dict[str, str]
    n_best: Mapping[str, list[dict]]
    null_odds: dict[str, float] | None
    best_non_null: dict[str, str]


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are picked, see AnswerSearch; by default as run_squad.py does."""

    n_best_size: int = 20
    max_answer_length: int = 30  # tokens
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0

    def __post_init__(self):
        if self.n_best_size < 1 or self.max_answer_length < 1:
            raise QAError(
                f"n_best_size is {self.n_best_size}, max_answer_length {self.max_answer_length}: both must be 1 or more"
            )


def postprocess_qa_predictions(
    examples: datasets.Dataset,
    features: datasets.Dataset,
    predictions: tuple[np.ndarray, np.ndarray],
    *,
    version_2_with_negative: bool = False,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float = 0.0,
) -> QAPredictions:
    """What AnswerSearch answers, from the logits of all windows at once.

    predictions: start and end logits, each (num_windows, padded length); row i belongs to features[i]. The rest is as
    in AnswerSearch and AnswerSettings. Raises ValueError as they do, and for logits that do not fit the features.
    """
    settings = AnswerSettings(n_best_size, max_answer_length, version_2_with_negative, null_score_diff_threshold)
    search = AnswerSearch(examples, features, settings)
    start_logits, end_logits = (np.asarray(logits) for logits in predictions)
    for logits in (start_logits, end_logits):
        needed = (len(features), search.lengths.max(initial=0))
        if logits.ndim != 2 or len(logits) != needed[0] or logits.shape[1] < needed[1]:
            raise QAError(
                f"logits have shape {logits.shape}, but the features have {needed[0]} windows of up to {needed[1]} "
                "tokens: pass the logits of these features"
            )
    for first in range(0, len(features), WINDOWS_PER_CHUNK):
        window = np.arange(first, min(first + WINDOWS_PER_CHUNK, len(features)))
        logits = (torch.from_numpy(logits[window]) for logits in (start_logits, end_logits))
        search.keep(search.find(torch.from_numpy(window), *logits))
    return search.predictions()


class AnswerSearch:
    """Turns the logits of windows, which come a batch at a time and in any order, into one answer a question.

    The algorithm is `postprocess_qa_predictions` of Hugging Face's run_qa.py. In each window the `n_best_size` best
    starts are combined with the `n_best_size` best ends. Spans inside the context, not reversed and of at most
    `max_answer_length` tokens, compete over all windows of the question by start logit + end logit. The null score of
    a question is the lowest start[0] + end[0] of its windows; with `version_2_with_negative` the null answer joins the
    n-best list (as the last one if it is not among the best) and is the answer where its odds exceed the threshold.

    What run_qa.py leaves to chance is fixed: equal logits and equal scores rank by position, then by window; padding
    takes no part, so an answer does not depend on how far its batch was padded; a question without any span is
    answered by "" (at logits 0.0), where run_qa.py writes "empty".

    Scores are computed in float32; probabilities are a float64 softmax over the scores of the n-best list. Of logits
    nothing is kept but the n best spans of each question, 20 bytes each, and the loss of each window, 4 bytes.

    Args:
        examples: columns id and context. Gold answers are not read and need not be there.
        features: columns example_index, length, context_start, char_starts, char_ends, and for `loss` gold_start and
            gold_end; windows in any order.
        device: where the logits will be.

    Raises ValueError for features that are not those of `examples`: a question without a window (names it).
    """

    def __init__(
        self,
        examples: datasets.Dataset,
        features: datasets.Dataset,
        settings: AnswerSettings,
        device: torch.device | str = "cpu",
    ):
        self.settings = settings
        self.examples = examples
        self._characters = features.with_format("arrow", columns=["context_start", "char_starts", "char_ends"])
        self.ids = column(examples, "id").to_pylist()
        self.example = column(features, "example_index").to_numpy(zero_copy_only=False)  # of each window
        _check_windows(self.example, self.ids)
        self.lengths, context_start = (column(features, name).to_numpy() for name in ("length", "context_start"))
        context_end = context_start + _list_lengths(features, "char_starts")
        # (windows, 3) int32: tokens of the window, positions of the first context token and after the last one.
        self.bounds = torch.from_numpy(np.stack([self.lengths, context_start, context_end], axis=1)).to(device)
        self.labels = self.losses = None
        if set(GOLD) <= set(features.column_names):
            labels = np.stack([column(features, name).to_numpy() for name in GOLD], axis=1)  # (windows, 2) int32
            self.labels = torch.from_numpy(labels).to(device)
            self.losses = np.full(len(self.lengths), np.nan, np.float32)
        # The best spans of each question so far, best first: those of question i are best[i, :num_best[i]].
        self.best = np.zeros((len(self.ids), settings.n_best_size), _SPAN)
        self.num_best = np.zeros(len(self.ids), np.int32)
        self.lowest = np.full(len(self.ids), -np.inf, np.float32)  # score that a span has to reach to be one of them
        self.nulls = np.full(len(self.ids), np.array((-1, -1, -1, np.inf, np.inf), _SPAN))
        self.num_windows = 0  # kept so far
        self._found: list[torch.Tensor] = []  # and not merged into `best` yet

    def find(self, window: torch.Tensor, start_logits: torch.Tensor, end_logits: torch.Tensor) -> torch.Tensor:
        """The best spans of each window of a batch, for `keep`; only reads, and runs where the logits are.

        window: (batch,) int, rows of the features; start_logits, end_logits: (batch, padded length), any float type.
        Returns an int32 tensor of shape (batch, 4 + 4 n_best_size), which processes can gather; `_unpack` explains it.
        With labels it has one column more, the loss of each window.
        """
        bounds, n = self.bounds[window], self.settings.n_best_size
        outside = torch.arange(start_logits.shape[1], device=bounds.device) >= bounds[:, :1]
        start_logits = start_logits.float().masked_fill(outside, -math.inf)
        end_logits = end_logits.float().masked_fill(outside, -math.inf)
        usable = (start_logits.amax(dim=1) <= LARGEST_LOGIT) & (end_logits.amax(dim=1) <= LARGEST_LOGIT)  # not if NaN
        null = torch.stack([start_logits[:, 0], end_logits[:, 0]], dim=1)
        if self.settings.version_2_with_negative:
            usable &= (null >= -LARGEST_LOGIT).all(dim=1)
        positions, logits = best_spans(start_logits, end_logits, bounds, n, self.settings.max_answer_length)
        columns = [window[:, None].int(), usable[:, None].int(), null.view(torch.int32), positions]
        columns.append(logits.view(torch.int32))
        if self.labels is not None:
            losses = window_losses(start_logits, end_logits, self.labels[window].long())
            columns.append(losses[:, None].view(torch.int32))
        return torch.cat(columns, dim=1)

    def keep(self, found: torch.Tensor) -> None:
        """Keeps what `find` found in some windows, each of which must come once.

        Raises ValueError for NaN, +inf or an overflow at a token of a window, and in version 2 for -inf at the null
        answer (names the questions). On an accelerator that comes up to WINDOWS_PER_MERGE windows later.
        """
        if found.device.type == "cpu":  # waiting for an accelerator at each batch would let it stand idle
            self._check(found)
        self._found.append(found)
        if sum(map(len, self._found)) >= WINDOWS_PER_MERGE:
            self.merge()

    def predictions(self) -> QAPredictions:
        """The answers, once all windows are kept. Raises ValueError where some are not."""
        self.merge()
        if self.num_windows != len(self.example):
            raise QAError(
                f"there are logits of {self.num_windows} windows, but the features have {len(self.example)}: "
                "each window must come once"
            )
        pieces = [self._predict(first) for first in range(0, max(len(self.ids), 1), QUESTIONS_PER_PIECE)]
        return _join(pieces, self.ids)

    def loss(self) -> float | None:
        """The mean of `window_losses` over all windows, once they are kept; None for features without labels.

        Summed in the order of the windows, so that it does not depend on their batches. It is infinite or NaN where
        the logit of a label is -inf, which `keep` lets pass.
        """
        self.merge()
        return None if self.losses is None else float(self.losses.mean(dtype=np.float64))

    def unlikely_ids(self) -> list[str]:
        """The questions that have a window whose loss is not finite, as `loss` then is not."""
        self.merge()
        return [self.ids[i] for i in np.unique(self.example[~np.isfinite(self.losses)])]

    def _check(self, found: torch.Tensor) -> None:
        window, usable = found[:, :2].T.numpy()
        if not usable.all():
            broken = [self.ids[i] for i in np.unique(self.example[window[usable == 0]])]
            raise QAError(
                f"the logits of {len(broken)} questions hold NaN or infinity (first ids: {', '.join(broken[:5])}): "
                "the model diverged or overflowed; use an earlier checkpoint or a wider dtype"
            )

    def merge(self) -> None:
        """Compares what was kept with the best so far; raises as `keep`. `predictions` does it too."""
        if not self._found:
            return
        found = torch.cat(self._found).cpu()
        self._found.clear()
        self._check(found)
        self.num_windows += len(found)
        nulls, spans = _unpack(found.numpy(), self.settings.n_best_size)
        if self.losses is not None:
            self.losses[nulls["window"]] = found[:, -1].numpy().view(np.float32)
        self._keep_best(spans[spans["start"] >= 0])
        if self.settings.version_2_with_negative:
            self._keep_lowest(nulls)

    def _keep_best(self, spans: np.ndarray) -> None:
        """spans: (spans,) of _SPAN; those of one window stand together, best first."""
        # take, compress and put are many times faster than an index here, where an entry is a record.
        n = self.settings.n_best_size
        example = self.example[spans["window"]]
        spans = spans.compress(_score(spans) >= self.lowest[example])

        touched = np.unique(self.example[spans["window"]])
        earlier = self.best.take(touched, axis=0).ravel()
        earlier = earlier.compress((np.arange(n) < self.num_best[touched, None]).ravel())
        spans = np.concatenate([earlier, spans])
        by_window = np.argsort(spans["window"], kind="stable")  # equal scores go by window, and within one by rank
        example = self.example[spans["window"][by_window]]
        order = best_first(example, _score(spans)[by_window])
        spans, example = spans.take(by_window[order]), example[order]
        first = np.searchsorted(example, touched)
        counts = np.diff(first, append=len(example))
        rank = np.arange(len(spans)) - np.repeat(first, counts)
        keep = rank < n
        self.best.put((example * n + rank)[keep], spans.compress(keep))
        self.num_best[touched] = np.minimum(counts, n)
        full = touched[counts >= n]
        self.lowest[full] = _score(self.best.take(full * n + n - 1))

    def _keep_lowest(self, nulls: np.ndarray) -> None:
        """The null answer of a question is its window's with the lowest score, the first if several have it."""
        touched = np.unique(self.example[nulls["window"]])
        nulls = np.concatenate([self.nulls[touched], nulls])
        example = np.concatenate([touched, self.example[nulls["window"][len(touched) :]]])
        lowest_first = np.lexsort((nulls["window"], _score(nulls), example))
        _, first = np.unique(example[lowest_first], return_index=True)
        self.nulls[touched] = nulls[lowest_first[first]]

    def _predict(self, first: int) -> QAPredictions:
        """The answers to QUESTIONS_PER_PIECE questions."""
        piece = slice(first, min(first + QUESTIONS_PER_PIECE, len(self.ids)))
        ids = self.ids[piece]
        given = np.arange(self.settings.n_best_size) < self.num_best[piece, None]
        spans = self.best[piece].ravel().compress(given.ravel())
        char_start, char_end = _characters(self._characters, spans)
        start_logit, end_logit = spans["start_logit"], spans["end_logit"]
        example = self.example[spans["window"]] - first
        candidates = _Candidates(example, _score(spans), start_logit, end_logit, char_start, char_end)
        nulls = None
        if self.settings.version_2_with_negative:
            nulls = self.nulls[piece]
            nulls = _not_a_span(np.arange(len(ids)), nulls["start_logit"], nulls["end_logit"])
        candidates = _n_best(candidates, nulls, self.settings.n_best_size, len(ids))
        contexts = distinct_texts(self.examples, "context", piece)
        strings = contexts.distinct.to_pylist()
        contexts = [strings[i] for i in contexts.row.tolist()]
        return _to_predictions(candidates, nulls, ids, contexts, self.settings.null_score_diff_threshold)


# ---------------------------------------------------------------------------------------------------------------------
# Columns of the features and examples


def _check_windows(example: np.ndarray, ids: list[str]) -> None:
    windows_per_example = np.bincount(example, minlength=len(ids))
    if len(windows_per_example) > len(ids):
        raise QAError(
            f"features have windows of example {example.max()}, but there are {len(ids)} examples: "
            "pass the examples that the features were made from"
        )
    if len(missing := np.flatnonzero(windows_per_example == 0)):
        raise QAError(
            f"{len(missing)} questions have no window in the features (first ids: "
            f"{', '.join(ids[i] for i in missing[:5])}): pass the features of all examples"
        )


def _list_lengths(dataset: datasets.Dataset, name: str) -> np.ndarray:
    column = dataset.with_format("arrow", columns=[name])[:].column(name)  # not copied, where it is a file's
    return pc.list_value_length(column).to_numpy()


def _characters(features: datasets.Dataset, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(char_start, char_end), both (spans,) int32: where each span starts and ends in its context.

    features: in Arrow's format, with the columns context_start, char_starts, char_ends.
    """
    char_start, char_end = np.empty(len(spans), np.int32), np.empty(len(spans), np.int32)
    if not len(spans):
        return char_start, char_end
    low, high = spans["window"].min(), spans["window"].max() + 1
    # A part of the file, not copied: only what is looked up is read.
    table = features[low:high]
    window = spans["window"] - low
    context_start = table["context_start"].to_numpy()[window]
    for name, position, characters in (("char_starts", "start", char_start), ("char_ends", "end", char_end)):
        first = 0
        for chunk in table[name].chunks:
            here = np.flatnonzero((window >= first) & (window < first + len(chunk)))
            offset = chunk.offsets.to_numpy()[window[here] - first] - context_start[here]
            characters[here] = chunk.values.to_numpy()[offset + spans[position][here]]
            first += len(chunk)
    return char_start, char_end


# ---------------------------------------------------------------------------------------------------------------------
# Span search


# A span of a window, or with start and end -1 its null answer.
_SPAN = np.dtype(
    [
        ("window", np.int32),  # row in the features
        ("start", np.int32),  # position in the window
        ("end", np.int32),  # the same, of the last token
        ("start_logit", np.float32),
        ("end_logit", np.float32),
    ]
)


def _score(spans: np.ndarray) -> np.ndarray:
    return spans["start_logit"] + spans["end_logit"]


def best_first(example: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(spans,) int64: the order by example, and in it by falling score; what is equal in both stays as it stands.

    example: (spans,) int; score: (spans,) float32. On one key, nearly in order, the sort takes less than `lexsort`.
    """
    return np.argsort((example.astype(np.int64) << 32) - _sortable(torch.from_numpy(score)).numpy(), kind="stable")


def best_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    bounds: torch.Tensor,
    n_best_size: int,
    max_answer_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best spans of each window, best first; see AnswerSearch.

    start_logits, end_logits: (batch, padded length) float32, -inf at padding. bounds: (batch, 3), the window's tokens
    and the positions of the context's first token and after its last one. Returns start and end positions side by side,
    int32 of shape (batch, 2 n_best_size) with -1 where there are fewer spans, and their start and end logits, float32,
    likewise.
    """
    context_start, context_end = bounds[:, 1:2], bounds[:, 2:]
    start_logit, start = _largest(start_logits, n_best_size)  # (batch, n)
    end_logit, end = _largest(end_logits, n_best_size)

    start_score = start_logit.masked_fill((start < context_start) | (start >= context_end), -math.inf)
    end_score = end_logit.masked_fill(end >= context_end, -math.inf)
    more_tokens = end[:, None, :] - start[:, :, None]  # (batch, n, n)
    score = start_score[:, :, None] + end_score[:, None, :]
    score.masked_fill_((more_tokens < 0) | (more_tokens >= max_answer_length), -math.inf)
    score, pair = _largest(score.flatten(1), n_best_size)  # (batch, up to n)
    start_rank, end_rank = pair // end.shape[1], pair % end.shape[1]
    columns = []
    for values, rank, nothing in (
        (start, start_rank, -1),
        (end, end_rank, -1),
        (start_logit, start_rank, 0.0),
        (end_logit, end_rank, 0.0),
    ):
        column = values.gather(1, rank).masked_fill(score == -math.inf, nothing)
        columns.append(torch.nn.functional.pad(column, (0, n_best_size - column.shape[1]), value=nothing))
    return torch.cat(columns[:2], dim=1).int(), torch.cat(columns[2:], dim=1)


def window_losses(start_logits: torch.Tensor, end_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss that each window would have in training, were it alone in its batch: (batch,) float32.

    That is the mean of the cross entropies of start and end, as in `BertForQuestionAnswering`, over the window's own
    tokens. start_logits, end_logits: (batch, padded length) float32, -inf at padding; labels: (batch, 2) int64, first
    and last token.
    """
    start, end = (
        torch.nn.functional.cross_entropy(logits, position, reduction="none")
        for logits, position in zip((start_logits, end_logits), labels.T, strict=True)
    )
    return start / 2 + end / 2  # which two large ones do not overflow


def _largest(values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest float32 values of each row and their columns, descending; equal values by column.

    values: (rows, columns). Returns values and columns, (rows, min(n, columns)).
    """
    num_columns = values.shape[1]
    # One integer that sorts like (value, lower column first) makes topk, which is not stable, exact about ties.
    later = torch.arange(num_columns - 1, -1, -1, device=values.device)
    keys = torch.add(later, _sortable(values), alpha=2**32)
    n = min(n, num_columns)
    if keys.device.type == "cpu":  # several times faster there
        top = np.partition(keys.numpy(), num_columns - n, axis=1)[:, num_columns - n :]
        top = torch.from_numpy(np.sort(top, axis=1)[:, ::-1].copy())
    else:
        top = keys.topk(n, dim=1).values
    columns = num_columns - 1 - (top & 0xFFFFFFFF)
    return values.gather(1, columns), columns


def _sortable(values: torch.Tensor) -> torch.Tensor:
    """An int64 of 32 bits for each float32, which sorts like it.

    Bits of floats, read as integers, sort like the floats once those of negative ones, all but the sign, are flipped.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which it equals
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _unpack(found: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What `AnswerSearch.find` has put side by side, floats as their bits.

    That is the window, whether its logits can be used, start and end logit of the null answer, and then of the spans
    all starts, all ends, all start logits and all end logits.

    found: (windows, 4 + 4 n or more) int32. Returns the null answers, (windows,) of _SPAN, and the spans, (windows, n).
    """
    nulls, spans = np.empty(len(found), _SPAN), np.empty((len(found), n), _SPAN)
    nulls["window"], spans["window"] = found[:, 0], found[:, :1]
    nulls["start"] = nulls["end"] = -1
    nulls["start_logit"], nulls["end_logit"] = found[:, 2:4].view(np.float32).T
    spans["start"], spans["end"] = found[:, 4 : 4 + n], found[:, 4 + n : 4 + 2 * n]
    logits = found[:, 4 + 2 * n : 4 + 4 * n].view(np.float32)
    spans["start_logit"], spans["end_logit"] = logits[:, :n], logits[:, n:]
    return nulls, spans


# ---------------------------------------------------------------------------------------------------------------------
# n-best lists


class _Candidates(NamedTuple):
    """Possible answers, one entry each, sorted by example."""

    example: np.ndarray
    score: np.ndarray  # float32, start_logit + end_logit
    start_logit: np.ndarray
    end_logit: np.ndarray
    char_start: np.ndarray  # -1 if the answer is no span of the context
    char_end: np.ndarray


def _not_a_span(example, start_logit, end_logit) -> _Candidates:
    nowhere = np.full(len(example), -1)
    return _Candidates(example, start_logit + end_logit, start_logit, end_logit, nowhere, nowhere)


def _n_best(spans: _Candidates, nulls: _Candidates | None, n_best_size: int, num_examples: int) -> _Candidates:
    """The n-best list of each example. The null answer is never cut off: where it ranks lower, it is one more."""
    if nulls is not None:
        spans = _Candidates(*(np.concatenate(columns) for columns in zip(spans, nulls, strict=True)))
    # A stable sort: equal scores keep the order of windows and ranks, and the null answer comes last among equals.
    order = best_first(spans.example, spans.score)
    candidates = _Candidates(*(column[order] for column in spans))
    bounds = np.searchsorted(candidates.example, np.arange(num_examples))
    rank = np.arange(len(candidates.example)) - bounds[candidates.example]
    keep = (rank < n_best_size) | (candidates.char_start < 0)
    candidates = _Candidates(*(column[keep] for column in candidates))

    answered = np.zeros(num_examples, dtype=bool)
    answered[candidates.example[candidates.char_end > candidates.char_start]] = True
    unanswered = np.flatnonzero(~answered)
    if not len(unanswered):
        return candidates
    zeros = np.zeros(len(unanswered), dtype=np.float32)
    first = np.searchsorted(candidates.example, unanswered)
    empty = _not_a_span(unanswered, zeros, zeros)
    return _Candidates(*(np.insert(c, first, e) for c, e in zip(candidates, empty, strict=True)))


def _to_predictions(
    candidates: _Candidates,
    nulls: _Candidates | None,
    ids: list[str],
    contexts: list[str],
    null_score_diff_threshold: float,
) -> QAPredictions:
    bounds = np.searchsorted(candidates.example, np.arange(len(ids) + 1))
    starts, ends = candidates.char_start.tolist(), candidates.char_end.tolist()
    rows = zip(candidates.example.tolist(), starts, ends, strict=True)
    texts = [contexts[example][start:end] for example, start, end in rows]
    nowhere = candidates.char_start < 0
    table = pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "probability": _softmax(candidates.score.astype(np.float64), candidates.example, bounds[:-1]),
            "start_logit": candidates.start_logit,
            "end_logit": candidates.end_logit,
            "start": pa.array(candidates.char_start, mask=nowhere),
            "end": pa.array(candidates.char_end, mask=nowhere),
        }
    )
    n_best = NBest(ids, table, bounds.tolist())

    # The best answer that is not empty; where no span is, the placeholder that _n_best put first.
    best = bounds[:-1].copy()
    spans = np.flatnonzero(candidates.char_end > candidates.char_start)
    with_span, first = np.unique(candidates.example[spans], return_index=True)
    best[with_span] = spans[first]
    best_non_null = {id_: texts[i] for id_, i in zip(ids, best.tolist(), strict=True)}
    if nulls is None:
        answers = {id_: texts[i] for id_, i in zip(ids, bounds[:-1].tolist(), strict=True)}
        return QAPredictions(answers, n_best, None, best_non_null)
    odds = (nulls.score - candidates.start_logit[best] - candidates.end_logit[best]).tolist()
    null_odds = dict(zip(ids, odds, strict=True))
    answers = {id_: "" if null_odds[id_] > null_score_diff_threshold else text for id_, text in best_non_null.items()}
    return QAPredictions(answers, n_best, null_odds, best_non_null)


def _join(pieces: list[QAPredictions], ids: list[str]) -> QAPredictions:
    """The answers to the questions `ids`, from those to some of them after the other."""
    tables = [piece.n_best.table for piece in pieces]
    first = np.cumsum([0] + [len(table) for table in tables]).tolist()
    bounds = [begin + bound for begin, piece in zip(first, pieces, strict=False) for bound in piece.n_best.bounds[:-1]]
    answers, n_best, null_odds, best_non_null = zip(*pieces, strict=True)
    return QAPredictions(
        answers=_merged(answers),
        n_best=NBest(ids, pa.concat_tables(tables), [*bounds, first[-1]]),
        null_odds=None if null_odds[0] is None else _merged(null_odds),
        best_non_null=_merged(best_non_null),
    )


def _merged(parts: Sequence[dict]) -> dict:
    return {id_: value for part in parts for id_, value in part.items()}


def _softmax(scores: np.ndarray, example: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Softmax over the scores of each example. example: (scores,), ascending; first: where each example begins."""
    if not len(first):
        return scores
    exp = np.exp(scores - np.maximum.reduceat(scores, first)[example])
    return exp / np.add.reduceat(exp, first)[example]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_predictions(qa_predictions: QAPredictions, output_dir: str, prefix: str) -> None:
    """Write {prefix}_predictions.json, {prefix}_nbest_predictions.json and, for version 2, {prefix}_null_odds.json."""
    os.makedirs(output_dir, exist_ok=True)
    write_text(os.path.join(output_dir, f"{prefix}_predictions.json"), _flat_json(qa_predictions.answers))
    write_text(os.path.join(output_dir, f"{prefix}_nbest_predictions.json"), _n_best_json(qa_predictions.n_best))
    if qa_predictions.null_odds is not None:
        write_text(os.path.join(output_dir, f"{prefix}_null_odds.json"), _flat_json(qa_predictions.null_odds))


def _flat_json(by_id: dict[str, str] | dict[str, float]) -> Iterator[str]:
    """The text of json.dumps(by_id, indent=4), in pieces; without indent, json takes its encoder in C."""
    text = json.dumps(by_id, separators=(",\n    ", ": "), allow_nan=False)
    yield "{\n    " + text[1:-1] + "\n}\n" if by_id else "{}\n"


def _n_best_json(n_best: NBest) -> Iterator[str]:
    """The text of json.dumps(dict(n_best), indent=4), in pieces.

    Put together by Arrow: the standard encoder in Python takes longer than all the rest of post-processing.
    """
    quote = json.encoder.encode_basestring_ascii
    ids = list(n_best)
    for first in range(0, len(ids), QUESTIONS_PER_PIECE):
        last = min(first + QUESTIONS_PER_PIECE, len(ids))
        bounds = np.array(n_best.bounds[first : last + 1], dtype=np.int32)
        rows = n_best.table[bounds[0] : bounds[-1]]
        parts, separator = [], "            "
        for name in rows.column_names:
            if name == "text":
                values = pa.array([quote(text) for text in rows[name].to_pylist()], pa.string())
            else:
                values = _number_text(pa.concat_arrays(rows[name].chunks))
            parts += [f'{separator}"{name}": ', values]
            separator = ",\n            "
        entries = pc.binary_join_element_wise(*parts, "")
        lists = pc.binary_join(pa.ListArray.from_arrays(bounds - bounds[0], entries), "\n        },\n        {\n")
        keys = pa.array([quote(id_) for id_ in ids[first:last]], pa.string())
        questions = pc.binary_join_element_wise("    ", keys, ": [\n        {\n", lists, "\n        }\n    ]", "")
        yield ",\n" if first else "{\n"
        yield ",\n".join(questions.to_pylist())
    yield "\n}\n" if ids else "{}\n"


def _number_text(numbers: pa.Array) -> pa.Array:
    if pa.types.is_floating(numbers.type):
        numbers = numbers.cast(pa.float64())
    return numbers.cast(pa.string()).fill_null("null")


# ---------------------------------------------------------------------------------------------------------------------
# Metric


def squad_scores(
    examples: datasets.Dataset, qa_predictions: QAPredictions, null_score_diff_threshold: float = 0.0
) -> dict[str, float]:
    """Compare the answers with the gold answers of `examples` (columns id, answers); `SquadMetric` explains the keys.

    For version 2 (null odds are there) the best non-null answers are scored, as "" where the null odds exceed the
    threshold; those are the answers that `postprocess_qa_predictions` gives for the same threshold.

    Raises ValueError for examples without gold answers, or with a question that has no prediction (names it).
    """
    if "answers" not in examples.column_names:
        raise QAError("the examples have no gold answers (column answers): predict them, they cannot be evaluated")
    ids = column(examples, "id").to_pylist()
    golds = pc.struct_field(column(examples, "answers"), "text").to_pylist()
    odds = qa_predictions.null_odds
    answers = qa_predictions.answers if odds is None else qa_predictions.best_non_null
    return _squad_evaluate(ids, golds, answers, odds, null_score_diff_threshold)


class SquadMetric(evaluate.Metric):
    """The official SQuAD metric, as transformers 4's `squad_evaluate` computes it; needs no network.

    `SquadMetric().compute(predictions=[{id, prediction_text}], references=[{id, answers: {text, answer_start}}])` for
    version 1. For version 2, `SquadMetric("squad_v2")` takes predictions with a no_answer_probability as well (any
    number that grows with the belief that there is no answer: null odds will do), and `compute` a no_answer_threshold:
    a prediction whose no_answer_probability exceeds it counts as "". A question without an answer has no answer text.

    Returns, in percent, exact, f1 and total; the same over the questions with an answer (HasAns_*) and without one
    (NoAns_*), where there are any; for version 2 best_exact, best_exact_thresh, best_f1 and best_f1_thresh.

    The best scores are the highest that exact and f1 reach with any no_answer_threshold, each with the lowest threshold
    that reaches it. They equal `squad_evaluate`'s, save where that claims a score that no threshold reaches, or gives
    a threshold that does not: it breaks up questions of equal probability, counts a prediction without a word ("the")
    as wrong where there is no answer, and says 0 for answering nothing even if probabilities are not above 0.
    """

    def _info(self):
        if self.config_name not in ("default", "squad", "squad_v2"):
            raise QAError(f"SquadMetric has no configuration {self.config_name!r}: use squad or squad_v2")
        text = datasets.Value("string")
        prediction = {"id": text, "prediction_text": text}
        if self.config_name == "squad_v2":
            prediction["no_answer_probability"] = datasets.Value("float64")
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Rajpurkar et al. 2016 (SQuAD) and 2018 (SQuAD 2.0)",
            features=datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}}),
        )

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        texts = {p["id"]: p["prediction_text"] for p in predictions}
        odds = None
        if self.config_name == "squad_v2":
            odds = {p["id"]: p["no_answer_probability"] for p in predictions}
        ids = [r["id"] for r in references]
        golds = [r["answers"]["text"] for r in references]
        return _squad_evaluate(ids, golds, texts, odds, no_answer_threshold)


def _squad_evaluate(
    ids: Sequence[str],
    golds: Sequence[Sequence[str]],
    predictions: dict[str, str],
    null_odds: dict[str, float] | None,
    threshold: float,
) -> dict[str, float]:
    if not ids:
        raise QAError("there is no question to evaluate: give an evaluation set that is not empty")
    for name, by_id in (("answer", predictions), ("null odds", null_odds)):
        missing = [] if by_id is None else [id_ for id_ in ids if id_ not in by_id]
        if missing:
            raise QAError(f"{len(missing)} questions have no {name} (first ids: {', '.join(missing[:5])})")
    texts = [predictions[id_] for id_ in ids]
    exact, f1 = raw_scores(golds, texts)
    has_answer = [bool(gold) for gold in golds]
    sweep = {}
    if null_odds is not None:
        odds = [null_odds[id_] for id_ in ids]
        sweep["best_exact"], sweep["best_exact_thresh"] = _best_threshold(exact, has_answer, odds)
        sweep["best_f1"], sweep["best_f1_thresh"] = _best_threshold(f1, has_answer, odds)
        null = [odd > threshold for odd in odds]
        exact, f1 = (
            [float(not a) if n else s for s, n, a in zip(scores, null, has_answer, strict=True)]
            for scores in (exact, f1)
        )
    metrics = _mean_scores(exact, f1)
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        rows = [i for i, answer in enumerate(has_answer) if answer is wanted]
        if rows:
            part = _mean_scores([exact[i] for i in rows], [f1[i] for i in rows])
            metrics.update({f"{prefix}_{key}": value for key, value in part.items()})
    return metrics | sweep


def _mean_scores(exact: list[float], f1: list[float]) -> dict[str, float]:
    total = len(exact)
    return {"exact": 100.0 * sum(exact) / total, "f1": 100.0 * sum(f1) / total, "total": total}


def _best_threshold(scores: list[float], has_answer: list[bool], null_odds: list[float]) -> tuple[float, float]:
    """Best mean score (percent) that a threshold on the null odds reaches, and the lowest such threshold.

    A question counts its score where its odds are at most the threshold, else 1 if it has no answer and 0 if it has.
    """
    odds = np.asarray(null_odds, dtype=np.float64)
    null_score = 1.0 - np.asarray(has_answer, dtype=np.float64)
    thresholds, rank = np.unique(odds, return_inverse=True)
    gain = np.bincount(rank, weights=np.asarray(scores) - null_score)
    total = np.cumsum(np.concatenate([[null_score.sum()], gain]))  # total[i]: the i lowest odds are answered
    best = int(np.argmax(total))
    # Answering nothing takes a threshold below all odds: 0, as ever, where all odds are above it.
    nothing = 0.0 if thresholds[0] > 0.0 else float(np.nextafter(thresholds[0], -np.inf))
    return 100.0 * float(total[best]) / len(scores), nothing if best == 0 else float(thresholds[best - 1])


def raw_scores(golds: list[list[str]], texts: list[str]) -> tuple[list[int], list[float]]:
    """Exact match and F1 of each text against the gold answer that suits it best."""
    normalized = {}

    def normalize(text):
        if text not in normalized:
            normalized[text] = normalize_answer(text)
        return normalized[text]

    exact, f1 = [], []
    for answers, text in zip(golds, texts, strict=True):
        prediction = normalize(text)
        # An answer of punctuation and articles only is none; without any, the right prediction is empty.
        answers = {a for a in map(normalize, answers) if a} or {""}
        if prediction in answers:
            exact.append(1)
            f1.append(1.0)
        else:
            exact.append(0)
            f1.append(max(_f1(answer.split(), prediction.split()) for answer in answers))
    return exact, f1


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and surplus white space (official SQuAD evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(gold_tokens: list[str], predicted_tokens: list[str]) -> float:
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    if not common:
        return 0.0
    precision = common / len(predicted_tokens)
    recall = common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)
