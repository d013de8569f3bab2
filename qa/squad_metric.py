"""The official SQuAD metric in the interface of `evaluate`, which takes a second to import: so only scoring does."""

import functools
import re
import string
from collections import Counter

import evaluate
import numpy as np
from datasets import Features, List, Value

from qa.files import QAError


class SquadMetric(evaluate.Metric):
    """The official SQuAD metric, as transformers 4's `squad_evaluate` computes it; needs no network.

    `SquadMetric().compute(predictions=[{id, prediction_text}], references=[{id, answers: {text, answer_start}}])`
    for version 1. `SquadMetric("squad_v2")` takes predictions with a no_answer_probability as well (any number that
    grows with the belief that there is no answer), and `compute` a no_answer_threshold, above which "" counts.

    Returns, in percent, exact, f1 and total; the same over the questions with an answer (HasAns_*) and without one
    (NoAns_*), where there are any; for version 2 best_exact and best_f1, the highest that exact and f1 reach with
    any threshold, and best_exact_thresh and best_f1_thresh, the lowest that reaches them. (`squad_evaluate` may
    claim more, since it breaks up questions of equal probability, or less for predictions without a word.)
    """

    def _info(self):
        if self.config_name not in ("default", "squad", "squad_v2"):
            raise QAError(f"SquadMetric has no configuration {self.config_name!r}: use squad or squad_v2")
        text = Value("string")
        prediction = {"id": text, "prediction_text": text}
        if self.config_name == "squad_v2":
            prediction["no_answer_probability"] = Value("float64")
        answers = {"text": List(text), "answer_start": List(Value("int32"))}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Rajpurkar et al. 2016 (SQuAD) and 2018 (SQuAD 2.0)",
            features=Features({"predictions": prediction, "references": {"id": text, "answers": answers}}),
        )

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        by_id = {prediction["id"]: prediction for prediction in predictions}
        predictions = [by_id[reference["id"]] for reference in references]
        golds = [reference["answers"]["text"] for reference in references]
        odds = None
        if self.config_name == "squad_v2":
            odds = [prediction["no_answer_probability"] for prediction in predictions]
        texts = [prediction["prediction_text"] for prediction in predictions]
        return squad_evaluate(golds, texts, odds, no_answer_threshold)


def squad_evaluate(
    golds: list[list[str]], texts: list[str], null_odds: list[float] | None, threshold: float
) -> dict[str, float]:
    exact, f1 = raw_scores(golds, texts)
    has_answer = [bool(gold) for gold in golds]
    best = {}
    if null_odds is not None:
        best["best_exact"], best["best_exact_thresh"] = _best_threshold(exact, has_answer, null_odds)
        best["best_f1"], best["best_f1_thresh"] = _best_threshold(f1, has_answer, null_odds)
        for i, odds in enumerate(null_odds):
            if odds > threshold:
                exact[i] = f1[i] = float(not has_answer[i])
    metrics = {}
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        rows = [i for i, answer in enumerate(has_answer) if answer in wanted]
        if rows:
            metrics[f"{prefix}exact"] = 100.0 * sum(exact[i] for i in rows) / len(rows)
            metrics[f"{prefix}f1"] = 100.0 * sum(f1[i] for i in rows) / len(rows)
            metrics[f"{prefix}total"] = len(rows)
    return metrics | best


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
    normalize = functools.cache(normalize_answer)
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
