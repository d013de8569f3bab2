#!/usr/bin/env python
"""Asks a trained model about a text.

    python scripts/ask.py MODEL_DIR --context_file text.txt --question "Who was she?"
    python scripts/ask.py MODEL_DIR --context_file text.txt         (questions in a loop, one a line)
    cat text.txt | python scripts/ask.py MODEL_DIR --question "Who was she?"

The text may be of any length: it goes through the same windows and the same span search as in run_squad.py.
"""

import argparse
import json
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

import datasets  # noqa: E402
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

from qa import hub, load_model  # noqa: E402
from qa.checkpoints import QA_SETTINGS  # noqa: E402
from qa.distributed import set_up_logging  # noqa: E402
from qa.files import OneLineParser, QAError, json_line  # noqa: E402
from qa.windows import QADataCollator, WindowSettings, make_features  # noqa: E402
from utils_qa import AnswerSearch, AnswerSettings  # noqa: E402

logger = logging.getLogger("run_squad")

WINDOWS_PER_BATCH = 16
RUNNERS_UP = 3
SENTENCE_CHARACTERS = 300  # shown at most on each side of the answer

EPILOG = """
Window and answer settings are by default those that run_squad.py has left in MODEL_DIR (qa_settings.json), so that an
answer here is the one that the evaluation gives; without that file they are run_squad.py's defaults.

With --json each question gives one line: {"answer", "probability", "start", "end", "n_best"}. start and end count
characters of the text, end exclusive; they are null, and the answer is "", where there is none. n_best is as in
eval_nbest_predictions.json: a span that several windows see stands there once for each, and probability is their sum.
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ask(args)
    except (QAError, UnicodeError) as error:
        parser.refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def ask(args: argparse.Namespace) -> None:
    set_up_logging(logging.WARNING)
    datasets.disable_progress_bars()
    context = read_context(args.context_file)
    model, tokenizer = load(args.model_dir, args.trust_remote_code)
    saved = saved_settings(args.model_dir)
    windows, answers = (chosen_settings(kind, args, saved) for kind in (WindowSettings, AnswerSettings))
    load_model.resize_position_embeddings(model, tokenizer, windows.max_seq_length)
    load_model.check_length(windows.max_seq_length, model, tokenizer)

    in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for question in [args.question] if args.question is not None else read_questions(args.context_file is None):
        answer = answer_question(model, tokenizer, context, question, windows, answers)
        print(json_line(answer) if args.json else show(answer, context, in_color), flush=True)


# ---- Arguments and texts ----


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="ask.py", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of a trained model, or its name on the hub")
    parser.add_argument("--context_file", metavar="FILE", help="text to ask about; by default standard input")
    parser.add_argument("--question", type=str, help="by default questions are read one a line, until the end of input")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow code kept with the model to run here")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    for setting in (*fields(WindowSettings), *fields(AnswerSettings)):
        how = {"action": argparse.BooleanOptionalAction} if setting.type is bool else {"type": setting.type}
        parser.add_argument(f"--{setting.name}", help=setting.metadata["help"], **how)
    return parser


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


def load(model_dir: str, trust_remote_code: bool = False):
    """(model, tokenizer), the model with the position type that its config.json names."""
    if not os.path.isdir(model_dir) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model_dir):
        raise QAError(f"{model_dir}: there is no such folder, and a name on the hub has not this form")
    model = load_model.load_trained_model(model_dir, trust_remote_code)
    tokenizer = load_model.load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    load_model.fit_token_types(model, tokenizer)
    return model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def saved_settings(model_dir: str) -> dict:
    """What run_squad.py has left in the folder, in the run's folder for one of its checkpoints, or on the hub."""
    is_folder, path = os.path.isdir(model_dir), Path(model_dir).absolute()
    name = str(path.parent) if is_folder and path.name.startswith("checkpoint-") else model_dir
    with hub.loading(f"cannot load {QA_SETTINGS} from {name}", name, "model", revision="main"):
        file = cached_file(name, QA_SETTINGS, _raise_exceptions_for_missing_entries=False)
    if file is None:
        # The cache knows what the hub has said that it does not have.
        if not is_folder and try_to_load_from_cache(name, QA_SETTINGS) is not _CACHED_NO_EXIST:
            logger.warning("The cache does not hold %s of %s: run_squad.py's defaults are taken.", QA_SETTINGS, name)
        return {}
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise QAError(f"{file}: is not a JSON object: {error}") from error


def chosen_settings(kind: type, args: argparse.Namespace, saved: dict):
    """An instance of `kind`: flags before what run_squad.py has left with the model, before the defaults."""
    chosen = saved | {name: value for name, value in vars(args).items() if value is not None}
    return kind(**{setting.name: chosen[setting.name] for setting in fields(kind) if setting.name in chosen})


# ---- Answers ----


@torch.inference_mode()
def answer_question(
    model, tokenizer, context: str, question: str, windows: WindowSettings, answers: AnswerSettings
) -> dict:
    """{answer, probability, start, end, n_best}; see EPILOG."""
    if not question.strip():
        raise QAError("the question is empty")
    examples = datasets.Dataset.from_list([{"id": "question", "context": context, "question": question}])
    features = make_features(examples, tokenizer, windows)
    collate = QADataCollator(tokenizer)
    search = AnswerSearch(examples, features, answers, model.device)
    for window in torch.arange(len(features)).split(WINDOWS_PER_BATCH):
        batch = collate([features[i] for i in window.tolist()])
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        search.keep(search.find(window.to(model.device), output.start_logits, output.end_logits))
    predictions = search.predictions()
    text, n_best = predictions.answers["question"], predictions.n_best["question"]
    best = next(candidate for candidate in n_best if candidate["text"] == text)
    span = best["start"], best["end"]
    probability = sum(c["probability"] for c in n_best if (c["start"], c["end"]) == span)
    return {"answer": text, "probability": probability, "start": span[0], "end": span[1], "n_best": n_best}


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
        others[printable(candidate["text"]) or "no answer"] += candidate["probability"]
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
