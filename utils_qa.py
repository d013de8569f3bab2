"""From start and end logits to answers, and from answers to scores.

`AnswerSearch` picks the answer spans from logits, a batch at a time (`postprocess_qa_predictions` from all at once),
`write_predictions` writes them, `squad_scores` compares them with the gold answers by `SquadMetric`.
"""

import functools
import json
import os
import tempfile
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.nn import functional as F

from qa.columns import column, distinct_texts
from qa.files import QAError, require_at_least_1, write_json, write_text
from qa.question_answering_pipeline import best_spans, choose_answer, n_best_entry, own_logits, rank_spans

QUESTIONS_PER_PIECE = 512  # whose spans are ranked, and whose contexts are read, at once: bounds the memory
WINDOWS_PER_BATCH = 128  # of logits that are in memory: what is made of them stays in the processor's cache
METRIC_NAMES = """
    exact f1 total HasAns_exact HasAns_f1 HasAns_total NoAns_exact NoAns_f1 NoAns_total
    best_exact best_exact_thresh best_f1 best_f1_thresh
""".split()


@dataclass
class AnswerSettings:
    """How answers are picked, see AnswerSearch."""

    n_best_size: int = field(
        default=20, metadata={"help": "How many start and end positions are combined, and how many answers kept."}
    )
    max_answer_length: int = field(default=30, metadata={"help": "Most tokens of an answer."})
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Some questions have no answer in their context, as in SQuAD 2.0."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Answer with nothing where its score is above the best answer's by more than this."},
    )

    def __post_init__(self):
        require_at_least_1(self, "n_best_size", "max_answer_length")


class NBest(UserDict):
    """The n-best list of each question, by question id; kept as JSON in UTF-8, a small part of its dicts' memory.

    A list holds, best first, dicts {text, probability, start_logit, end_logit, start, end}; start and end are
    character offsets into the context, the null answer has text "" and None for both.
    """

    def __setitem__(self, id_: str, entries: list[dict]) -> None:
        self.data[id_] = json.dumps(entries, allow_nan=False, ensure_ascii=False).encode()

    def __getitem__(self, id_: str) -> list[dict]:
        return json.loads(self.data[id_])


class QAPredictions(NamedTuple):
    """What the model answers, by question id, in the order of the examples.

    `answers`: the text that counts.
    `n_best`: the answers that came close, see NBest.
    `null_odds`: score of the null answer minus score of the best other one; None without `version_2_with_negative`.
    `best_non_null`: the best answer that is not empty, whatever its null odds; "" only if the question has no span.
    """

    answers: dict[str, str]
    n_best: NBest
    null_odds: dict[str, float] | None
    best_non_null: dict[str, str]


def postprocess_qa_predictions(
    examples: Dataset, features: Dataset, predictions: tuple[np.ndarray, np.ndarray], settings: AnswerSettings
) -> QAPredictions:
    """What AnswerSearch answers, from the logits of all windows at once.

    predictions: start and end logits, each (num_windows, padded length); row i belongs to features[i]. Raises QAError
    as AnswerSearch does, and for logits that do not fit the features.
    """
    search = AnswerSearch(examples, features, settings)
    longest = column(features, "length").to_numpy().max(initial=0)
    both_logits = [np.asarray(logits) for logits in predictions]
    for logits in both_logits:
        if logits.ndim != 2 or len(logits) != len(features) or logits.shape[1] < longest:
            raise QAError(
                f"logits have shape {logits.shape}, but the features have {len(features)} windows of up to {longest} "
                "tokens: pass the logits of these features"
            )
    for window in torch.arange(len(features)).split(WINDOWS_PER_BATCH):
        start_logits, end_logits = (torch.from_numpy(logits[window.numpy()]) for logits in both_logits)
        search.keep(search.find(window, start_logits, end_logits))
    return search.predictions()


# ---- From logits to answers ----


class AnswerSearch:
    """Turns the logits of windows, which come a batch at a time and in any order, into one answer a question.

    The algorithm is `postprocess_qa_predictions` of Hugging Face's run_qa.py. In each window the `n_best_size` best
    starts are combined with the `n_best_size` best ends. Spans inside the context, not reversed and of at most
    `max_answer_length` tokens, compete over all windows of the question by `span_score`. The null answer of a question
    is the first token of the window where that scores lowest; with `version_2_with_negative` it joins the n-best list
    (as the last one if it is not among the best) and is the answer where its odds exceed the threshold.

    What run_qa.py leaves to chance is fixed: equal logits and equal scores rank by position, then by window; padding
    takes no part; a question without any span is answered by "" (at logits 0.0), where run_qa.py writes "empty".
    Scores are float32, probabilities a float64 softmax over those of the n-best list. The n best spans of each window
    are kept on the device, 20 bytes each, until all have come.

    examples: columns id and context. features: columns example_index, length, context_start, char_starts, char_ends,
    and for `loss` start_positions and end_positions; windows in any order. device: where the logits will be.

    Raises QAError for features that are not those of `examples`.
    """

    def __init__(
        self, examples: Dataset, features: Dataset, settings: AnswerSettings, device: torch.device | str = "cpu"
    ):
        self.settings = settings
        self.examples = examples
        self.features = features
        self.ids = column(examples, "id").to_pylist()
        self.example = column(features, "example_index").to_numpy()  # (num_windows,) int32: the question of each window
        missing = np.setdiff1d(np.arange(len(self.ids)), self.example)
        if len(missing) or self.example.max(initial=-1) >= len(self.ids):
            raise QAError(
                f"{len(missing)} of {len(self.ids)} questions have no window in the features (first ids: "
                f"{', '.join(self.ids[i] for i in missing[:5])}), or others have: pass the features of these examples"
            )
        self.by_question = np.argsort(self.example, kind="stable")  # windows of a question in the features' order
        lengths, self.context_start = (column(features, name).to_numpy() for name in ("length", "context_start"))
        tokens = features.with_format("arrow", columns=["char_starts"])[:]["char_starts"]  # not copied from their file
        context_end = self.context_start + pc.list_value_length(tokens).to_numpy()
        # (num_windows, 3) int32: the window's tokens, positions of the first context token and after the last one.
        self.bounds = torch.from_numpy(np.stack([lengths, self.context_start, context_end], axis=1)).to(device)
        self.labels = None  # two of (num_windows,) int64
        if {"start_positions", "end_positions"} <= set(features.column_names):
            labels = (column(features, name).to_numpy() for name in ("start_positions", "end_positions"))
            self.labels = [torch.from_numpy(positions.astype(np.int64)).to(device) for positions in labels]
        self.kept: dict[str, torch.Tensor] = {}  # as `find` returns them, but (num_windows, ...)
        self.num_kept = 0

    def find(
        self, window: torch.Tensor, start_logits: torch.Tensor, end_logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The best spans of each window of a batch, for `keep`; only reads, and runs where the logits are.

        window: (batch,) int64, rows of the features; start_logits, end_logits: (batch, padded length), any float type.

        Returns what `best_spans` does, and of shape (batch,) window and, with labels, loss (float32).
        """
        bounds, settings = self.bounds[window], self.settings
        how = settings.n_best_size, settings.max_answer_length, settings.version_2_with_negative
        own = [own_logits(logits, bounds[:, :1], settings.n_best_size) for logits in (start_logits, end_logits)]
        found = {"window": window, **best_spans(*own, bounds, *how)}
        if self.labels is not None:
            found["loss"] = window_losses(*own, *(labels[window] for labels in self.labels))
        return found

    def keep(self, found: dict[str, torch.Tensor]) -> None:
        """Keeps what `find` found in some windows, each of which must come once; does not wait for the device."""
        for name, values in found.items():
            if name not in self.kept:
                self.kept[name] = values.new_full((len(self.example), *values.shape[1:]), -1)
            self.kept[name][found["window"]] = values
        self.num_kept += len(found["window"])

    def predictions(self) -> QAPredictions:
        """The answers, once all windows are kept. Raises as `results`."""
        predictions = QAPredictions({}, NBest(), {} if self.settings.version_2_with_negative else None, {})
        for first in range(0, len(self.ids), QUESTIONS_PER_PIECE):
            self._answer(range(first, min(first + QUESTIONS_PER_PIECE, len(self.ids))), predictions)
        return predictions

    def loss(self) -> float | None:
        """The mean of `window_losses` over all windows, inf or NaN where a label's logit is -inf; None without labels.

        Summed in float64 in the order of the windows, whatever their batches. Raises as `results`.
        """
        return None if self.labels is None else float(self.results["loss"].mean(dtype=np.float64))

    def unlikely_ids(self) -> list[str]:
        """Ids of questions with a window whose loss is inf or NaN."""
        return [self.ids[i] for i in np.unique(self.example[~np.isfinite(self.results["loss"])])]

    @functools.cached_property
    def results(self) -> dict[str, np.ndarray]:
        """What `find` returned, of all windows in the order of the features.

        Raises QAError unless each window was kept once; and for NaN, +inf or an overflow at a token of a window, and in
        version 2 for -inf at the null answer (names the questions).
        """
        results = {name: values.cpu().numpy() for name, values in self.kept.items()}
        if self.num_kept != len(self.example) or (results["window"] < 0).any():
            raise QAError(
                f"there are logits of {self.num_kept} windows, but the features have {len(self.example)}: "
                "each window must come once"
            )
        broken = [self.ids[i] for i in np.unique(self.example[~results["finite"]])]
        if broken:
            raise QAError(
                f"the logits of {len(broken)} questions hold NaN or infinity (first ids: {', '.join(broken[:5])}): "
                "the model diverged or overflowed; use an earlier checkpoint or a wider dtype"
            )
        return results

    def _answer(self, questions: range, predictions: QAPredictions) -> None:
        """Adds the answers to these questions to `predictions`."""
        first, last = np.searchsorted(self.example, (questions.start, questions.stop), sorter=self.by_question)
        windows = self.by_question[first:last]
        with_null = self.settings.version_2_with_negative
        row, rank = rank_spans(self.results["score"][windows], self.example[windows], with_null)
        window = windows[row]
        question = self.example[window] - questions.start
        is_null = rank == self.settings.n_best_size
        scores, *logits = (self.results[name][window, rank] for name in ("score", "start_logit", "end_logit"))
        texts = distinct_texts(self.examples, "context", slice(questions.start, questions.stop))
        contexts = np.array(texts.distinct.to_pylist(), dtype=object)[texts.row]
        columns = (contexts[question], is_null, *logits, *self._characters(window, rank))
        rows = zip(*(values.tolist() for values in columns), strict=True)
        entries = [n_best_entry(*row) for row in rows]
        scores = scores.tolist()
        bounds = np.searchsorted(question, range(len(questions) + 1)).tolist()
        threshold = self.settings.null_score_diff_threshold if with_null else None
        for i, id_ in enumerate(self.ids[questions.start : questions.stop]):
            listed = slice(bounds[i], bounds[i + 1])
            n_best, answer, best_non_null, null_odds = choose_answer(entries[listed], scores[listed], threshold)
            predictions.n_best[id_] = n_best
            predictions.answers[id_] = answer["text"]
            predictions.best_non_null[id_] = best_non_null["text"]
            if predictions.null_odds is not None:
                predictions.null_odds[id_] = null_odds

    def _characters(self, window: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Where these entries start and end in their contexts: (2, entries) int64; 0 for a null answer."""
        characters = np.zeros((2, len(window)), np.int64)
        spans = np.flatnonzero(rank < self.settings.n_best_size)
        if len(spans) == 0:
            return characters
        window, rank = window[spans], rank[spans]
        low = window.min()
        features = self.features.select(range(low, window.max() + 1))  # not all: `column` may copy them
        for i, name in enumerate(("start", "end")):
            by_token = column(features, f"char_{name}s")
            token = self.results[name][window, rank] - self.context_start[window]
            characters[i, spans] = by_token.values.to_numpy()[by_token.offsets.to_numpy()[window - low] + token]
        characters[1] = characters.max(axis=0)  # a span of white space alone ends before it starts
        return characters


def window_losses(
    start_logits: torch.Tensor, end_logits: torch.Tensor, start_positions: torch.Tensor, end_positions: torch.Tensor
) -> torch.Tensor:
    """The loss that each window would have in training, were it alone in its batch: (batch,) float32.

    That is the mean of the cross entropies of start and end, as in `BertForQuestionAnswering`, over the window's own
    tokens. start_logits, end_logits: (batch, columns) float32, -inf at padding; positions: (batch,) int64.
    """
    start_loss = F.cross_entropy(start_logits, start_positions, reduction="none")
    end_loss = F.cross_entropy(end_logits, end_positions, reduction="none")
    return start_loss / 2 + end_loss / 2  # which two large ones do not overflow


# ---- Files ----


def write_predictions(predictions: QAPredictions, output_dir: str, prefix: str) -> None:
    """Writes {prefix}_predictions.json, {prefix}_nbest_predictions.json and, for version 2, {prefix}_null_odds.json."""
    write_json(os.path.join(output_dir, f"{prefix}_predictions.json"), predictions.answers)
    write_text(os.path.join(output_dir, f"{prefix}_nbest_predictions.json"), _question_a_line(predictions.n_best))
    if predictions.null_odds is not None:
        write_json(os.path.join(output_dir, f"{prefix}_null_odds.json"), predictions.null_odds)


def _question_a_line(n_best: NBest) -> Iterator[str]:
    separator = "{\n"
    for id_, json_list in n_best.data.items():
        yield f"{separator}{json.dumps(id_, ensure_ascii=False)}: {json_list.decode()}"
        separator = ",\n"
    yield "\n}\n" if n_best else "{}\n"


# ---- Metric ----


def squad_scores(
    examples: Dataset, predictions: QAPredictions, null_score_diff_threshold: float = 0.0
) -> dict[str, float]:
    """Compares the answers with the gold answers of `examples` (columns id, answers) by `SquadMetric`.

    For version 2 (null odds are there) the best non-null answers are scored, as "" where the null odds exceed the
    threshold; those are the answers that `postprocess_qa_predictions` gives for the same threshold.

    Raises QAError for examples without gold answers, or with a question that has no prediction (names it).
    """
    from qa.squad_metric import SquadMetric

    if "answers" not in examples.column_names:
        raise QAError("the examples have no gold answers (column answers): predict them, they cannot be evaluated")
    ids = column(examples, "id").to_pylist()
    if not ids:
        raise QAError("there is no question to evaluate: give an evaluation set that is not empty")
    config, predicted = "squad", {"prediction_text": predictions.answers}
    if predictions.null_odds is not None:
        config = "squad_v2"
        predicted = {"prediction_text": predictions.best_non_null, "no_answer_probability": predictions.null_odds}
    missing = [id_ for id_ in ids if any(id_ not in by_id for by_id in predicted.values())]
    if missing:
        raise QAError(f"{len(missing)} questions have no prediction (first ids: {', '.join(missing[:5])})")
    answers = column(examples, "answers").to_pylist()
    with tempfile.TemporaryDirectory() as folder:  # `evaluate` makes an empty one even if all is kept in memory
        return SquadMetric(config, keep_in_memory=True, cache_dir=folder).compute(
            predictions=[{"id": id_, **{name: by_id[id_] for name, by_id in predicted.items()}} for id_ in ids],
            references=[{"id": id_, "answers": gold} for id_, gold in zip(ids, answers, strict=True)],
            no_answer_threshold=null_score_diff_threshold,
        )
