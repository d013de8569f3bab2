#!/usr/bin/env python
"""Writes report.html into the folder of an evaluated run: where the model answers well, and where it fails.

    python scripts/report.py OUTPUT_DIR

The page stands alone: it loads nothing and runs no script.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import string
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import transformers  # noqa: E402

from qa.checkpoints import QA_SETTINGS  # noqa: E402
from qa.files import OneLineParser, QAError, one_line, write_text  # noqa: E402
from qa.layouts import NO_START  # noqa: E402
from qa.load_model import load_tokenizer  # noqa: E402
from qa.read_squad import load_examples  # noqa: E402
from qa.squad_metric import raw_scores  # noqa: E402
from qa.train_questions import hold_out  # noqa: E402
from qa.windows import WindowSettings, make_features  # noqa: E402
from utils_qa import QAPredictions, squad_scores  # noqa: E402

TEMPLATE = Path(__file__).with_name("report_template.html")
WORST_QUESTIONS = 50
LONGEST_CONTEXT = 2000  # characters; of a longer one only what surrounds the answers is shown
SURROUNDINGS = 300
QUESTION_WORDS = "what who when where which why how".split()
CALIBRATION_BINS = 10


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
    null_odds: float | None  # None for version 1
    num_windows: int | None  # None where it is not known


class Run(NamedTuple):
    name: str
    questions: list[Question]
    metrics: dict[str, float]
    null_threshold: float | None  # None for version 1
    history: dict[str, list[tuple[int, float]]]  # (step, value) of loss, eval_loss and eval_f1


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="report.py",
        description=__doc__,
        epilog=f"The evaluated questions are read from where {QA_SETTINGS} in OUTPUT_DIR says, or what the flags name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run of run_squad.py with --do_eval")
    parser.add_argument("--validation_file", metavar="FILE", help="the file that was evaluated, if it has moved")
    parser.add_argument("--dataset_name", metavar="NAME", help="the dataset of the hub that was evaluated")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of that dataset")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path = Path(args.output_dir, "report.html")
    try:
        write_text(path, [page(read_run(**vars(args)))])
    except QAError as error:
        parser.refuse(error)
    print(path)


# ---- Reading ----


def read_run(output_dir: str, **source: str | None) -> Run:
    """All that the page shows; `source` is where the questions are, if not where the run's settings say.

    Raises QAError where there is no evaluation, or its questions are not found.
    """
    folder = Path(output_dir)
    answers, n_best = read_json(folder / "eval_predictions.json"), read_json(folder / "eval_nbest_predictions.json")
    if not answers or not n_best:
        raise QAError(f"{folder} holds no eval_predictions.json: run run_squad.py with --do_eval first")
    settings = read_json(folder / QA_SETTINGS)
    null_odds = read_json(folder / "eval_null_odds.json") if settings.get("version_2_with_negative", True) else {}
    examples = read_examples(folder, settings, source, answers)

    non_null = {id_: [c["text"] for c in candidates if c["text"]] or [""] for id_, candidates in n_best.items()}
    best_non_null = {id_: texts[0] for id_, texts in non_null.items()}
    predictions = QAPredictions(answers, n_best, null_odds or None, best_non_null)
    questions = make_questions(folder, examples, predictions, count_windows(folder, settings, examples))
    threshold = settings.get("null_score_diff_threshold", 0.0)
    metrics = squad_scores(examples, predictions, threshold)
    state = read_json(folder / "trainer_state.json")
    history = {name: history_of(name, state) for name in ("loss", "eval_loss", "eval_f1")}
    if not history["eval_f1"] and state.get("global_step"):
        history["eval_f1"] = [(state["global_step"], metrics["f1"])]
    return Run(folder.resolve().name, questions, metrics, threshold if null_odds else None, history)


def read_json(path: Path) -> dict:
    """The object in the file; an empty one where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise QAError(f"{path}: cannot be read as JSON: {one_line(error)}") from error


def history_of(name: str, state: dict) -> list[tuple[int, float]]:
    values = {entry["step"]: entry[name] for entry in state.get("log_history", []) if name in entry}
    return [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]


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
    if file and not Path(file).exists():
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


def count_windows(folder: Path, settings: dict, examples: datasets.Dataset) -> list[int] | None:
    """How many windows each question has; None where the run's settings or its tokenizer are not there."""
    names = [field.name for field in dataclasses.fields(WindowSettings)]
    if not settings.keys() >= set(names):
        return None
    own = (folder / "tokenizer_config.json").exists()
    try:
        tokenizer = load_tokenizer(str(folder) if own else settings["tokenizer_name"], cache_dir=settings["cache_dir"])
    except QAError:
        return None
    features = make_features(examples, tokenizer, WindowSettings(**{name: settings[name] for name in names}))
    return np.bincount(features["example_index"], minlength=len(examples)).tolist()


def make_questions(folder: Path, examples, predictions: QAPredictions, num_windows: list[int] | None):
    exact, f1 = raw_scores(
        [gold["text"] for gold in examples["answers"]], [predictions.answers[id_] for id_ in examples["id"]]
    )
    questions = []
    for i, row in enumerate(examples):
        candidates, answer = predictions.n_best.get(row["id"], []), predictions.answers[row["id"]]
        spans = [(c["start"], c["end"]) for c in candidates if c["text"] == answer]
        null_odds = predictions.null_odds and predictions.null_odds.get(row["id"])
        if not spans or (predictions.null_odds and null_odds is None):
            raise QAError(f"{folder}: its eval_*.json files are of different evaluations: evaluate again")
        # A span that several windows see stands in the list once for each.
        probability = sum(c["probability"] for c in candidates if (c["start"], c["end"]) == spans[0])
        question = {name: row[name] for name in ("id", "question", "context", "answers")}
        scores = {"probability": probability, "exact": exact[i], "f1": f1[i], "null_odds": null_odds}
        span = None if spans[0][0] is None else spans[0]
        number = None if num_windows is None else num_windows[i]
        questions.append(Question(**question, **scores, answer=answer, span=span, num_windows=number))
    return questions


# ---- Statistics ----


def question_word(question: str) -> str:
    """The first question word in `question`; "how many" and "how much" are their own; "other" where there is none."""
    words = re.findall(r"[a-z]+", question.lower())
    for word, following in itertools.pairwise([*words, ""]):
        if word == "how" and following in ("many", "much"):
            return f"how {following}"
        if word in ("whom", "whose"):
            return "who"
        if word in QUESTION_WORDS:
            return word
    return "other"


def range_name(value: int, edges: list[int]) -> str:
    """The range of edges that a count lies in: edges [1, 2, 5] are "1", "2", "3–5" and "6+"; [50, 99] begin "≤ 50"."""
    if value <= edges[0]:
        return f"≤ {edges[0]}" if edges[0] > 1 else str(edges[0])
    for lower, upper in itertools.pairwise(edges):
        if value <= upper:
            return str(upper) if upper == lower + 1 else f"{lower + 1}–{upper}"
    return f"{edges[-1] + 1}+"


def group(questions: Iterable[Question], key: Callable[[Question], Any]) -> dict[Any, list[Question]]:
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(key(question), []).append(question)
    return groups


def calibration(questions: list[Question]) -> list[tuple[float, float, int]]:
    """(mean probability, share of exact answers, questions) of each tenth of the probabilities that has questions."""
    bins = group(questions, lambda q: min(int(q.probability * CALIBRATION_BINS), CALIBRATION_BINS - 1))
    return [
        (sum(q.probability for q in part) / len(part), sum(q.exact for q in part) / len(part), len(part))
        for _, part in sorted(bins.items())
    ]


def calibration_error(bins: list[tuple[float, float, int]]) -> float:
    """Expected calibration error: how far the probabilities are from the shares, averaged over questions."""
    return sum(abs(probability - share) * count for probability, share, count in bins) / sum(b[2] for b in bins)


def no_answer_point(has_answer: np.ndarray, null_odds: np.ndarray, threshold: float) -> tuple[float, float] | None:
    """(recall, precision) of "no answer" where the odds exceed the threshold; None where they never do."""
    right = ~has_answer[null_odds > threshold]
    return (right.sum() / (~has_answer).sum(), right.mean()) if len(right) else None


def no_answer_curve(has_answer: np.ndarray, null_odds: np.ndarray) -> list[tuple[float, float]]:
    """The points of all thresholds that differ, from the highest down."""
    thresholds = np.nextafter(np.unique(null_odds)[::-1], -np.inf)
    return [no_answer_point(has_answer, null_odds, threshold) for threshold in thresholds]


def average_precision(points: list[tuple[float, float]]) -> float:
    steps = itertools.pairwise([(0.0, 0.0), *points])
    return sum(precision * (recall - earlier) for (earlier, _), (recall, precision) in steps)


def worst(questions: list[Question]) -> list[Question]:
    """The wrong answers, those with the lowest f1 first, and of these the surest first."""
    wrong = [question for question in questions if not question.exact]
    return sorted(wrong, key=lambda q: (q.f1, -q.probability))[:WORST_QUESTIONS]


# ---- Page ----


def page(run: Run) -> str:
    """The whole page; nothing in it comes from elsewhere, and every text of the data is escaped."""
    wrong = worst(run.questions)
    cards = [training_card(run), *group_cards(run.questions), calibration_card(run.questions)]
    if run.null_threshold is not None:
        cards.append(no_answer_card(run))
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(run.name),
        tiles=tiles(run),
        cards="".join(cards),
        legend=worst_legend(run.questions, len(wrong)),
        worst="".join(map(worst_item, wrong)),
    )


def tiles(run: Run) -> str:
    names = {"f1": "f1", "exact": "exact", "HasAns_f1": "f1, with an answer", "NoAns_f1": "f1, without one"}
    if run.null_threshold is None:
        del names["HasAns_f1"]
    shown = {name: f"{run.metrics[key]:.2f}" for key, name in names.items() if key in run.metrics}
    shown["questions"] = f"{len(run.questions):,}"
    return "".join(f"<div><b>{value}</b>{name}</div>" for name, value in shown.items())


def card(title: str, body: str, note: str = "", subtitle: str = "") -> str:
    """`body` and `note` are HTML."""
    return f"<section><h2>{title}</h2><p class=note>{subtitle}</p>{body}<p class=note>{note}</p></section>"


def training_card(run: Run) -> str:
    steps = [step for points in run.history.values() for step, _ in points]
    if not steps:
        return card("Training", "", "This folder holds no trainer_state.json: the model was trained elsewhere.")

    def curve(key: str, name: str, kind: str, radius: float) -> list[Line]:
        points = run.history[key]
        dots = [(radius, f"step {step}: {name} {value:.4g}") for step, value in points]
        return [Line(points, kind, f"{name} {points[-1][1]:.4g}", dots if radius else [])] if points else []

    charts = ""
    losses = [*curve("loss", "training", "dark", 0), *curve("eval_loss", "evaluation", "evaluation", 3.5)]
    if losses:
        highest = max(value for line in losses for _, value in line.points)
        charts += line_chart(losses, max(steps), 1.08 * highest or 1, ("", "loss over steps"), 120)
    scores = curve("eval_f1", "f1", "dark", 3.5)
    if scores:
        charts += line_chart(scores, max(steps), 100, ("", "f1 over steps"), 120)
    once = "One evaluation, after training; --eval_strategy epoch, or steps, makes it a curve."
    return card("Training", charts, once if len(run.history["eval_f1"]) == 1 else "")


def group_cards(questions: list[Question]) -> list[str]:
    """f1 and exact by what the questions have in common."""

    def by_range(some: list[Question], count: Callable[[Question], int], edges: list[int]) -> dict:
        return group(sorted(some, key=count), lambda q: range_name(count(q), edges))

    words = group(questions, lambda q: question_word(q.question))
    by_word = dict(sorted(words.items(), key=lambda item: (item[0] == "other", -len(item[1]))))
    with_answer = [q for q in questions if q.answers["text"]]
    by_answer = by_range(with_answer, lambda q: min(len(t.split()) for t in q.answers["text"]), [1, 2, 3, 5, 10])
    by_answer |= group((q for q in questions if not q.answers["text"]), lambda q: "no answer")
    by_context = by_range(questions, lambda q: len(q.context.split()), [50, 100, 150, 200, 300, 500])
    known = [q for q in questions if q.num_windows is not None]
    by_windows = by_range(known, lambda q: q.num_windows, [1, 2, 3, 4, 6, 10])
    unknown = f"Not known: the folder lacks {QA_SETTINGS}, or the tokenizer is not there."
    return [
        card("Question word", bar_chart(by_word), "", "the first in the question"),
        card("Answer length", bar_chart(by_answer), "", "words of the shortest gold answer"),
        card("Context length", bar_chart(by_context), "", "words"),
        card("Number of windows", bar_chart(by_windows), "" if known else unknown, "that the context is cut into"),
    ]


def calibration_card(questions: list[Question]) -> str:
    bins = calibration(questions)
    most = max(count for *_, count in bins)
    dots = [
        (
            3 + 7 * math.sqrt(count / most),
            f"{count} questions: probability {probability:.2f}, exact {100 * share:.1f} %",
        )
        for probability, share, count in bins
    ]
    lines = [Line([(0, 0), (1, 1)], "diagonal"), Line([(p, share) for p, share, _ in bins], dots=dots)]
    labels = ("probability that the model gives its answer", "share of exact answers")
    note = (
        "Larger dots are more questions; on the dashed line probabilities are what they say, below it the model is too "
        f"sure. Expected calibration error {calibration_error(bins):.3f}."
    )
    return card("Calibration", line_chart(lines, 1, 1, labels, 200), note)


def no_answer_card(run: Run) -> str:
    has_answer = np.array([bool(q.answers["text"]) for q in run.questions])
    null_odds = np.array([q.null_odds for q in run.questions])
    if has_answer.all():
        return card("No answer", "", "Every question has a gold answer.")
    points = no_answer_curve(has_answer, null_odds)
    lines, notes = [Line([(0, points[0][1]), *points])], ""
    best = run.metrics["best_f1_thresh"]
    for kind, threshold, f1 in (("used", run.null_threshold, "f1"), ("best", best, "best_f1")):
        point, where = no_answer_point(has_answer, null_odds, threshold), "no question is answered so"
        if point is not None:
            where = f"precision {point[1]:.2f}, recall {point[0]:.2f}"
            lines.append(Line([point], kind, dots=[(6, f"{kind} threshold: {where}")]))
        name = f"{kind}: threshold {threshold:.2f}, {where}, f1 of all questions {run.metrics[f1]:.2f}"
        notes += f"{key(kind, name)}<br>"
    note = (
        f"{notes}Average precision {average_precision(points):.3f}. The best threshold is that of the highest f1 here: "
        f"<code>--null_score_diff_threshold {best:.4f}</code>; choose it on other questions than you report."
    )
    return card("No answer", line_chart(lines, 1, 1, ("recall", "precision"), 200), note)


# ---- Charts ----


def bar_chart(groups: dict[str, list[Question]]) -> str:
    """A table with a row for each group: f1 as a light bar, exact as a dark one in front, and how many questions."""
    rows = []
    for name, questions in groups.items():
        exact, f1 = (100 * sum(getattr(q, score) for q in questions) / len(questions) for score in ("exact", "f1"))
        bar = f'<i style="--f1: {f1:.1f}%; --exact: {exact:.1f}%"></i>'
        rows.append(f"<tr><th>{escape(name)}<td>{bar}<td>{f1:.1f}<td>{exact:.1f}<td>{len(questions):,}")
    if not rows:
        return ""
    return f"<table><tr><td><td><td>{key('light', 'f1')}<td>{key('dark', 'exact')}<td>questions{''.join(rows)}</table>"


class Line(NamedTuple):
    points: list[tuple[float, float]]
    kind: str = "dark"  # its class in the style
    name: str = ""  # in the legend
    dots: list[tuple[float, str]] = []  # (radius, title) of each point, or none


def line_chart(lines: list[Line], x_end: float, y_end: float, labels: tuple[str, str], height: int) -> str:
    """Both axes begin at 0. It is 360 units wide, as a phone, so that its text stays readable when it shrinks to it."""
    left, right, bottom = 38, 350, 22 + height

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + x / x_end * (right - left), 1), round(bottom - y / y_end * height, 1)

    def text(x: float, y: float, content: str, anchor: str) -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'

    parts = [text(right, bottom + 34, labels[0], "end"), text(0, 11, labels[1], "start")]
    for value in ticks(x_end):
        parts.append(text(place(value, 0)[0], bottom + 17, number(value), "middle"))
    for value in ticks(y_end):
        _, y = place(0, value)
        parts.append(f'<path d="M{left} {y}H{right}"/>{text(left - 6, y + 4, number(value), "end")}')
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" class="{line.kind}"/>')
        for (x, y), (radius, title) in zip(places, line.dots, strict=False):
            dot = f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" class="{line.kind}">'
            parts.append(f"{dot}<title>{escape(title)}</title></circle>")
    legend = "".join(key(line.kind, line.name) for line in lines if line.name)
    size = bottom + (40 if labels[0] else 22)
    return f'<p class=note>{legend}</p><svg viewBox="0 0 360 {size}" role="img">{"".join(parts)}</svg>'


def key(kind: str, name: str) -> str:
    """An entry of a legend."""
    return f'<b class="key {kind}"></b>{escape(name)}'


def ticks(end: float) -> list[float]:
    """Three to six round numbers from 0 to `end`."""
    step = 10 ** math.floor(math.log10(end / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if end / (step * factor) <= 5)
    return [i * step for i in range(math.floor(end / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{round(value, 6):g}"


# ---- Worst questions ----


def worst_legend(questions: list[Question], num_shown: int) -> str:
    wrong = sum(not q.exact for q in questions)
    if not wrong:
        return "Every question is answered exactly."
    shown = f"all {wrong}" if wrong == num_shown else f"the worst {num_shown} of {wrong}"
    return (
        f"Of {len(questions):,} questions {wrong:,} are not answered exactly; here are {shown}: lowest f1 first, and "
        "of equal ones those that the model was surest of. In the text: <mark class=gold>gold answer</mark>, "
        "<mark class=pred>predicted answer</mark>, <mark class=both>both</mark>."
    )


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
    shown = np.full(length, length <= LONGEST_CONTEXT)
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
