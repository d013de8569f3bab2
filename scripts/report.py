#!/usr/bin/env python
"""Writes report.html into the folder of an evaluated run: where the model answers well, and where it fails.

    python scripts/report.py OUTPUT_DIR

The page stands alone: it loads nothing and runs no script.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
import transformers  # noqa: E402

from qa.files import (
    OneLineParser,  # noqa: E402
    write_text,  # noqa: E402
)
from qa.layouts import NO_START  # noqa: E402
from qa.load_model import load_tokenizer  # noqa: E402
from qa.read_squad import load_examples  # noqa: E402
from qa.run_folder import QA_SETTINGS  # noqa: E402
from qa.train_questions import hold_out  # noqa: E402
from qa.windows import WindowSettings, make_features  # noqa: E402
from utils_qa import QAPredictions, raw_scores, squad_scores  # noqa: E402

WORST_QUESTIONS = 50
LONGEST_CONTEXT = 2000  # characters; of a longer one only what surrounds the answers is shown
SURROUNDINGS = 300
QUESTION_WORDS = "what who when where which why how".split()
CALIBRATION_BINS = 10


class Question(NamedTuple):
    """One evaluated question. Spans are character offsets into the context, end exclusive."""

    id: str
    question: str
    context: str
    golds: list[str]
    gold_spans: list[tuple[int, int]]
    answer: str
    span: tuple[int, int] | None  # of the answer; None for "no answer"
    probability: float  # of the answer
    exact: int
    f1: float
    num_windows: int | None


class Run(NamedTuple):
    name: str
    questions: list[Question]
    metrics: dict[str, float]
    null_odds: list[float] | None  # by question; None for version 1
    null_threshold: float
    loss: list[tuple[int, float]]  # (step, value), as below
    eval_loss: list[tuple[int, float]]
    f1: list[tuple[int, float]]
    no_windows_because: str | None


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        transformers.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        path = os.path.join(args.output_dir, "report.html")
        write_text(path, [page(read_run(args))])
    except (ValueError, OSError) as error:
        parser.refuse(error)
    print(path)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="report.py",
        description=__doc__,
        epilog=f"The evaluated questions are read from where {QA_SETTINGS} in OUTPUT_DIR says, or from what "
        "the flags name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run of run_squad.py with --do_eval")
    parser.add_argument("--validation_file", metavar="FILE", help="the file that was evaluated, if it has moved")
    parser.add_argument("--dataset_name", metavar="NAME", help="the dataset of the hub that was evaluated")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="configuration of that dataset")
    return parser


# ---- Reading ----


def read_run(args: argparse.Namespace) -> Run:
    """All that the page shows. Raises ValueError where there is no evaluation, or its questions are not found."""
    folder = Path(args.output_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    n_best = _read_json(folder / "eval_nbest_predictions.json")
    answers = _read_json(folder / "eval_predictions.json")
    if n_best is None or answers is None:
        raise ValueError(f"{folder} holds no eval_predictions.json: run run_squad.py with --do_eval first")
    settings = _read_json(folder / QA_SETTINGS) or {}
    examples = read_examples(args, folder, settings, answers)
    null_odds = _read_json(folder / "eval_null_odds.json") if settings.get("version_2_with_negative", True) else None
    if set(n_best) != set(answers) or (null_odds is not None and set(null_odds) != set(answers)):
        raise ValueError(f"{folder}: its eval_*.json files are of different questions: evaluate again")

    threshold = settings.get("null_score_diff_threshold", 0.0)
    best_non_null = {
        id_: next((candidate["text"] for candidate in candidates if candidate["text"]), "")
        for id_, candidates in n_best.items()
    }
    metrics = squad_scores(examples, QAPredictions(answers, n_best, null_odds, best_non_null), threshold)
    num_windows, no_windows_because = count_windows(examples, folder, settings)
    state = _read_json(folder / "trainer_state.json") or {}
    loss, eval_loss, f1 = (_history(state, name) for name in ("loss", "eval_loss", "eval_f1"))
    if not f1 and state.get("global_step"):
        f1 = [(state["global_step"], metrics["f1"])]
    return Run(
        name=folder.resolve().name,
        questions=make_questions(examples, answers, n_best, num_windows),
        metrics=metrics,
        null_odds=None if null_odds is None else [null_odds[id_] for id_ in examples["id"]],
        null_threshold=threshold,
        loss=loss,
        eval_loss=eval_loss,
        f1=f1,
        no_windows_because=no_windows_because,
    )


def _read_json(path: Path):
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error


def _history(state: dict, name: str) -> list[tuple[int, float]]:
    entries = {entry["step"]: entry[name] for entry in state.get("log_history", []) if name in entry}
    return [(step, value) for step, value in sorted(entries.items()) if math.isfinite(value)]


def read_examples(args, folder: Path, settings: dict, answers: dict) -> datasets.Dataset:
    """The questions that were answered, with contexts and gold answers."""
    percentage = None
    if args.validation_file or args.dataset_name:
        file, name, config_name = args.validation_file, args.dataset_name, args.dataset_config_name
    else:
        file, name, config_name = (
            settings.get(key) for key in ("validation_file", "dataset_name", "dataset_config_name")
        )
        percentage = settings.get("validation_split_percentage")
    split = "train" if percentage else "validation"
    if percentage:  # a part of the training data was evaluated
        file = settings["train_file"]
    if not (file or name):
        raise ValueError(
            f"{folder} does not say which questions were evaluated: give --validation_file or --dataset_name"
        )
    if file and not os.path.exists(file):
        raise ValueError(f"{file}, which was evaluated, is not there: give --validation_file")
    splits = load_examples(name, config_name, {split: file}, settings.get("cache_dir"))
    source = file or name
    if percentage and "train" in splits:
        splits = hold_out(splits, percentage, settings["seed"], source)
    if "validation" not in splits or "answers" not in splits["validation"].column_names:
        raise ValueError(f"{source} has no validation questions with gold answers: give --validation_file")
    examples = splits["validation"]
    rows = [row for row, id_ in enumerate(examples["id"]) if id_ in answers]
    if len(rows) < len(answers):
        missing = sorted(set(answers) - set(examples["id"]))
        raise ValueError(
            f"{source} is not what was evaluated in {folder}: it lacks {len(missing)} of its questions (first ids: "
            f"{', '.join(missing[:5])}); give --validation_file"
        )
    return examples if len(rows) == len(examples) else examples.select(rows)


def count_windows(examples, folder: Path, settings: dict) -> tuple[list[int] | None, str | None]:
    """How many windows each question has; or None, and why that is not known."""
    if "max_seq_length" not in settings:
        return None, f"{folder.resolve().name} has no {QA_SETTINGS}"
    own = (folder / "tokenizer_config.json").exists()
    try:
        name = str(folder) if own else settings["tokenizer_name"]
        tokenizer = load_tokenizer(name, cache_dir=settings.get("cache_dir"))
    except ValueError as error:
        return None, str(error)
    windows = WindowSettings(settings["max_seq_length"], settings["doc_stride"], settings["max_query_length"])
    features = make_features(examples, tokenizer, windows)
    return np.bincount(features["example_index"], minlength=len(examples)).tolist(), None


def make_questions(examples, answers: dict, n_best: dict, num_windows: list[int] | None) -> list[Question]:
    golds = [row["text"] for row in examples["answers"]]
    exact, f1 = raw_scores(golds, [answers[id_] for id_ in examples["id"]])
    questions = []
    for i, row in enumerate(examples):
        answer, candidates = answers[row["id"]], n_best[row["id"]]
        best = next((candidate for candidate in candidates if candidate["text"] == answer), None)
        if best is None:
            raise ValueError(f"eval_nbest_predictions.json has no answer {answer!r} for question {row['id']}")
        span = None if best["start"] is None else (best["start"], best["end"])
        # A span that several windows see stands in the list once for each.
        same = [c["probability"] for c in candidates if (c["start"], c["end"]) == (best["start"], best["end"])]
        starts = row["answers"]["answer_start"]
        questions.append(
            Question(
                id=row["id"],
                question=row["question"],
                context=row["context"],
                golds=golds[i],
                gold_spans=[
                    (start, start + len(text))
                    for text, start in zip(golds[i], starts, strict=True)
                    if start != NO_START
                ],
                answer=answer,
                span=span,
                probability=sum(same),
                exact=exact[i],
                f1=f1[i],
                num_windows=None if num_windows is None else num_windows[i],
            )
        )
    return questions


# ---- Statistics ----


def question_word(question: str) -> str:
    """The first question word in `question`; "how many" and "how much" are their own; "other" where there is none."""
    words = re.findall(r"[a-z]+", question.lower())
    for word, following in zip(words, [*words[1:], ""], strict=False):
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
    for lower, upper in zip(edges, edges[1:], strict=False):
        if value <= upper:
            return str(upper) if upper == lower + 1 else f"{lower + 1}–{upper}"
    return f"{edges[-1] + 1}+"


def group(questions: Iterable[Question], key: Callable[[Question], object]) -> dict:
    groups: dict = {}
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


def no_answer_curve(has_answer: list[bool], null_odds: list[float]) -> list[tuple[float, float, float]]:
    """(threshold, precision, recall) of "no answer" where the odds exceed each threshold, from the highest one down.

    The thresholds are the odds but the highest, and one below all of them.
    """
    ranked = sorted(zip(null_odds, has_answer, strict=True), reverse=True)
    positives = has_answer.count(False)
    points, found = [], 0
    for rank, (odds, has) in enumerate(ranked, start=1):
        found += not has
        following = ranked[rank][0] if rank < len(ranked) else math.nextafter(odds, -math.inf)
        if following < odds:
            points.append((following, found / rank, found / positives))
    return points


def at_threshold(has_answer: list[bool], null_odds: list[float], threshold: float) -> tuple[float, float] | None:
    """(precision, recall) of "no answer" where the odds exceed the threshold; None where they never do."""
    chosen = [not has for has, odds in zip(has_answer, null_odds, strict=True) if odds > threshold]
    return (sum(chosen) / len(chosen), sum(chosen) / has_answer.count(False)) if chosen else None


def average_precision(points: list[tuple[float, float, float]]) -> float:
    area, earlier = 0.0, 0.0
    for _, precision, recall in points:
        area, earlier = area + precision * (recall - earlier), recall
    return area


def worst(questions: list[Question]) -> list[Question]:
    """The wrong answers, those with the lowest f1 first, and of these the surest first."""
    wrong = [question for question in questions if not question.exact]
    return sorted(wrong, key=lambda q: (q.f1, -q.probability))[:WORST_QUESTIONS]


# ---- Charts ----
# All are 360 units wide, about a phone's width, so that their text stays readable when they shrink to it.

WIDTH = 360


def svg(height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def bar_chart(groups: list[tuple[str, list[Question]]], label: str) -> str:
    """One line a group: its f1 as a light bar, its exact as a dark one in front, and how many questions it has."""
    left, right, row = 80, 198, 28
    f1_end, exact_end = right + 40, right + 98
    parts = [
        f'<rect x="{f1_end - 26}" y="3" width="9" height="9" rx="2" class="light"/>',
        text(f1_end, 12, "f1", "muted", "end"),
        f'<rect x="{exact_end - 44}" y="3" width="9" height="9" rx="2" class="dark"/>',
        text(exact_end, 12, "exact", "muted", "end"),
        text(WIDTH, 12, "questions", "muted", "end"),
    ]
    for i, (name, questions) in enumerate(groups):
        y = 18 + i * row
        exact, f1 = (100 * sum(getattr(q, score) for q in questions) / len(questions) for score in ("exact", "f1"))
        width = (right - left) / 100
        parts += [
            text(left - 8, y + 16, name, "", "end"),
            f'<rect x="{left}" y="{y + 3}" width="{right - left}" height="17" rx="3" class="track"/>',
            f'<rect x="{left}" y="{y + 3}" width="{f1 * width:.1f}" height="17" rx="3" class="light"/>',
            f'<rect x="{left}" y="{y + 3}" width="{exact * width:.1f}" height="17" rx="3" class="dark"/>',
            text(f1_end, y + 16, f"{f1:.1f}", "", "end"),
            text(exact_end, y + 16, f"{exact:.1f}", "", "end"),
            text(WIDTH, y + 16, f"{len(questions):,}", "muted", "end"),
        ]
    return svg(18 + len(groups) * row, label, parts)


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{round(value, 6):g}"


class Plane(NamedTuple):
    """A rectangle with two axes: x and y turn values into places, `parts` draws the axes."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    parts: list[str]
    height: float


def plane(x_range, y_range, x_label: str, y_label: str, plot_height: float) -> Plane:
    left, right, bottom = 38, WIDTH - 10, 22 + plot_height

    def x(value):
        return left + (value - x_range[0]) / (x_range[1] - x_range[0]) * (right - left)

    def y(value):
        return bottom - (value - y_range[0]) / (y_range[1] - y_range[0]) * plot_height

    parts = [text(0, 11, y_label, "muted")]
    if x_label:
        parts.append(text(right, bottom + 34, x_label, "muted", "end"))
    for value in ticks(*y_range):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        parts.append(text(left - 6, y(value) + 4, number(value), "muted", "end"))
    for value in ticks(*x_range):
        parts.append(text(x(value), bottom + 17, number(value), "muted", "middle"))
    return Plane(x, y, parts, bottom + (40 if x_label else 24))


def line(area: Plane, points: list[tuple[float, float]], kind: str = "line") -> str:
    places = " ".join(f"{area.x(x):.1f},{area.y(y):.1f}" for x, y in points)
    return f'<polyline points="{places}" class="{kind}"/>'


def dot(area: Plane, x: float, y: float, radius: float, title: str, kind: str = "dot") -> str:
    return (
        f'<circle cx="{area.x(x):.1f}" cy="{area.y(y):.1f}" r="{radius:.1f}" class="{kind}">'
        f"<title>{escape(title)}</title></circle>"
    )


def curve(points: list[tuple[int, float]], last_step: int, name: str, y_range, dots: bool) -> str:
    area = plane((0, last_step), y_range, "", f"{name} over steps", 120)
    parts = [*area.parts, line(area, points)]
    if dots:
        parts += [dot(area, step, value, 3.5, f"step {step}: {name} {value:.2f}") for step, value in points]
    step, value = points[-1]
    parts.append(text(min(area.x(step), WIDTH - 10), area.y(value) - 9, f"{value:.4g}", "strong", "end"))
    return svg(area.height, f"{name} over steps, at the end {value:.4g}", parts)


def loss_chart(training: list[tuple[int, float]], evaluation: list[tuple[int, float]], last_step: int) -> str:
    """Both losses on the same axes, with the last value of each in the legend; `training` may be empty."""
    highest = max(value for _, value in [*training, *evaluation])
    area = plane((0, last_step), (0, 1.08 * highest or 1), "", "loss over steps", 120)
    parts, last = [*area.parts], []
    for name, points, kind, end in (
        ("training", training, "dark", WIDTH - 128),
        ("evaluation", evaluation, "evaluation", WIDTH),
    ):
        if points:
            last.append(f"{name} {points[-1][1]:.4g}")
            key = end - 14 - 6.5 * len(last[-1])
            parts.append(f'<rect x="{key:.1f}" y="2" width="9" height="9" rx="2" class="{kind}"/>')
            parts += [text(end, 11, last[-1], "muted", "end"), line(area, points, f"line {kind}-line")]
    for step, value in evaluation:
        parts.append(dot(area, step, value, 3.5, f"step {step}: evaluation loss {value:.4g}", "dot evaluation"))
    return svg(area.height, f"loss over steps, at the end {', '.join(last)}", parts)


def calibration_chart(bins: list[tuple[float, float, int]]) -> str:
    area = plane((0, 1), (0, 1), "probability that the model gives its answer", "share of exact answers", 200)
    most = max(count for *_, count in bins)
    parts = [*area.parts, line(area, [(0, 0), (1, 1)], "diagonal"), line(area, [(p, s) for p, s, _ in bins])]
    for probability, share, count in bins:
        title = f"{count} questions: probability {probability:.2f}, exact {100 * share:.1f} %"
        parts.append(dot(area, probability, share, 3 + 7 * math.sqrt(count / most), title))
    return svg(area.height, "How often answers of each probability are exact", parts)


def no_answer_chart(points, marks: list[tuple[str, tuple[float, float]]]) -> str:
    area = plane((0, 1), (0, 1), "recall", "precision", 200)
    places = [(recall, precision) for _, precision, recall in points]
    parts = [*area.parts, line(area, [(0, places[0][1]), *places])]
    for kind, (precision, recall) in marks:
        title = f"{kind} threshold: precision {precision:.2f}, recall {recall:.2f}"
        parts.append(dot(area, recall, precision, 6, title, f"dot {kind}"))
    return svg(area.height, "Precision and recall of no answer", parts)


# ---- Page ----


def page(run: Run) -> str:
    """The whole page; nothing in it comes from elsewhere, and every text of the data is escaped."""
    cards = [training_card(run), *group_cards(run), calibration_card(run.questions)]
    if run.null_odds is not None:
        cards.append(no_answer_card(run))
    wrong = worst(run.questions)
    if wrong:
        of_all = sum(not q.exact for q in run.questions)
        shown = f"all {of_all}" if of_all == len(wrong) else f"the worst {len(wrong)} of {of_all}"
        legend = (
            f"<p class=note>Of {len(run.questions):,} questions {of_all:,} are not answered exactly; here are {shown}: "
            "lowest f1 first, and of equal ones those that the model was surest of. In the text: "
            "<mark class=gold>gold answer</mark>, <mark class=pred>predicted answer</mark>, "
            "<mark class=both>both</mark>.</p>"
        )
    else:
        legend = "<p class=note>Every question is answered exactly.</p>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(run.name)}: where it fails</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(run.name)}</h1>
{tiles(run)}
</header>
<main>
<div class=cards>
{"".join(cards)}
</div>
<h2 id="worst">Worst questions</h2>
{legend}
<ol class=worst>
{"".join(map(worst_item, wrong))}
</ol>
</main>
</body>
</html>
"""


def tiles(run: Run) -> str:
    names = [("f1", "f1"), ("exact", "exact"), ("total", "questions")]
    if run.null_odds is not None:
        names += [("HasAns_f1", "f1, with an answer"), ("NoAns_f1", "f1, without one")]
    shown = [
        f"<div><b>{run.metrics[key]:,.0f}</b>{name}</div>"
        if key == "total"
        else f"<div><b>{run.metrics[key]:.2f}</b>{name}</div>"
        for key, name in names
        if key in run.metrics
    ]
    return f"<div class=tiles>{''.join(shown)}</div>"


def card(title: str, body: str, note: str = "", subtitle: str = "") -> str:
    """`body` and `note` are HTML, the others text."""
    subtitle = f"<p class=subtitle>{escape(subtitle)}</p>" if subtitle else ""
    return f"<section><h2>{escape(title)}</h2>{subtitle}{body}{f'<p class=note>{note}</p>' if note else ''}</section>"


def training_card(run: Run) -> str:
    if not (run.loss or run.eval_loss or run.f1):
        return card("Training", "", "This folder holds no trainer_state.json: the model was trained elsewhere.")
    last_step = max(step for step, _ in [*run.loss, *run.eval_loss, *run.f1])
    charts = ""
    if run.eval_loss:
        charts += loss_chart(run.loss, run.eval_loss, last_step)
    elif run.loss:
        charts += curve(run.loss, last_step, "loss", (0, 1.08 * max(value for _, value in run.loss) or 1), dots=False)
    if run.f1:
        charts += curve(run.f1, last_step, "f1", (0, 100), dots=True)
    note = (
        "One evaluation, after training; --eval_strategy epoch, or steps, makes it a curve." if len(run.f1) == 1 else ""
    )
    return card("Training", charts, note)


def group_cards(run: Run) -> list[str]:
    """f1 and exact by what the questions have in common."""
    answered = [q for q in run.questions if q.golds]
    no_gold = [q for q in run.questions if not q.golds]
    words = group(run.questions, lambda q: question_word(q.question))
    by_word = sorted(words.items(), key=lambda item: (item[0] == "other", -len(item[1])))

    def by_count(questions, count, edges):
        groups: dict[str, list[Question]] = {}
        for question in sorted(questions, key=count):
            groups.setdefault(range_name(count(question), edges), []).append(question)
        return list(groups.items())

    by_answer = by_count(answered, lambda q: min(len(gold.split()) for gold in q.golds), [1, 2, 3, 5, 10])
    if no_gold:
        by_answer.append(("no answer", no_gold))
    by_context = by_count(run.questions, lambda q: len(q.context.split()), [50, 100, 150, 200, 300, 500])
    if run.no_windows_because:
        windows_card = card("Number of windows", "", f"Not known: {escape(run.no_windows_because)}.")
    else:
        by_windows = by_count(run.questions, lambda q: q.num_windows, [1, 2, 3, 4, 6, 10])
        windows_card = bar_card("Number of windows", "that the context is cut into", by_windows)
    return [
        bar_card("Question word", "the first in the question", by_word),
        bar_card("Answer length", "words of the shortest gold answer", by_answer),
        bar_card("Context length", "words", by_context),
        windows_card,
    ]


def bar_card(title: str, subtitle: str, groups: list[tuple[str, list[Question]]]) -> str:
    return card(title, bar_chart(groups, f"f1 and exact by {title.lower()}"), subtitle=subtitle)


def calibration_card(questions: list[Question]) -> str:
    bins = calibration(questions)
    note = (
        "Larger dots are more questions; on the dashed line probabilities are what they say, below it the model is too "
        f"sure. Expected calibration error {calibration_error(bins):.3f}."
    )
    return card("Calibration", calibration_chart(bins), note)


def no_answer_card(run: Run) -> str:
    has_answer = [bool(q.golds) for q in run.questions]
    if all(has_answer):
        return card("No answer", "", "Every question has a gold answer.")
    points = no_answer_curve(has_answer, run.null_odds)
    best = run.metrics["best_f1_thresh"]
    lines, marks = [], []
    for kind, threshold, f1 in [
        ("used", run.null_threshold, run.metrics["f1"]),
        ("best", best, run.metrics["best_f1"]),
    ]:
        place = at_threshold(has_answer, run.null_odds, threshold)
        where = "no question is answered so"
        if place is not None:
            marks.append((kind, place))
            where = f"precision {place[0]:.2f}, recall {place[1]:.2f}"
        lines.append(
            f'<span class="key {kind}"></span> {kind}: threshold {threshold:.2f}, {where}, f1 of all questions {f1:.2f}'
        )
    note = (
        f"{'<br>'.join(lines)}<br>Average precision {average_precision(points):.3f}. The best threshold is that of the "
        f"highest f1 here: <code>--null_score_diff_threshold {best:.4f}</code>; choose it on other questions than you "
        "report."
    )
    return card("No answer", no_answer_chart(points, marks), note)


def worst_item(question: Question) -> str:
    golds = list(dict.fromkeys(question.golds))
    gold = " <i>or</i> ".join(f"<mark class=gold><bdi>{escape(text)}</bdi></mark>" for text in golds)
    return f"""<li>
<h3 dir="auto">{escape(question.question)}</h3>
<dl>
<dt>gold<dd>{gold or "<mark class=gold>no answer</mark>"}
<dt>predicted<dd><mark class=pred><bdi>{escape(question.answer) or "no answer"}</bdi></mark>
<span class=muted>probability {question.probability:.2f}, f1 {question.f1:.2f}</span>
</dl>
<p class=context dir="auto">{marked_context(question)}</p>
<p class=id>{escape(question.id)}</p>
</li>
"""


def marked_context(question: Question) -> str:
    """The context as HTML, gold and predicted answer marked; of a long one what surrounds them."""
    context = question.context
    golds = [(max(start, 0), min(end, len(context))) for start, end in question.gold_spans]
    spans = [(start, end, "gold") for start, end in golds if start < end]
    if question.span is not None and question.span[0] < question.span[1]:
        spans.append((*question.span, "pred"))
    shown = np.ones(len(context), dtype=bool)
    if len(context) > LONGEST_CONTEXT:
        shown[:] = False
        for start, end, _ in spans or [(0, 0, "")]:
            shown[max(start - SURROUNDINGS, 0) : end + SURROUNDINGS] = True
    edges = {0, len(context), *(edge for start, end, _ in spans for edge in (start, end))}
    edges = sorted(edges | set((np.flatnonzero(np.diff(shown)) + 1).tolist()))
    parts: list[tuple[str, str]] = []  # (kind, text)
    for start, end in zip(edges, edges[1:], strict=False):
        kinds = {kind for low, high, kind in spans if low <= start and end <= high}
        kind = "both" if len(kinds) == 2 else kinds.pop() if kinds else "plain"
        if not shown[start]:
            parts.append(("cut", ""))
        elif parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + context[start:end])
        else:
            parts.append((kind, context[start:end]))
    html = {"plain": "{}", "cut": " <i>…</i> ", **{k: f"<mark class={k}>{{}}</mark>" for k in ("gold", "pred", "both")}}
    return "".join(html[kind].format(escape(content)) for kind, content in parts)


STYLE = """
:root { color-scheme: light dark; --bg: #f6f6f3; --card: #fff; --ink: #1d2127; --muted: #6a717c; --line: #e4e5e2;
  --dark: #2456b8; --light: #9dbdf0; --gold: #d8f0dc; --gold-line: #1f8a3d; --pred: #ffe4cf; --pred-line: #c9560b;
  --both: #e7e0fb; --both-line: #6b41c6; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1d2026; --ink: #e6e8eb; --muted: #979fab;
  --line: #31353d; --dark: #6ea0ff; --light: #34507f; --gold: #173d22; --gold-line: #5cc97b; --pred: #4a2a12;
  --pred-line: #f29a57; --both: #352a5c; --both-line: #a88cf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 20px 16px 60px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 12px; line-height: 1.25; }
h2 { font-size: 16px; margin: 0 0 8px; }
.subtitle { margin: -8px 0 10px; color: var(--muted); font-size: 13px; }
main > h2 { font-size: 20px; margin: 24px 0 8px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 20px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px 16px;
  color: var(--muted); font-size: 13px; }
.tiles b { display: block; font-size: 24px; line-height: 1.2; color: var(--ink); font-variant-numeric: tabular-nums; }
.cards { columns: 340px 3; column-gap: 14px; }
.cards section { break-inside: avoid; margin-bottom: 14px; }
section, .worst li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
svg { display: block; width: 100%; height: auto; margin-bottom: 6px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.muted { fill: var(--muted); font-size: 12px; }
svg text.strong { font-weight: 600; }
.track { fill: var(--line); opacity: .55; } .light { fill: var(--light); } .dark { fill: var(--dark); }
.grid { stroke: var(--line); } .line { fill: none; stroke: var(--dark); stroke-width: 2; stroke-linejoin: round; }
.evaluation { fill: var(--pred-line); } .evaluation-line { stroke: var(--pred-line); }
.diagonal { stroke: var(--muted); stroke-dasharray: 4 4; }
.dot { fill: var(--dark); stroke: var(--card); stroke-width: 1.5; }
.dot.used, .dot.evaluation { fill: var(--pred-line); } .dot.best { fill: var(--gold-line); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 50%; background: var(--gold-line); }
 .key.used { background: var(--pred-line); }
.note, .muted, .id, dt { color: var(--muted); font-size: 13px; } .note { margin: 6px 0 0; }
main > .note { margin-bottom: 14px; max-width: 75ch; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; margin: 0;
  padding: 0; list-style: none; }
.worst h3 { font-size: 16px; margin: 0 0 8px; line-height: 1.35; }
.worst dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 0 0 10px; }
dt { padding-top: 1px; } dd { margin: 0; min-width: 0; }
.context { margin: 0; max-width: 85ch; white-space: pre-line; }
.id { margin: 8px 0 0; font-size: 12px; }
mark { color: inherit; border-radius: 3px; padding: 0 2px; background: var(--gold);
  border-bottom: 2px solid var(--gold-line); }
mark.pred { background: var(--pred); border-bottom: 2px dashed var(--pred-line); }
mark.both { background: var(--both); border-bottom: 2px double var(--both-line); }
code { font-size: 12.5px; }
"""


if __name__ == "__main__":
    main()
