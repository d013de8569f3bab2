#!/usr/bin/env python
"""Shows what training would see of files of questions, without training.

    python scripts/check_data.py train.json --model_name_or_path google-bert/bert-base-uncased
    python scripts/check_data.py train.parquet more.jsonl.gz --model_name_or_path MODEL --validation_file dev.json

The files are read, their answers aligned and their windows cut as run_squad.py does it; nothing is written.
"""

import argparse
import logging
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402

from qa.columns import distinct_texts  # noqa: E402
from qa.distributed import set_up_logging  # noqa: E402
from qa.files import OneLineParser, QAError, json_line  # noqa: E402
from qa.layouts import layout  # noqa: E402
from qa.load_model import load_tokenizer  # noqa: E402
from qa.read_squad import NOTES, counted, files_of, first_of, notes, read_squad_file  # noqa: E402
from qa.train_questions import (  # noqa: E402
    LEFT_OUT,
    REPAIRED,
    align_answers,
    misplaced_answers,
    moved,
    warn_of_flags,
    without_answer,
    without_empty_questions,
)
from qa.windows import WindowSettings, data_limits, make_features  # noqa: E402
from utils_qa import AnswerSettings  # noqa: E402

TEXTS_PER_BATCH = 1000
# Facts that count questions and name the first of them, and what is said of each.
NAMED = {
    **NOTES,
    "repaired": REPAIRED,
    "left_out": LEFT_OUT,
    "asked_in_validation": "questions are asked of the same context in the validation file",
}
EPILOG = """
With --json each file gives one line, an object: file, layout, questions, contexts, without_answer; without_id,
id_of_another, repeated, impossible_with_answer, empty, repaired, left_out and, with --validation_file,
asked_in_validation {count, first_ids}, of which repaired and left_out say how far the farthest answer was from its
answer_start, and how many of these are 0 {farthest, start_is_0}; flag_warning; context_tokens
and question_tokens {mean, median, 90%, 99%, max}; windows {count, per_question, most_per_question}; limits, a list of
lines. What there is not is null.
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    set_up_logging(logging.ERROR)  # what the reader would say is on the screen
    datasets.disable_progress_bars()
    try:
        # The examples are kept here, and their features beside them. Windows removes no file that an error still holds.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            check(args, folder)
    except (QAError, OSError) as error:  # the latter where there is no such model
        parser.refuse(error)


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="check_data.py", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="each, also a folder or 'data/*', is looked at as a --train_file of its own",
    )
    parser.add_argument("--model_name_or_path", metavar="MODEL", required=True, help="whose tokenizer is taken")
    number = {"type": int, "metavar": "N"}
    for setting in fields(WindowSettings):
        what = f"{setting.metadata['help']} By default {setting.default}."
        parser.add_argument(f"--{setting.name}", default=setting.default, help=what, **number)
    longest = AnswerSettings.max_answer_length
    parser.add_argument("--max_answer_length", default=longest, help=f"By default {longest} tokens.", **number)
    parser.add_argument("--version_2_with_negative", action="store_true", help="as in run_squad.py")
    parser.add_argument("--validation_file", metavar="FILE", help="look for its questions in each FILE")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow code kept with the model to run here")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    return parser


def check(args: argparse.Namespace, cache_dir: str) -> None:
    """Prints what there is to know of each file. Raises QAError where one cannot be read or cut into windows."""
    windows = WindowSettings(**{setting.name: getattr(args, setting.name) for setting in fields(WindowSettings)})
    AnswerSettings(max_answer_length=args.max_answer_length)  # raises
    validation = read_squad_file(args.validation_file, cache_dir) if args.validation_file else None
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    for file in args.files:
        facts = facts_of(file, read_squad_file(file, cache_dir), validation, tokenizer, windows, args)
        print(json_line(facts) if args.json else show(facts, windows), flush=True)


def facts_of(file: str, examples, validation, tokenizer, windows: WindowSettings, args: argparse.Namespace) -> dict:
    """What EPILOG describes."""
    layouts = {}
    for name in files_of(file).values():
        with open(name, "rb") as opened:
            layouts[layout(opened, name)] = None
    facts = {"file": file, "layout": "; ".join(layouts)}
    contexts, questions = (distinct_texts(examples, name).distinct.to_pylist() for name in ("context", "question"))
    facts |= {"questions": len(examples), "contexts": len(contexts), "without_answer": len(examples)}
    facts |= dict.fromkeys(NOTES, first_of([])) | notes(examples)
    facts |= {"repaired": None, "left_out": None, "flag_warning": None}
    facts |= {"context_tokens": lengths(contexts, tokenizer), "question_tokens": lengths(questions, tokenizer)}
    facts |= {"windows": None, "limits": None}
    if has_gold := "answers" in examples.column_names:
        asked = without_empty_questions(examples)
        changes = misplaced_answers(asked, repair=True).values()
        left_out = [change for change in changes if change["repaired_start"] is None]
        facts["repaired"] = moved([change for change in changes if change["repaired_start"] is not None])
        facts["left_out"] = moved(left_out)
        facts["without_answer"] = without_answer(examples)
        facts["flag_warning"] = warn_of_flags("train", examples, file, args.version_2_with_negative)
    if not has_gold or len(left_out) < len(asked):
        features = make_features(align_answers(examples, file)[0] if has_gold else examples, tokenizer, windows)
        counts = np.bincount(features["example_index"])
        per_question = {"per_question": round(float(counts.mean()), 2), "most_per_question": int(counts.max())}
        facts["windows"] = {"count": len(features), **per_question}
        facts["limits"] = data_limits(features, args.max_answer_length, args.max_query_length)
    if validation is not None:
        asked_there = set(asked_of(validation))
        of_both = [id_ for id_, pair in zip(examples["id"], asked_of(examples), strict=True) if pair in asked_there]
        facts["asked_in_validation"] = first_of(of_both)
    return facts


def lengths(texts: list[str], tokenizer) -> dict:
    """Of their tokens."""
    counts = []
    for first in range(0, len(texts), TEXTS_PER_BATCH):
        encodings = tokenizer(texts[first : first + TEXTS_PER_BATCH], add_special_tokens=False, verbose=False)
        counts += [len(ids) for ids in encodings["input_ids"]]
    shares = np.quantile(counts, (0.5, 0.9, 0.99, 1), method="higher").tolist()
    return {"mean": round(float(np.mean(counts)), 1)} | dict(zip(("median", "90%", "99%", "max"), shares, strict=True))


def asked_of(examples) -> list[tuple[str, str]]:
    """(context, question) of each example; questions that differ in white space alone are the same."""
    contexts = distinct_texts(examples, "context")
    texts, questions = contexts.distinct.to_pylist(), (" ".join(question.split()) for question in examples["question"])
    return [(texts[row], question) for row, question in zip(contexts.row, questions, strict=True)]


def show(facts: dict, windows: WindowSettings) -> str:
    """The facts as lines of text, without control characters, which could command the terminal."""
    lines = [f"{facts['file']}: {facts['layout']}", f"  {facts['questions']} questions on {facts['contexts']} contexts"]
    if facts["flag_warning"] is not None:
        lines.append(f"  ! {facts['flag_warning']}")
    elif facts["without_answer"]:
        lines.append(f"  {facts['without_answer']} have no answer")
    for name, what in NAMED.items():
        if (questions := facts.get(name)) and questions["count"]:
            lines.append(f"  ! {counted(questions, facts['questions'], what)}")
    for name in ("context_tokens", "question_tokens"):
        lines.append(f"  {name.replace('_', ' ')}: {', '.join(f'{what} {n}' for what, n in facts[name].items())}")
    cut = f"windows of at most {windows.max_seq_length} tokens, --doc_stride {windows.doc_stride}"
    if found := facts["windows"]:
        cut += f": {found['per_question']} a question, {found['most_per_question']} at most"
    lines += [f"  {found['count'] if found else 0} {cut}", *(f"  ! {line}" for line in facts["limits"] or [])]
    return "".join(f"{printable(line)}\n" for line in lines)


def printable(line: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


if __name__ == "__main__":
    main()
