"""What transformers' run_qa.py does around the model, in its way, for benchmark.py to measure beside this program."""

import json
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np


def tokenize(batch, tokenizer, windows):
    return tokenizer(
        [question.lstrip() for question in batch["question"]],
        batch["context"],
        truncation="only_second",
        max_length=windows.max_seq_length,
        stride=windows.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def make_train_features(examples, tokenizer, windows):
    """Training features in the way of run_qa.py: every pair tokenized, then loops over its tokens."""

    def prepare(batch):
        encoded = tokenize(batch, tokenizer, windows)
        sample = encoded.pop("overflow_to_sample_mapping")
        starts, ends = [], []
        for i, offsets in enumerate(encoded.pop("offset_mapping")):
            sequence = encoded.sequence_ids(i)
            answers = batch["answers"][sample[i]]
            start = end = encoded["input_ids"][i].index(tokenizer.cls_token_id)
            if answers["text"]:
                start_char = answers["answer_start"][0]
                end_char = start_char + len(answers["text"][0])
                first, last = 0, len(sequence) - 1
                while sequence[first] != 1:
                    first += 1
                while sequence[last] != 1:
                    last -= 1
                if offsets[first][0] <= start_char and offsets[last][1] >= end_char:
                    while first < len(offsets) and offsets[first][0] <= start_char:
                        first += 1
                    while offsets[last][1] >= end_char:
                        last -= 1
                    start, end = first - 1, last + 1
            starts.append(start)
            ends.append(end)
        encoded["start_positions"], encoded["end_positions"] = starts, ends
        return encoded

    return examples.map(prepare, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)


def make_features(examples, tokenizer, windows):
    """Evaluation features in the way of run_qa.py: the id and the offsets of the context's tokens are kept."""

    def prepare(batch):
        encoded = tokenize(batch, tokenizer, windows)
        sample = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = [batch["id"][i] for i in sample]
        for i, offsets in enumerate(encoded["offset_mapping"]):
            sequence = encoded.sequence_ids(i)
            encoded["offset_mapping"][i] = [span if sequence[k] == 1 else None for k, span in enumerate(offsets)]
        return encoded

    return examples.map(prepare, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)


def write_answers(examples, features, logits, folder: str, n_best_size: int = 20, max_answer_length: int = 30) -> None:
    """Answers in the way of run_qa.py: every pair of a likely start and a likely end in a Python loop."""
    windows_of = defaultdict(list)
    for i, id_ in enumerate(features["example_id"]):
        windows_of[id_].append(i)
    answers, n_best_answers = {}, {}
    for example in examples:
        spans = []
        for i in windows_of[example["id"]]:
            start_logits, end_logits = logits[0][i], logits[1][i]
            offsets = features[i]["offset_mapping"]
            starts = np.argsort(start_logits)[-1 : -n_best_size - 1 : -1].tolist()
            ends = np.argsort(end_logits)[-1 : -n_best_size - 1 : -1].tolist()
            for start in starts:
                for end in ends:
                    if start >= len(offsets) or end >= len(offsets) or not offsets[start] or not offsets[end]:
                        continue
                    if end < start or end - start + 1 > max_answer_length:
                        continue
                    score = start_logits[start] + end_logits[end]
                    likes = {"score": score, "start_logit": start_logits[start], "end_logit": end_logits[end]}
                    spans.append({"offsets": (offsets[start][0], offsets[end][1]), **likes})
        best = sorted(spans, key=lambda span: span["score"], reverse=True)[:n_best_size]
        for span in best:
            start, end = span.pop("offsets")
            span["text"] = example["context"][start:end]
        if not best:
            best = [{"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0}]
        scores = np.array([span.pop("score") for span in best])
        exponentials = np.exp(scores - scores.max())
        for probability, span in zip(exponentials / exponentials.sum(), best, strict=True):
            span["probability"] = probability
        answers[example["id"]] = best[0]["text"]
        n_best_answers[example["id"]] = [
            {key: value if isinstance(value, str) else float(value) for key, value in span.items()} for span in best
        ]
    for name, value in (("predictions", answers), ("nbest_predictions", n_best_answers)):
        Path(folder, f"reference_{name}.json").write_text(json.dumps(value, indent=4) + "\n")


def score(examples, answers: dict[str, str]) -> dict[str, float]:
    """The official metric of version 1 in plain Python, question by question."""

    def normalize(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold: str, answer: str) -> float:
        gold_words, answer_words = normalize(gold).split(), normalize(answer).split()
        common = sum((Counter(gold_words) & Counter(answer_words)).values())
        if not gold_words or not answer_words:
            return float(gold_words == answer_words)
        return 2 * common / (len(gold_words) + len(answer_words))

    exact_scores, f1_scores = [], []
    for example in examples:
        golds = [text for text in example["answers"]["text"] if normalize(text)] or [""]
        answer = answers[example["id"]]
        exact_scores.append(max(int(normalize(gold) == normalize(answer)) for gold in golds))
        f1_scores.append(max(f1(gold, answer) for gold in golds))
    return {"exact": 100 * np.mean(exact_scores), "f1": 100 * np.mean(f1_scores), "total": len(examples)}
