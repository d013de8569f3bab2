"""Answers against a plain version of run_qa.py's algorithm; the metric against transformers 4.57.6 and by hand."""

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from utils_qa import postprocess_qa_predictions

EVALUATION_FEATURES = Features(
    {
        "length": Value("int32"),
        "example_index": Value("int32"),
        "context_start": Value("int32"),
        "char_starts": List(Value("int32")),
        "char_ends": List(Value("int32")),
    }
)


def plain_postprocess(examples, features, predictions, *, version_2, n_best_size, max_answer_length, threshold):
    """run_qa.py's algorithm, one span at a time; stable sorts, padding cut off, "" where run_qa.py writes "empty"."""
    answers, n_best, null_odds, best_non_null = {}, {}, {}, {}
    for example_index, example in enumerate(examples):
        null, spans = None, []
        for window, feature in enumerate(features):
            if feature["example_index"] != example_index:
                continue
            start_logits, end_logits = (np.float32(logits[window][: feature["length"]]) for logits in predictions)
            null_score = start_logits[0] + end_logits[0]
            if null is None or null_score < null["score"]:
                null = entry(null_score, start_logits[0], end_logits[0], None, None)
            for start in sorted(range(feature["length"]), key=lambda i: -start_logits[i])[:n_best_size]:
                for end in sorted(range(feature["length"]), key=lambda i: -end_logits[i])[:n_best_size]:
                    first, last = start - feature["context_start"], end - feature["context_start"]
                    if first < 0 or last >= len(feature["char_starts"]) or start > end:
                        continue
                    if end - start + 1 > max_answer_length:
                        continue
                    score = start_logits[start] + end_logits[end]
                    chars = feature["char_starts"][first], feature["char_ends"][last]
                    spans.append(entry(score, start_logits[start], end_logits[end], *chars))
        if version_2:
            spans.append(null)
        kept = sorted(spans, key=lambda span: -span["score"])[:n_best_size]
        if version_2 and not any(span is null for span in kept):
            kept.append(null)
        for span in kept:
            span["text"] = "" if span["start"] is None else example["context"][span["start"] : span["end"]]
        if not any(span["text"] for span in kept):
            kept.insert(0, entry(np.float32(0), np.float32(0), np.float32(0), None, None) | {"text": ""})
        scores = np.array([span.pop("score") for span in kept], dtype=np.float64)
        for span, exp in zip(kept, np.exp(scores - scores.max()), strict=True):
            span["probability"] = exp / np.exp(scores - scores.max()).sum()
        best = next((span for span in kept if span["text"]), kept[0]) if version_2 else kept[0]
        id_ = example["id"]
        null_odds[id_] = float(null_score_of(null) - best["start_logit"] - best["end_logit"])
        best_non_null[id_] = best["text"]
        answers[id_] = "" if version_2 and null_odds[id_] > threshold else best["text"]
        n_best[id_] = [{key: as_python(value) for key, value in span.items()} for span in kept]
    return answers, n_best, null_odds if version_2 else None, best_non_null


def entry(score, start_logit, end_logit, start, end):
    return {"score": score, "start_logit": start_logit, "end_logit": end_logit, "start": start, "end": end}


def null_score_of(null):
    return null["start_logit"] + null["end_logit"]


def as_python(value):
    return float(value) if isinstance(value, np.floating) else value


@st.composite
def cases(draw):
    """Examples of up to 3 windows in shuffled order, and logits from few values (ties) or many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    examples, features = [], []
    for i in range(draw(st.integers(1, 4))):
        num_tokens = int(rng.integers(0, 12))
        widths = rng.integers(0 if rng.random() < 0.2 else 1, 4, num_tokens)
        ends = np.cumsum(widths + rng.integers(0, 2, num_tokens))
        starts = ends - widths
        examples.append({"id": f"q{i}", "context": "".join(rng.choice(list('aé漢🙂 \n"'), int(ends.max(initial=0))))})
        step, size = int(rng.integers(1, 5)), int(rng.integers(5, 9))
        for first in range(0, max(num_tokens - size + step, 1), step):
            context_start = int(rng.integers(1, 6))
            window = slice(first, first + size)
            features.append(
                {
                    "length": context_start + len(starts[window]) + int(rng.integers(0, 2)),
                    "example_index": i,
                    "context_start": context_start,
                    "char_starts": starts[window].tolist(),
                    "char_ends": ends[window].tolist(),
                }
            )
    rng.shuffle(features)
    shape = (len(features), 16)
    kind = draw(st.sampled_from(["normal", "ties", "question", "padding", "signed zeros"]))
    logits = [rng.normal(0, 3, shape).astype(np.float32) for _ in range(2)]
    for array in logits:
        if kind == "ties":
            array[:] = rng.integers(-1, 2, shape)
        if kind == "signed zeros":
            array[:] = rng.choice([0.0, -0.0, 1.0], shape)
        for row, feature in zip(array, features, strict=True):
            if kind == "question":
                row[: feature["context_start"]] += 50
            row[feature["length"] :] = 1e9 if kind == "padding" else rng.choice([-100.0, np.nan, np.inf, 0.0])
    return Dataset.from_list(examples), Dataset.from_list(features, features=EVALUATION_FEATURES), tuple(logits)


@given(cases(), st.booleans(), st.integers(1, 25), st.integers(1, 12), st.sampled_from([-2.0, 0.0, 1.5]))
@settings(max_examples=150, deadline=None)
def test_answers_equal_the_plain_algorithm(case, version_2, n_best_size, max_answer_length, threshold):
    examples, features, logits = case
    ours = postprocess_qa_predictions(
        examples,
        features,
        logits,
        version_2_with_negative=version_2,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        null_score_diff_threshold=threshold,
    )
    answers, n_best, null_odds, best_non_null = plain_postprocess(
        examples,
        features,
        logits,
        version_2=version_2,
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
        threshold=threshold,
    )
    assert list(ours.answers.items()) == list(answers.items())
    assert ours.null_odds == null_odds
    assert ours.best_non_null == best_non_null
    for id_, entries in n_best.items():
        probabilities = [e.pop("probability") for e in entries]
        assert [{k: v for k, v in e.items() if k != "probability"} for e in ours.n_best[id_]] == entries
        assert [e["probability"] for e in ours.n_best[id_]] == pytest.approx(probabilities, rel=1e-9)
