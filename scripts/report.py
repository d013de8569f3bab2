#!/usr/bin/env python
"""Writes report.html into the folder of an evaluated run: where the model answers well, and where it fails.

    python scripts/report.py OUTPUT_DIR

The page stands alone: it loads nothing and runs no script.
"""

import argparse
import dataclasses
import itertools
import math
import re
import string
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import transformers  # noqa: E402

from qa.checkpoints import QA_SETTINGS  # noqa: E402
from qa.files import OneLineParser, QAError, read_json, write_text  # noqa: E402
from qa.layouts import NO_START  # noqa: E402
from qa.load_model import load_tokenizer  # noqa: E402
from qa.read_squad import files_of, load_examples  # noqa: E402
from qa.squad_metric import raw_scores  # noqa: E402
from qa.train_questions import hold_out  # noqa: E402
from qa.windows import WindowSettings, make_features  # noqa: E402

TEMPLATE = Path(__file__).with_name("report_template.html")
WORST_QUESTIONS = 50
SURROUNDINGS = 1000  # characters that are shown of a context on each side of an answer
QUESTION_WORD = re.compile(r"\b(how many|how much|what|when|where|which|why|how|who)(?:(?<=who)(?:m|se))?\b")


class Question(NamedTuple):
    """One evaluated question, and how it was answered. A span is two character offsets, its end exclusive."""

    id: str
    question: str
    context: str
    answers: dict[str, list]  # the gold ones: text, answer_start
    answer: str
    span: tuple[int, int] | None  # of the answer; None for "no answer"
    probability: float  # of the answer
    exact: int
    f1: float
    num_windows: int | None  # None where it is not known


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="report.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run of run_squad.py with --do_eval")
    parser.add_argument("--validation_file", metavar="FILE", help="the file that was evaluated, if not known or moved")
    parser.add_argument("--dataset_name", metavar="NAME", help="the dataset of the hub that was evaluated")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of that dataset")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path = Path(args.output_dir, "report.html")
    try:
        write_text(path, [page(path.parent.resolve().name, *read_run(**vars(args)))])
    except QAError as error:
        parser.refuse(error)
    print(path)


# ---- Reading ----


def read_run(output_dir: str, **source: str | None) -> tuple[list[Question], dict[str, list[tuple[int, float]]]]:
    """The questions, and (step, value) of loss, eval_loss and eval_f1; `source` goes before the run's settings."""
    folder = Path(output_dir)
    answers, n_best = read_json(folder / "eval_predictions.json"), read_json(folder / "eval_nbest_predictions.json")
    if not answers or not n_best:
        raise QAError(f"{folder} holds no eval_predictions.json: run run_squad.py with --do_eval first")
    settings = read_json(folder / QA_SETTINGS)
    examples = read_examples(folder, settings, source, answers)
    golds, answers = examples["answers"], [answers[id_] for id_ in examples["id"]]
    exact, f1 = raw_scores([gold["text"] for gold in golds], answers)
    num_windows = count_windows(folder, settings, examples)
    questions = []
    for row, answer, *scores in zip(examples, answers, exact, f1, num_windows, strict=True):
        candidates = n_best.get(row["id"], [])
        spans = [(c["start"], c["end"]) for c in candidates if c["text"] == answer]
        if not spans:
            raise QAError(f"{folder}: its eval_*.json files are of different evaluations: evaluate again")
        # A span that several windows see stands in the list once for each.
        probability = sum(c["probability"] for c in candidates if (c["start"], c["end"]) == spans[0])
        span = None if spans[0][0] is None else spans[0]
        asked = (row[name] for name in ("id", "question", "context", "answers"))
        questions.append(Question(*asked, answer, span, probability, *scores))
    log = read_json(folder / "trainer_state.json").get("log_history", [])
    history = {
        name: [(entry["step"], entry[name]) for entry in log if math.isfinite(entry.get(name, math.nan))]
        for name in ("loss", "eval_loss", "eval_f1")
    }
    return questions, history


def read_examples(folder: Path, settings: dict, source: dict, answers: dict) -> datasets.Dataset:
    """The questions that were answered, with contexts and gold answers."""
    split, percentage = "validation", None
    if not (source["validation_file"] or source["dataset_name"]):
        source, percentage = settings, settings.get("validation_split_percentage")
    file, name, config_name = map(source.get, ("validation_file", "dataset_name", "dataset_config_name"))
    if percentage:  # a part of the training data was evaluated
        split, file = "train", settings["train_file"]
    if not (file or name):
        raise QAError(f"{folder} does not say which questions were evaluated: give --validation_file or --dataset_name")
    if file and not all(Path(found).exists() for found in files_of(file).values()):
        raise QAError(f"{file}, which was evaluated, is not there: give --validation_file")
    splits = load_examples(name, config_name, {split: file}, settings.get("cache_dir"))
    if percentage:
        splits = hold_out(splits, percentage, settings["seed"], file or name)
    if "validation" not in splits or "answers" not in splits["validation"].column_names:
        raise QAError(f"{file or name} has no validation questions with gold answers: give --validation_file")
    examples = splits["validation"]
    missing = sorted(answers.keys() - set(examples["id"]))
    if missing:
        raise QAError(
            f"{file or name} is not what was evaluated in {folder}: it lacks {len(missing)} of its questions (first "
            f"ids: {', '.join(missing[:5])}); give --validation_file"
        )
    return examples.select([row for row, id_ in enumerate(examples["id"]) if id_ in answers])


def count_windows(folder: Path, settings: dict, examples: datasets.Dataset) -> list[int] | list[None]:
    """How many windows each question has; Nones where the run's settings or its tokenizer are not there."""
    own = (folder / "tokenizer_config.json").exists()
    try:
        windows = WindowSettings(**{field.name: settings[field.name] for field in dataclasses.fields(WindowSettings)})
        tokenizer = load_tokenizer(str(folder) if own else settings["tokenizer_name"], cache_dir=settings["cache_dir"])
    except (KeyError, QAError):
        return [None] * len(examples)
    return np.bincount(make_features(examples, tokenizer, windows)["example_index"], minlength=len(examples)).tolist()


# ---- Groups of questions ----


def question_word(question: str) -> str:
    found = QUESTION_WORD.search(question.lower())
    return found[1] if found else "other"


def range_name(value: int, edges: list[int]) -> str:
    """The range of edges that a count lies in: edges [1, 2, 5] are "1", "2", "3–5" and "6+"; [50, 99] begin "≤ 50"."""
    if value <= edges[0]:
        return f"≤ {edges[0]}" if edges[0] > 1 else str(edges[0])
    for lower, upper in itertools.pairwise(edges):
        if value <= upper:
            return str(upper) if upper == lower + 1 else f"{lower + 1}–{upper}"
    return f"{edges[-1] + 1}+"


def group(questions: Iterable[Question], key: Callable[[Question], str]) -> dict[str, list[Question]]:
    groups = {}
    for question in questions:
        groups.setdefault(key(question), []).append(question)
    return groups


def mean(questions: list[Question], name: str) -> float:
    return sum(getattr(q, name) for q in questions) / len(questions)


def tenth(probability: float) -> str:
    lower = min(int(10 * probability), 9)
    return f"{lower / 10}–{(lower + 1) / 10}"


def calibration_error(groups: dict[str, list[Question]]) -> float:
    """How far the probabilities are from the shares of exact answers, averaged over questions."""
    gaps = [abs(mean(part, "probability") - mean(part, "exact")) * len(part) for part in groups.values()]
    return sum(gaps) / sum(map(len, groups.values()))


def worst(questions: list[Question]) -> list[Question]:
    """The wrong answers, those with the lowest f1 first, and of these the surest first."""
    wrong = [question for question in questions if not question.exact]
    return sorted(wrong, key=lambda q: (q.f1, -q.probability))


# ---- Page ----


def page(name: str, questions: list[Question], history: dict[str, list[tuple[int, float]]]) -> str:
    """The whole page; nothing in it comes from elsewhere, and every text of the data is escaped."""
    wrong = worst(questions)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        tiles=tiles(questions),
        cards=training_card(history) + group_cards(questions),
        wrong=f"{len(wrong):,} of {len(questions):,}",
        worst="".join(map(worst_item, wrong[:WORST_QUESTIONS])),
    )


def tiles(questions: list[Question]) -> str:
    shown = {name: f"{100 * mean(questions, name):.2f}" for name in ("f1", "exact")}
    kinds = group(questions, lambda q: "f1, with an answer" if q.answers["text"] else "f1, without one")
    if len(kinds) == 2:
        shown |= {name: f"{100 * mean(part, 'f1'):.2f}" for name, part in sorted(kinds.items())}
    shown["questions"] = f"{len(questions):,}"
    return "".join(f"<div><b>{value}</b>{name}</div>" for name, value in shown.items())


def card(title: str, body: str, note: str = "") -> str:
    """`body` and `note` are HTML."""
    return f"<section><h2>{title}</h2><p class=note>{note}</p>{body}</section>"


def training_card(history: dict[str, list[tuple[int, float]]]) -> str:
    losses = {"training": history["loss"], "evaluation": history["eval_loss"]}
    highest = max((value for points in losses.values() for _, value in points), default=0)
    charts = line_chart("loss", losses, highest or 1) + line_chart("f1", {"f1": history["eval_f1"]}, 100)
    return card("Training", charts, "" if charts else "The folder's trainer_state.json is missing or holds no curve.")


def group_cards(questions: list[Question]) -> str:
    """f1 and exact by what the questions have in common."""

    def by_range(some: Iterable[Question], count: Callable[[Question], int], edges: list[int]) -> dict:
        return group(sorted(some, key=count), lambda q: range_name(count(q), edges))

    by_word = sorted(group(questions, lambda q: question_word(q.question)).items(), key=lambda item: -len(item[1]))
    with_answer = [q for q in questions if q.answers["text"]]
    by_answer = by_range(with_answer, lambda q: min(len(t.split()) for t in q.answers["text"]), [1, 2, 3, 5, 10])
    by_answer |= group((q for q in questions if not q.answers["text"]), lambda q: "no answer")
    by_context = by_range(questions, lambda q: len(q.context.split()), [50, 100, 150, 200, 300, 500])
    known = [q for q in questions if q.num_windows is not None]
    by_windows = by_range(known, lambda q: q.num_windows, [1, 2, 3, 4, 6, 10])
    unknown = f"Not known: the folder lacks {QA_SETTINGS}, or the tokenizer is not there."
    by_probability = group(sorted(questions, key=lambda q: q.probability), lambda q: tenth(q.probability))
    error = f"expected calibration error {calibration_error(by_probability):.3f}"
    return (
        card("Question word", bar_chart(dict(by_word)), "the first in the question")
        + card("Answer length", bar_chart(by_answer), "words of the shortest gold answer")
        + card("Context length", bar_chart(by_context), "words")
        + card("Number of windows", bar_chart(by_windows), "that the context is cut into" if known else unknown)
        + card("Calibration", bar_chart(by_probability), f"probability that the model gives its answer; {error}")
    )


def bar_chart(groups: dict[str, list[Question]]) -> str:
    """A table with a row for each group: f1 as a light bar, exact as a dark one in front, and how many questions."""
    rows = f"<tr><td><td><td>{key('light', 'f1')}<td>{key('exact', 'exact')}<td>questions"
    for name, questions in groups.items():
        f1, exact = 100 * mean(questions, "f1"), 100 * mean(questions, "exact")
        bar = f'<i style="--f1: {f1:.1f}%; --exact: {exact:.1f}%"></i>'
        rows += f"<tr><th>{name}<td>{bar}<td>{f1:.1f}<td>{exact:.1f}<td>{len(questions):,}"
    return f"<table>{rows}</table>" if groups else ""


def line_chart(title: str, lines: dict[str, list[tuple[int, float]]], y_end: float) -> str:
    """Lines of (step, value) by name. It is 360 units wide, as a phone, so that its text stays readable there."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    left, right, top, bottom = 42, 330, 10, 130
    x_end = max(step for points in lines.values() for step, _ in points)

    def x(step: float) -> float:
        return round(left + step / x_end * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - value / y_end * (bottom - top), 1)

    parts = []
    for share in (0, 0.5, 1):
        step, value = share * x_end, share * y_end
        parts.append(f'<text x="{x(step)}" y="{bottom + 17}" text-anchor="middle">{step:.6g}</text>')
        parts.append(f'<path d="M{left} {y(value)}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4}" text-anchor="end">{value:.3g}</text>')
    for name, points in lines.items():
        parts.append(f'<polyline points="{" ".join(f"{x(s)},{y(v)}" for s, v in points)}" class="{name}"/>')
        for step, value in points:
            dot = f'<circle cx="{x(step)}" cy="{y(value)}" r="2.5" class="{name}">'
            parts.append(f"{dot}<title>step {step}: {value:.4g}</title></circle>")
    legend = "".join(key(name, f"{name} {points[-1][1]:.4g}") for name, points in lines.items())
    svg = f'<svg viewBox="0 0 360 {bottom + 22}" role="img">{"".join(parts)}</svg>'
    return f"<p class=note>{title} over steps {legend}</p>{svg}"


def key(kind: str, name: str) -> str:
    """An entry of a legend."""
    return f'<b class="key {kind}"></b>{name}'


# ---- Worst questions ----


def worst_item(question: Question) -> str:
    golds = dict.fromkeys(question.answers["text"]) or ["no answer"]
    marked = [f"<mark class=gold><bdi>{escape(gold)}</bdi></mark>" for gold in golds]
    return f"""<li>
<h3 dir="auto">{escape(question.question)}</h3>
<p>gold {" <i>or</i> ".join(marked)}
<p>predicted <mark class=pred><bdi>{escape(question.answer) or "no answer"}</bdi></mark>
<span class=note>probability {question.probability:.2f}, f1 {question.f1:.2f}</span>
<p class=context dir="auto">{marked_context(question)}</p>
<p class=note>{escape(question.id)}
"""


def marked_context(question: Question) -> str:
    """The context as HTML, gold and predicted answer marked; of a long one what surrounds them."""
    length = len(question.context)
    golds = zip(question.answers["answer_start"], question.answers["text"], strict=True)
    spans = [(start, start + len(text), 1) for start, text in golds if start != NO_START]
    spans += [(*question.span, 2)] if question.span else []
    kinds = np.zeros(length, np.int8)  # of each character, its place in KINDS
    shown = np.zeros(length, bool)
    for start, end, mark in spans or [(0, 0, 0)]:
        kinds[max(start, 0) : max(end, 0)] |= mark
        shown[max(start - SURROUNDINGS, 0) : max(end + SURROUNDINGS, 0)] = True
    kinds[~shown] = KINDS.index(CUT)
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), length]
    parts = [(KINDS[kinds[start]], question.context[start:end]) for start, end in itertools.pairwise(edges)]
    return "".join(kind.format(escape(text)) for kind, text in parts)


CUT = " <i>…</i> "
KINDS = ("{}", *(f"<mark class={kind}>{{}}</mark>" for kind in ("gold", "pred", "both")), CUT)


if __name__ == "__main__":
    main()
