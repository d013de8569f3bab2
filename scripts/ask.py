#!/usr/bin/env python
"""Asks a trained model about a text.

    python scripts/ask.py MODEL_DIR --context_file text.txt --question "Who was she?"
    python scripts/ask.py MODEL_DIR --context_file text.txt         (questions in a loop, one a line)
    cat text.txt | python scripts/ask.py MODEL_DIR --question "Who was she?"

The text may be of any length: it goes through the same windows and the same span search as in run_squad.py.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets  # noqa: E402
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache  # noqa: E402
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: E402

from qa import hub  # noqa: E402
from qa.files import OneLineParser  # noqa: E402
from qa.load_model import check_length, grow_positions, load_config, load_model, load_tokenizer  # noqa: E402
from qa.processes import set_up_logging  # noqa: E402
from qa.run_folder import QA_SETTINGS  # noqa: E402
from qa.windows import QADataCollator, WindowSettings, make_features  # noqa: E402
from utils_qa import AnswerSearch, AnswerSettings, QAPredictions  # noqa: E402

logger = logging.getLogger("run_squad")

WINDOWS_PER_BATCH = 16
RUNNERS_UP = 3
RUNNER_UP_CHARACTERS = 80
SENTENCE_CHARACTERS = 300  # shown at most on each side of the answer

EPILOG = """
Window and answer settings are by default those that run_squad.py has left in MODEL_DIR (qa_settings.json), so that an
answer here is the one that the evaluation gives. A folder without that file is asked with run_squad.py's defaults, and
as version 1 unless --version_2_with_negative is given.

With --json each question gives one line: {"answer", "probability", "start", "end", "n_best"}. start and end count
characters of the text, end exclusive; they are null, and the answer is "", where there is none. n_best is as in
eval_nbest_predictions.json: a span that several windows see stands there once for each, and probability is their sum.
"""


class Settings(NamedTuple):
    """By default as run_squad.py has them."""

    windows: WindowSettings = WindowSettings()
    answers: AnswerSettings = AnswerSettings()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        ask(args)
    except ValueError as error:
        parser.refuse(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def ask(args: argparse.Namespace) -> None:
    set_up_logging(logging.WARNING)
    datasets.disable_progress_bars()

    if args.question is not None:
        check_question(args.question, "--question")
    context = read_context(args.context_file)
    model, tokenizer = load(args.model_dir)
    settings = make_settings(args)
    grow_positions(model, tokenizer, settings.windows.max_seq_length)
    check_length(settings.windows.max_seq_length, model, tokenizer)

    questions = [args.question] if args.question is not None else read_questions(args.context_file is None)
    for question in questions:
        answer = answer_question(model, tokenizer, context, question, settings)
        if args.json:
            print(json.dumps(answer, allow_nan=False), flush=True)
        else:
            print(show(answer, context, in_color=sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)


# ---- Arguments and texts ----


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="ask.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of a trained model, or its name on the hub")
    parser.add_argument("--context_file", metavar="FILE", help="text to ask about; by default standard input")
    parser.add_argument("--question", help="by default questions are read one a line, until the end of input")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    for name in ("max_seq_length", "doc_stride", "max_query_length", "n_best_size", "max_answer_length"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="as in run_squad.py")
    parser.add_argument(
        "--version_2_with_negative",
        action=argparse.BooleanOptionalAction,
        help="whether 'no answer' is an answer; by default as the model was trained or evaluated",
    )
    parser.add_argument("--null_score_diff_threshold", type=float, metavar="X", help="as in run_squad.py")
    return parser


def read_context(file: str | None) -> str:
    """The text, character by character as it stands. Raises ValueError where there is none."""
    name = file or "standard input"
    if file is None and sys.stdin.isatty():
        print("The text, ended by Ctrl-D on a line of its own:", file=sys.stderr)
    try:
        content = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
        context = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--context_file {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start}: not UTF-8 text") from error
    if not context.strip():
        raise ValueError(f"{name}: holds no text to ask about")
    return context


def read_questions(stdin_is_read: bool) -> Iterator[str]:
    """Questions, one a line: from standard input, or from the terminal where that has given the text."""
    source = sys.stdin
    if stdin_is_read:
        try:
            source = open("/dev/tty", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                "text and questions cannot both come from standard input: give --context_file or --question"
            ) from error
    prompt = "Question (Ctrl-D ends): " if source.isatty() else ""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = source.readline()
        except UnicodeDecodeError as error:
            raise ValueError("a question is not UTF-8 text") from error
        if not line:
            break
        if line.strip():
            question = line.strip()
            check_question(question, "the question")
            yield question
    if prompt:
        print(file=sys.stderr)


def check_question(question: str, name: str) -> None:
    if not question.strip():
        raise ValueError(f"{name} is empty")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8 text") from error


# ---- Model ----


def load(model_dir: str):
    """Model and tokenizer, the model with the position type that its config.json names.

    Raises ValueError where there is none that can answer.
    """
    if not os.path.isdir(model_dir) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model_dir):
        raise ValueError(f"{model_dir}: there is no such folder, and a name on the hub has not this form")
    config = load_config(model_dir)
    architectures = config.architectures or []
    if not any(name.endswith("ForQuestionAnswering") for name in architectures):
        raise ValueError(
            f"{model_dir} holds {', '.join(architectures) or 'a model'}, which was not trained to answer questions: "
            "train it with run_squad.py first"
        )
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, config)
    return model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def settings_of(model_dir: str) -> dict:
    """What run_squad.py has left in the folder, in the run's folder for one of its checkpoints, or on the hub."""
    folder = Path(model_dir)
    if folder.is_dir() and folder.name.startswith("checkpoint-"):
        folder = folder.parent
    file = folder / QA_SETTINGS
    if not folder.is_dir():
        with hub.loading(f"cannot load {QA_SETTINGS} from {model_dir}", model_dir, "model", revision="main"):
            try:
                file = Path(hf_hub_download(model_dir, QA_SETTINGS))
            except LocalEntryNotFoundError:  # and not known to be missing on the hub
                if try_to_load_from_cache(model_dir, QA_SETTINGS) is not _CACHED_NO_EXIST:
                    logger.warning(
                        "The cache does not hold %s of %s: run_squad.py's defaults are taken.",
                        QA_SETTINGS,
                        model_dir,
                    )
            except EntryNotFoundError:
                pass
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds a {type(values).__name__}, not one JSON object")
    return values


def make_settings(args: argparse.Namespace) -> Settings:
    """Flags before what run_squad.py has left with the model, before its defaults."""
    values = settings_of(args.model_dir)

    def chosen(defaults: dict) -> dict:
        given = {name: getattr(args, name) for name in defaults}
        return {
            name: given[name] if given[name] is not None else values.get(name, default)
            for name, default in defaults.items()
        }

    windows, answers = (chosen(dataclasses.asdict(defaults)) for defaults in Settings())
    for name in ("n_best_size", "max_answer_length"):
        if answers[name] < 1:
            raise ValueError(f"--{name} is {answers[name]}, must be at least 1")
    return Settings(WindowSettings(**windows), AnswerSettings(**answers))


# ---- Answers ----


def answer_question(model, tokenizer, context: str, question: str, settings: Settings) -> dict:
    """{answer, probability, start, end, n_best}; see EPILOG."""
    examples = datasets.Dataset.from_dict({"id": ["question"], "context": [context], "question": [question]})
    with temporary_cache():
        features = make_features(examples, tokenizer, settings.windows)
        predictions = find_answers(model, tokenizer, examples, features, settings.answers)
    text, n_best = predictions.answers["question"], predictions.n_best["question"]
    best = next(candidate for candidate in n_best if candidate["text"] == text)
    span = best["start"], best["end"]
    probability = sum(c["probability"] for c in n_best if (c["start"], c["end"]) == span)
    return {"answer": text, "probability": probability, "start": span[0], "end": span[1], "n_best": n_best}


@contextlib.contextmanager
def temporary_cache():
    """Features are kept in the cache of datasets; those of a text and question asked here go at once."""
    kept = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = kept


@torch.inference_mode()
def find_answers(model, tokenizer, examples, features, settings: AnswerSettings) -> QAPredictions:
    collate = QADataCollator(tokenizer)
    search = AnswerSearch(examples, features, settings, model.device)
    features = features.select_columns([n for n in ("input_ids", "token_type_ids") if n in features.column_names])
    for first in range(0, len(features), WINDOWS_PER_BATCH):
        window = range(first, min(first + WINDOWS_PER_BATCH, len(features)))
        batch = collate([features[i] for i in window])
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        window = torch.tensor(window, device=model.device)
        search.keep(search.find(window, output.start_logits, output.end_logits))
    return search.predictions()


# ---- Display ----


def show(answer: dict, context: str, in_color: bool) -> str:
    """The answer in its sentence, and the runners-up, as lines of text."""
    lines = [f"{printable(answer['answer']) or 'no answer'}  (probability {answer['probability']:.2f})"]
    if answer["start"] is not None:
        before, after = sentence_around(context, answer["start"], answer["end"])
        mark = ("\033[1;7m", "\033[0m") if in_color else ("[", "]")
        lines.append(f"    {printable(before)}{mark[0]}{printable(answer['answer'])}{mark[1]}{printable(after)}")
    others = {}
    for candidate in answer["n_best"]:
        if candidate["text"] != answer["answer"]:
            text = printable(candidate["text"]) or "no answer"
            others[text] = others.get(text, 0.0) + candidate["probability"]
    best_others = sorted(others.items(), key=lambda other: -other[1])[:RUNNERS_UP]
    if best_others:
        lines.append("  Runners-up:")
        lines += [f"    {probability:.2f}  {shorten(text)}" for text, probability in best_others]
    return "\n".join(lines)


def sentence_around(context: str, start: int, end: int) -> tuple[str, str]:
    """What stands in the answer's sentence before it and after it."""
    # A sentence ends at .!? and white space, not after one letter (an initial) or a title; or at an empty line.
    boundary = re.compile(r"(?<!\b[A-Z])(?<!\b[MDS][rst])(?<!\bMrs)[.!?][\"'”’)\]]*\s+|[。！？]\s*|\n\s*\n")
    earlier = context[max(0, start - SENTENCE_CHARACTERS) : start]
    ends = [match.end() for match in boundary.finditer(earlier)]
    cut = start > SENTENCE_CHARACTERS and not ends
    before = ("…" if cut else "") + earlier[ends[-1] if ends else 0 :]
    # The answer's own last characters belong to what is searched: it may end with its sentence.
    later = context[end : end + SENTENCE_CHARACTERS]
    tail = context[max(start, end - 3) : end]
    for match in boundary.finditer(tail + later):
        if match.end() >= len(tail):
            return before.lstrip(), later[: match.end() - len(tail)].rstrip()
    return before.lstrip(), later.rstrip() + ("…" if end + SENTENCE_CHARACTERS < len(context) else "")


def shorten(text: str) -> str:
    return text if len(text) <= RUNNER_UP_CHARACTERS else text[: RUNNER_UP_CHARACTERS - 1].rstrip() + "…"


def printable(text: str) -> str:
    """One line without control characters, which could command the terminal."""
    text = re.sub(r"\s+", " ", text)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


if __name__ == "__main__":
    main()
