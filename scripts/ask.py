#!/usr/bin/env python
"""Asks a trained model about a text.

    python scripts/ask.py MODEL_DIR --context_file text.txt --question "Who was she?"
    python scripts/ask.py MODEL_DIR --context_file text.txt         (questions in a loop, one a line)
    cat text.txt | python scripts/ask.py MODEL_DIR --question "Who was she?"

The text may be of any length: it goes through the same windows and the same span search as in run_squad.py.
"""

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qa import load_model  # noqa: E402
from qa.distributed import set_up_logging  # noqa: E402
from qa.files import OneLineParser, QAError, json_line  # noqa: E402
from qa.question_answering_pipeline import QuestionAnsweringPipeline, trained_settings  # noqa: E402
from qa.windows import WindowSettings  # noqa: E402
from utils_qa import AnswerSettings  # noqa: E402

logger = logging.getLogger("run_squad")

WINDOWS_PER_BATCH = 16
RUNNERS_UP = 3
SENTENCE_CHARACTERS = 300  # shown at most on each side of the answer

EPILOG = """
Window and answer settings are by default those that the model was trained with (qa_settings in its config.json), or
else run_squad.py's defaults. An answer here is the one that the evaluation gives with the same settings.

With --json each question gives one line: {"answer", "probability", "start", "end", "n_best"}. start and end count
characters of the text, end exclusive; they are null, and the answer is "", where there is none. n_best holds the best
answers with the same four keys, the first of them the answer; a probability is that of all windows that see the answer.
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ask(args)
    except ValueError as error:  # a QAError, or of the pipeline
        parser.refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def ask(args: argparse.Namespace) -> None:
    set_up_logging(logging.WARNING)
    context = read_context(args.context_file)
    model, tokenizer, settings = load(args)
    pipeline = QuestionAnsweringPipeline(model, tokenizer, device=model.device, **settings)

    in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for question in [args.question] if args.question is not None else read_questions(args.context_file is None):
        # All that were compared, and "no answer".
        answers = pipeline(question, context, top_k=settings["n_best_size"] + 1, batch_size=WINDOWS_PER_BATCH)
        n_best = [named(answer) for answer in (answers if isinstance(answers, list) else [answers])]
        shown = n_best[0] | {"n_best": n_best}
        print(json_line(shown) if args.json else show(shown, context, in_color), flush=True)


def named(answer: dict) -> dict:
    """An answer of the pipeline, by the names of our files."""
    start, end = (answer["start"], answer["end"]) if answer["answer"] else (None, None)
    return {"answer": answer["answer"], "probability": answer["score"], "start": start, "end": end}


# ---- Arguments and texts ----


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="ask.py", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context_file", metavar="FILE", help="text to ask about; by default standard input")
    parser.add_argument("--question", type=str, help="by default questions are read one a line, until the end of input")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    add_model_arguments(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` takes; a setting that is not given is None."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of a trained model, or its name on the hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow code kept with the model to run here")
    for setting in (*fields(WindowSettings), *fields(AnswerSettings)):
        how = {"action": argparse.BooleanOptionalAction} if setting.type is bool else {"type": setting.type}
        parser.add_argument(f"--{setting.name}", help=setting.metadata["help"], **how)


def read_context(file: str | None) -> str:
    """The text, character by character as it stands."""
    if file is None and sys.stdin.isatty():
        print("The text, ended by Ctrl-D on a line of its own:", file=sys.stderr)
    try:
        content = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
    except OSError as error:
        raise QAError(f"--context_file {file}: cannot be read: {error.strerror}") from error
    name = file or "standard input"
    try:
        context = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QAError(f"{name}: byte {error.start}: not UTF-8 text") from error
    if not context.strip():
        raise QAError(f"{name}: holds no text to ask about")
    return context


def read_questions(stdin_is_read: bool) -> Iterator[str]:
    """Questions, one a line: from standard input, or from the terminal where that has given the text."""
    try:
        source = open("/dev/tty", encoding="utf-8") if stdin_is_read else sys.stdin  # noqa: SIM115
    except OSError as error:
        raise QAError(
            "text and questions cannot both be on standard input: give --context_file or --question"
        ) from error
    prompt = "Question (Ctrl-D ends): " if source.isatty() else ""
    print(prompt, end="", file=sys.stderr, flush=True)
    for line in iter(source.readline, ""):
        if line.strip():
            yield line.strip()
        print(prompt, end="", file=sys.stderr, flush=True)


# ---- Model ----


def load(args: argparse.Namespace) -> tuple:
    """(model, tokenizer, settings of the pipeline): flags go before what the model was trained with."""
    name, trust = args.model_dir, args.trust_remote_code
    if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise QAError(f"{name}: there is no such folder, and a name on the hub has not this form")
    model = load_model.load_trained_model(name, trust)
    tokenizer = load_model.load_tokenizer(name, trust_remote_code=trust)
    load_model.fit_token_types(model, tokenizer)
    if not hasattr(model.config, "qa_settings"):
        logger.warning("config.json of %s has no qa_settings: run_squad.py's defaults are taken.", name)
    given = {theirs: getattr(args, ours) for ours, theirs in load_model.PIPELINE_SETTINGS.items()}
    settings = trained_settings(model.config) | {name: value for name, value in given.items() if value is not None}
    load_model.resize_position_embeddings(model, tokenizer, settings["max_seq_len"])
    load_model.check_length(settings["max_seq_len"], model, tokenizer)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer, settings


# ---- Display ----


def show(answer: dict, context: str, in_color: bool) -> str:
    """The answer in its sentence, and the runners-up, as lines of text."""
    lines = [f"{printable(answer['answer']) or 'no answer'}  (probability {answer['probability']:.2f})"]
    if answer["start"] is not None:
        before, after = sentence_around(context, answer["start"], answer["end"])
        mark = ("\033[1;7m", "\033[0m") if in_color else ("[", "]")
        lines.append(f"    {printable(before)}{mark[0]}{printable(answer['answer'])}{mark[1]}{printable(after)}")
    others = Counter()
    for candidate in answer["n_best"]:
        others[printable(candidate["answer"]) or "no answer"] += candidate["probability"]
    del others[printable(answer["answer"]) or "no answer"]
    if others:
        lines.append("  Runners-up:")
    lines += [f"    {probability:.2f}  {text[:80]}" for text, probability in others.most_common(RUNNERS_UP)]
    return "\n".join(lines)


def sentence_around(context: str, start: int, end: int) -> tuple[str, str]:
    """What stands in the answer's sentence before it and after it."""
    # A sentence ends at .!? and white space, not after one letter (an initial) or a title; or at an empty line.
    boundary = re.compile(r"(?<!\b[A-Z])(?<!\b[MDS][rst])(?<!\bMrs)[.!?][\"'”’)\]]*\s+|[。！？]\s*|\n\s*\n")
    first, last = max(0, start - SENTENCE_CHARACTERS), min(len(context), end + SENTENCE_CHARACTERS)
    ends = [match.end() for match in boundary.finditer(context, first, last)]
    begin = max((place for place in ends if place <= start), default=first)
    stop = min((place for place in ends if place >= end), default=last)
    before, after = context[begin:start].lstrip(), context[end:stop].rstrip()
    return "…" * (begin == first > 0) + before, after + "…" * (stop == last < len(context))


def printable(text: str) -> str:
    """One line without control characters, which could command the terminal."""
    text = re.sub(r"\s+", " ", text)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


if __name__ == "__main__":
    main()
