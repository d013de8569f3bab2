"""What of the questions is trained on: contexts held out for evaluation, misplaced answers, flags that do not fit."""

import functools
import itertools
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import InMemoryTable

from qa.columns import distinct_texts
from qa.files import QAError
from qa.read_squad import EXAMPLE_FEATURES

logger = logging.getLogger(__name__)

MISPLACED_ANSWERS = ("repair", "drop", "refuse")
IDS_SHOWN = 5


# ---- Held out ----


def hold_out(splits: dict[str, Dataset], percentage: int, seed: int, source: str) -> dict[str, Dataset]:
    """The splits, with a "validation" made of `percentage` percent (1 to 99) of the contexts of "train".

    All questions of a context stand on one side, in their order; NumPy's default_rng(seed) chooses the contexts, so
    that the same file and seed give the same sides. At least one context is held out, and one left. Raises ValueError
    where "train" holds but one context.
    """
    train = splits["train"]
    contexts = distinct_texts(train, "context")
    row, number = contexts.row, len(contexts.distinct)
    if number < 2:
        raise QAError(f"--validation_split_percentage: {source} holds one context only, so that none can be held out")
    held_out = np.zeros(number, bool)
    count = min(max(round(number * percentage / 100), 1), number - 1)
    held_out[np.random.default_rng(seed).permutation(number)[:count]] = True
    sides = {
        "train": train.select(np.flatnonzero(~held_out[row])),
        "validation": train.select(np.flatnonzero(held_out[row])),
    }
    logger.info(
        "%s: %d contexts with %d questions are held out to evaluate on, %d with %d left to train on "
        "(--validation_split_percentage %d, --seed %d).",
        source,
        count,
        len(sides["validation"]),
        number - count,
        len(sides["train"]),
        percentage,
        seed,
    )
    return {**splits, **sides}


# ---- Flags that do not fit ----


def without_answer(examples: Dataset) -> int:
    """How many questions have no gold answer."""
    texts = pc.struct_field(examples.with_format("arrow", columns=["answers"])[:]["answers"], "text")
    return pc.sum(pc.equal(pc.list_value_length(texts), 0)).as_py() or 0


def warn_of_flags(split: str, examples: Dataset, source: str, version_2_with_negative: bool) -> str | None:
    """Logs and returns one line where --version_2_with_negative and the questions of "train" or "validation" disagree.

    Without the flag each question gets an answer, so that one without a gold answer scores 0.
    """
    count, line = without_answer(examples), None
    if count and not version_2_with_negative:
        effect = "in evaluation each such question gets an answer all the same and scores 0 (NoAns_exact, NoAns_f1)"
        line = (
            f"{count} of {len(examples)} {split} questions have no answer, but --version_2_with_negative is not given: "
        )
        line += effect
    elif not count and version_2_with_negative and split == "train":
        line = (
            f"--version_2_with_negative is given, but each of {len(examples)} train questions has an answer: the model "
            'does not learn when there is none, and "no answer", where it is chosen, is a guess that lowers the scores'
        )
    if line is not None:
        line = f"{source}: {line}"
        logger.warning("%s.", line)
    return line


# ---- Misplaced answers ----


def place_answers(examples: Dataset, source: str, misplaced: str = "repair") -> tuple[Dataset, list[dict]]:
    """Training examples whose first answer, if they have one, stands at its answer_start; and what was changed.

    Of a first answer that does not stand there, `misplaced` says what is done: "repair" takes the place that `locate`
    finds, and leaves the question out where it finds none; "drop" leaves out all; "refuse" raises. A repaired answer
    stays in its context. For training its text becomes the context's own characters there, which differ from the gold
    text in white space alone; nothing that is scored is changed, since only training examples come here.

    The changes, in the order of `examples`: {"id", "text", "answer_start", "repaired_start", "repaired_end"}, which
    count characters of the context, end exclusive; the last two are None where the question is left out. Logs the count
    and first ids of both.

    Raises ValueError when `examples` has no answers or none remain, and for "refuse".
    """
    if "answers" not in examples.column_names:
        raise QAError(f'{source}: missing key "answers": without gold answers it cannot be trained on')
    changes = misplaced_answers(examples, repair=misplaced == "repair")
    if not changes:
        return examples, []
    left_out = [row for row, change in changes.items() if change["repaired_start"] is None]
    _report_changes(changes.values(), len(examples), source, misplaced)
    if len(left_out) == len(examples):
        raise QAError(f"{source}: no question's answer stands at its answer_start; nothing to train on")
    if len(left_out) < len(changes):
        examples = _with_repaired_answers(examples, changes)
    if left_out:
        examples = examples.select(np.delete(np.arange(len(examples)), left_out))
    return examples, list(changes.values())


def misplaced_answers(examples: Dataset, repair: bool) -> dict[int, dict]:
    """The changes of `place_answers`, by row. Without `repair` all are left out."""
    contexts = distinct_texts(examples, "context")
    table = examples.select_columns(["id", "answers"]).with_format("arrow")[:]
    answers = table["answers"].combine_chunks()
    texts, starts = answers.field("text"), answers.field("answer_start")
    answered = np.flatnonzero(pc.list_value_length(texts).to_numpy() > 0)
    first_texts = texts.values.take(pa.array(texts.offsets.to_numpy()[answered])).to_pylist()
    first_starts = starts.values.to_numpy()[starts.offsets.to_numpy()[answered]].tolist()
    changes, number, context = {}, -1, ""
    for i in np.argsort(contexts.row[answered], kind="stable").tolist():  # each context is made a string once
        row, text, start = int(answered[i]), first_texts[i], first_starts[i]
        if number != contexts.row[row]:
            number = int(contexts.row[row])
            context = contexts.distinct[number].as_py()
        if text and start >= 0 and context.startswith(text, start):
            continue
        begin, end = (locate(context, text, start) if repair else None) or (None, None)
        changes[row] = {
            "id": table["id"][row].as_py(),
            "text": text,
            "answer_start": start,
            "repaired_start": begin,
            "repaired_end": end,
        }
    return dict(sorted(changes.items()))


def warn_of_misplaced_golds(split: str, examples: Dataset, source: str) -> None:
    """Logs one line where first gold answers of a split that is not trained on do not stand at their place."""
    ids = [change["id"] for change in misplaced_answers(examples, repair=False).values()]
    if ids:
        logger.warning(
            f"{source}: {len(ids)} of {len(examples)} {split} questions have a first answer that does not stand at its "
            "answer_start: the loss takes what stands there for the answer, and none where there is no answer_start; "
            f"exact and f1 take the text; first ids: {', '.join(ids[:IDS_SHOWN])}"
        )


def _with_repaired_answers(examples: Dataset, changes: dict[int, dict]) -> Dataset:
    """With the context's own characters as the first answers of the rows that are repaired."""
    answers = examples.with_format("arrow", columns=["answers"])[:]["answers"].to_pylist()
    contexts = distinct_texts(examples, "context")
    number, context = -1, ""
    for row in sorted(changes, key=lambda row: contexts.row[row]):  # each context is made a string once
        begin, end = changes[row]["repaired_start"], changes[row]["repaired_end"]
        if begin is not None:
            if number != contexts.row[row]:
                number = int(contexts.row[row])
                context = contexts.distinct[number].as_py()
            answers[row]["text"][0], answers[row]["answer_start"][0] = context[begin:end], begin
    column = pa.array(answers, EXAMPLE_FEATURES.arrow_schema.field("answers").type)
    if len(examples) == len(examples.data):
        return examples.remove_columns("answers").add_column("answers", column)
    # A selection of rows; add_column would first write each of its contexts out once a question.
    table = examples.with_format("arrow")[:]
    table = table.set_column(table.column_names.index("answers"), "answers", column)
    return Dataset(InMemoryTable(table), info=examples.info)


def _report_changes(changes: Iterable[dict], total: int, source: str, misplaced: str) -> None:
    repaired = [change["id"] for change in changes if change["repaired_start"] is not None]
    left_out = [change["id"] for change in changes if change["repaired_start"] is None]

    def first(ids: list[str]) -> str:
        return f"first ids: {', '.join(ids[:IDS_SHOWN])}"

    if misplaced == "refuse":
        raise QAError(
            f"{source}: {len(left_out)} of {total} questions have an answer whose text does not stand at its "
            f"answer_start; {first(left_out)}; --misplaced_answers repair looks for it in its context"
        )
    if repaired:
        logger.warning(
            f"{source}: {len(repaired)} of {total} questions have an answer that does not stand at its answer_start "
            f"but elsewhere in its context: trained on there; {first(repaired)}"
        )
    if left_out:
        why = "does not stand at its answer_start"
        if misplaced == "repair":
            why = "stands nowhere in its context, or has no answer_start and stands in several places"
        logger.warning(
            f"{source}: {len(left_out)} of {total} questions are left out of training, because the answer's text "
            f"{why}; {first(left_out)}"
        )


def locate(context: str, text: str, start: int) -> tuple[int, int] | None:
    """(begin, end) of `text` in `context`, end exclusive: where it stands nearest to `start`, the earlier of two.

    It is looked for exactly; where that is nowhere, with all runs of white space alike and none at its ends. A negative
    `start` is none: the text is then found only where it occurs once. None where it is not found, or is white space.
    """
    if not text.strip():
        return None
    begins = _nearest(context, text, start)
    if begins:
        begin = _choose(begins, start)
        return None if begin is None else (begin, begin + len(text))
    words, needle = _words(context), " ".join(text.split())
    places = _nearest(words.joined, needle, _joined_place(words, start))
    begin = _choose([_context_place(words, place) for place in places], start)
    if begin is None:
        return None
    return begin, _context_place(words, _joined_place(words, begin) + len(needle) - 1) + 1


def _nearest(text: str, needle: str, start: int) -> list[int]:
    """Where `needle` occurs last up to `start` and first after it; without a start, where it first occurs twice."""
    if start < 0:
        first = text.find(needle)
        places = [first, text.find(needle, first + 1)] if first >= 0 else []
    else:
        places = [text.rfind(needle, 0, start + len(needle)), text.find(needle, start + 1)]
    return [place for place in places if place >= 0]


def _choose(begins: list[int], start: int) -> int | None:
    if start < 0:
        return begins[0] if len(begins) == 1 else None
    return min(begins, key=lambda begin: (abs(begin - start), begin), default=None)


class _Words(NamedTuple):
    """A context's words with single spaces between. Word w begins at starts[w] in the context, at places[w] here."""

    joined: str
    starts: list[int]
    places: list[int]


@functools.lru_cache(maxsize=1)  # the questions of a context stand together
def _words(context: str) -> _Words:
    words = list(re.finditer(r"\S+", context))
    lengths = [word.end() - word.start() + 1 for word in words]
    places = [0, *itertools.accumulate(lengths)][:-1] if words else []
    return _Words(" ".join(word[0] for word in words), [word.start() for word in words], places)


def _joined_place(words: _Words, place: int) -> int:
    """Where the context's character `place` stands in `joined`; of white space, the end of the word before it."""
    word = bisect_right(words.starts, place) - 1
    if place < 0 or word < 0:
        return min(place, 0)
    end = words.places[word + 1] - 1 if word + 1 < len(words.places) else len(words.joined)
    return min(words.places[word] + place - words.starts[word], end)


def _context_place(words: _Words, place: int) -> int:
    word = bisect_right(words.places, place) - 1
    return words.starts[word] + place - words.places[word]
