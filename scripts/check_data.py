#!/usr/bin/env python
"""Shows what training would see of files of questions, without training.

    python scripts/check_data.py train.json --model_name_or_path google-bert/bert-base-uncased
    python scripts/check_data.py train.parquet more.jsonl.gz --model_name_or_path MODEL --validation_file dev.json

The files are read, their answers repaired and their windows cut as run_squad.py does it; nothing is written.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402

from qa.columns import distinct_texts  # noqa: E402
from qa.files import OneLineParser  # noqa: E402
from qa.layouts import layout  # noqa: E402
from qa.load_model import load_tokenizer  # noqa: E402
from qa.processes import set_up_logging  # noqa: E402
from qa.read_squad import made_ids, read_squad_file  # noqa: E402
from qa.train_questions import misplaced_answers, place_answers, warn_of_flags, without_answer  # noqa: E402
from qa.windows import (  # noqa: E402
    WindowSettings,
    check_tokenizer,
    count_limits,
    data_limits,
    make_features,
    make_train_features,
)

IDS_SHOWN = 5
BAR = 40  # characters of the longest one
TEXTS_PER_BATCH = 1000

EPILOG = """
With --json each file gives one line, an object: file, layout, questions, contexts, without_id, without_answer,
flag_warning, answers {repaired, left_out}, context_tokens and question_tokens {mean, max, histogram: [[from, to, n]]},
windows {count, per_question, most_per_question}, limits {lines, too_long, not_held, long_contexts, cut_questions} and,
with --validation_file, doubled {questions, contexts, ids}. Where questions are named it is {count, first_ids}. Without
gold answers, or where none is left, answers or limits are null.
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    set_up_logging(logging.ERROR)  # what the reader would say is on the screen
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:  # the examples are kept here, and their features beside them
            check(args, folder)
    except (ValueError, OSError) as error:
        parser.refuse(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="check_data.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="each is looked at as a --train_file of its own")
    parser.add_argument("--model_name_or_path", metavar="MODEL", required=True, help="whose tokenizer is taken")
    defaults = {"max_seq_length": 384, "doc_stride": 128, "max_query_length": 64, "max_answer_length": 30}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"by default {default}")
    parser.add_argument("--version_2_with_negative", action="store_true", help="as in run_squad.py")
    parser.add_argument("--validation_file", metavar="FILE", help="look for its questions in each FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    return parser


def check(args: argparse.Namespace, cache_dir: str) -> None:
    """Prints what there is to know of each file. Raises ValueError where one cannot be read or cut into windows."""
    windows = WindowSettings(args.max_seq_length, args.doc_stride, args.max_query_length)
    if args.max_answer_length < 1:
        raise ValueError(f"--max_answer_length is {args.max_answer_length}, must be at least 1")
    validation = None
    if args.validation_file is not None:
        validation = read_squad_file(args.validation_file, cache_dir)
    tokenizer = load_tokenizer(args.model_name_or_path)
    check_tokenizer(tokenizer)
    for file in args.files:
        facts = facts_of(file, read_squad_file(file, cache_dir), validation, tokenizer, windows, args)
        print(json.dumps(facts) if args.json else show(facts, args), flush=True)


# ---- Facts ----


def facts_of(file: str, examples, validation, tokenizer, windows: WindowSettings, args: argparse.Namespace) -> dict:
    """What EPILOG describes."""
    contexts, questions = distinct(examples, "context"), distinct(examples, "question")
    has_gold = "answers" in examples.column_names
    facts = {
        "file": file,
        "layout": layout_of(file),
        "questions": len(examples),
        "contexts": len(contexts),
        "without_id": named(made_ids(examples)),
        "without_answer": without_answer(examples) if has_gold else len(examples),
        "flag_warning": warn_of_flags("train", examples, file, args.version_2_with_negative) if has_gold else None,
        "answers": None,
        "context_tokens": lengths(contexts, tokenizer),
        "question_tokens": lengths(questions, tokenizer),
        "limits": None,
    }
    trained_on = examples
    if has_gold:
        changes = misplaced_answers(examples, repair=True).values()
        repaired = [change["id"] for change in changes if change["repaired_start"] is not None]
        left_out = [change["id"] for change in changes if change["repaired_start"] is None]
        facts["answers"] = {"repaired": named(repaired), "left_out": named(left_out)}
        trained_on = place_answers(examples, file)[0] if len(left_out) < len(examples) else None
    if trained_on is None:
        facts["windows"] = {"count": 0, "per_question": 0.0, "most_per_question": 0}
    else:
        features = (make_train_features if has_gold else make_features)(trained_on, tokenizer, windows)
        per_question = np.bincount(features["example_index"], minlength=len(trained_on))
        facts["windows"] = {
            "count": len(features),
            "per_question": round(float(per_question.mean()), 2),
            "most_per_question": int(per_question.max()),
        }
        if has_gold:
            facts["limits"] = {
                "lines": data_limits(features, args.max_answer_length, args.max_query_length),
                **{name: count for name, (count, _) in count_limits(features, args.max_answer_length).items()},
            }
    if validation is not None:
        facts["doubled"] = doubled(examples, validation)
    return facts


def layout_of(path: str) -> str:
    with open(path, "rb") as file:
        return layout(file, path)


def distinct(examples, column: str) -> list[str]:
    return distinct_texts(examples, column).distinct.to_pylist()


def named(ids: list[str]) -> dict:
    return {"count": len(ids), "first_ids": ids[:IDS_SHOWN]}


def token_counts(texts: list[str], tokenizer) -> np.ndarray:
    """(texts,) int64: without special tokens."""
    counts = []
    for first in range(0, len(texts), TEXTS_PER_BATCH):
        encodings = tokenizer(texts[first : first + TEXTS_PER_BATCH], add_special_tokens=False, verbose=False)
        counts += [len(ids) for ids in encodings["input_ids"]]
    return np.array(counts, np.int64)


def lengths(texts: list[str], tokenizer) -> dict:
    """{mean, max, histogram}: the histogram's ranges [from, to, count], both ends included, double in width."""
    counts = token_counts(texts, tokenizer)
    # Range 0 is 0 to 15 tokens, range 1 is 16 to 31, range 2 is 32 to 63.
    bins = Counter(max(int(count).bit_length() - 4, 0) for count in counts)
    edges = [0, *(2 ** (4 + number) for number in range(max(bins) + 1))]
    histogram = [[edges[number], edges[number + 1] - 1, bins[number]] for number in range(min(bins), max(bins) + 1)]
    return {"mean": round(float(counts.mean()), 1), "max": int(counts.max()), "histogram": histogram}


def doubled(train, validation) -> dict:
    """What stands on both sides: questions asked of the same context, contexts, and ids."""

    def asked_of(examples) -> list[tuple[str, str]]:
        contexts = distinct(examples, "context")
        rows = distinct_texts(examples, "context").row.tolist()
        questions = [" ".join(question.split()) for question in examples["question"]]
        return [(contexts[row], question) for row, question in zip(rows, questions, strict=True)]

    asked = set(asked_of(validation))
    contexts, ids = set(distinct(validation, "context")), set(validation["id"])
    return {
        "questions": named([id_ for id_, pair in zip(train["id"], asked_of(train), strict=True) if pair in asked]),
        "contexts": sum(context in contexts for context in distinct(train, "context")),
        "ids": named([id_ for id_ in train["id"] if id_ in ids]),
    }


# ---- Display ----


def show(facts: dict, args: argparse.Namespace) -> str:
    """The facts as lines of text."""
    windows, limits = facts["windows"], facts["limits"]
    lines = [
        f"{printable(facts['file'])}: {facts['layout']}",
        f"  {facts['questions']} questions on {facts['contexts']} contexts",
        *with_ids("have no id: their place in the file is taken", facts["without_id"]),
    ]
    if facts["flag_warning"] is not None:
        lines.append(f"  ! {printable(facts['flag_warning'])}")
    elif facts["without_answer"]:
        lines.append(f"  {facts['without_answer']} have no answer")
    if facts["answers"] is not None:
        lines += with_ids("answers were not at their answer_start and are repaired", facts["answers"]["repaired"])
        lines += with_ids("answers are nowhere, or cannot be told apart: left out", facts["answers"]["left_out"])
    for name in ("context_tokens", "question_tokens"):
        lines += ["", *histogram(name.replace("_", " "), facts[name])]
    lines += [
        "",
        f"  {windows['count']} windows of at most {args.max_seq_length} tokens, --doc_stride {args.doc_stride}: "
        f"{windows['per_question']} a question, {windows['most_per_question']} at most",
    ]
    if limits is not None:
        lines += [f"  ! {line}" for line in limits["lines"]]
    if "doubled" in facts:
        name = printable(args.validation_file)
        lines += with_ids(f"questions are asked of the same context in {name}", facts["doubled"]["questions"])
        if facts["doubled"]["contexts"]:
            lines.append(f"  ! {facts['doubled']['contexts']} contexts stand in {name} too")
        lines += with_ids(f"ids stand in {name} too", facts["doubled"]["ids"])
    return "\n".join(lines) + "\n"


def with_ids(what: str, questions: dict) -> list[str]:
    if not questions["count"]:
        return []
    ids = ", ".join(map(printable, questions["first_ids"])) + (", ..." if questions["count"] > IDS_SHOWN else "")
    return [f"  ! {questions['count']} {what}: {ids}"]


def histogram(title: str, facts: dict) -> list[str]:
    highest = max(count for _, _, count in facts["histogram"])
    lines = [f"  {title}: {facts['mean']} on average, {facts['max']} at most"]
    for low, high, count in facts["histogram"]:
        lines.append(f"  {f'{low}-{high}':>13} {'█' * math.ceil(BAR * count / highest)} {count}")
    return lines


def printable(text: str) -> str:
    """One line without control characters, which could command the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


if __name__ == "__main__":
    main()
