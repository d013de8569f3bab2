"""Which questions are read, and what of them is trained on: held-out contexts, misplaced answers, unfit flags."""

import logging
import re
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from qa.columns import column, distinct_texts
from qa.files import QAError
from qa.read_squad import load_examples

logger = logging.getLogger(__name__)

MISPLACED_ANSWERS = ("repair", "drop", "refuse")
IDS_SHOWN = 5


def read_examples(model_args, data_args, training_args) -> tuple[dict, list[dict]]:
    """The questions of each split that is needed: "train", "validation", "test" -> `datasets.Dataset`.

    And what `align_answers` changed in those of "train".
    """
    needed = {
        "train": (training_args.do_train, data_args.train_file, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.validation_file, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.test_file, data_args.max_predict_samples),
    }
    needed = {split: (file, most) for split, (asked, file, most) in needed.items() if asked}
    files = {split: file for split, (file, _) in needed.items()}
    percentage = data_args.validation_split_percentage
    if percentage and training_args.do_eval:
        files["train"] = data_args.train_file
    with training_args.main_process_first(desc="reading the questions"):
        splits = load_examples(
            data_args.dataset_name, data_args.dataset_config_name, files, model_args.cache_dir, model_args.token
        )
    if percentage and "validation" in splits:
        logger.info("--validation_split_percentage %d has no effect: there are validation questions.", percentage)
        data_args.validation_split_percentage = None
    elif percentage and "train" in splits:
        source = data_args.train_file or data_args.dataset_name
        splits = hold_out(splits, percentage, training_args.seed, source)

    examples, answer_changes = {}, []
    for split, (file, most) in needed.items():
        source = file or data_args.dataset_name or data_args.train_file
        if split not in splits:
            hint = "; --validation_split_percentage makes one of its train split" if split == "validation" else ""
            given = f"{source} has {', '.join(splits)}" if source else "no data are given"
            raise QAError(f"no {split} questions: {given}; give --{split}_file or a --dataset_name that has them{hint}")
        questions = splits[split]
        if split != "test":
            if "answers" not in questions.column_names:
                raise QAError(f"{source}: no question has the key 'answers', which {split} needs")
            warn_of_flags(split, questions, source, data_args.version_2_with_negative)
        if split == "train":
            questions, answer_changes = align_answers(questions, source, data_args.misplaced_answers)
        elif "answers" in questions.column_names:
            warn_of_misplaced_answers(split, questions, source)
        examples[split] = questions if most is None else questions.select(range(min(most, len(questions))))
    return examples, answer_changes


def hold_out(splits: dict[str, Dataset], percentage: int, seed: int, source: str) -> dict[str, Dataset]:
    """The splits, with a "validation" made of `percentage` percent (1 to 99) of the contexts of "train".

    All questions of a context stand on one side, in their order; NumPy's default_rng(seed) chooses the contexts, so
    that the same file and seed give the same sides. At least one context is held out, and one left. Raises QAError
    where "train" holds but one context.
    """
    train = splits["train"]
    contexts = distinct_texts(train, "context")
    total = len(contexts.distinct)
    if total < 2:
        raise QAError(f"--validation_split_percentage: {source} holds one context only, so that none can be held out")
    count = min(max(round(total * percentage / 100), 1), total - 1)
    held_out = np.isin(contexts.row, np.random.default_rng(seed).permutation(total)[:count])
    left, validation = train.select(np.flatnonzero(~held_out)), train.select(np.flatnonzero(held_out))
    logger.info(
        f"{source}: {count} contexts with {len(validation)} questions are held out to evaluate on, {total - count} "
        f"with {len(left)} left to train on (--validation_split_percentage {percentage}, --seed {seed})."
    )
    return {**splits, "train": left, "validation": validation}


# ---- Flags that do not fit ----


def without_answer(examples: Dataset) -> int:
    """How many questions have no gold answer."""
    counts = pc.list_value_length(pc.struct_field(column(examples, "answers"), "text"))
    return int((counts.to_numpy() == 0).sum())


def warn_of_flags(split: str, examples: Dataset, source: str, version_2_with_negative: bool) -> str | None:
    """Logs and returns one line where --version_2_with_negative and the questions of "train" or "validation" disagree.

    Without the flag each question gets an answer, so that one without a gold answer scores 0.
    """
    count = without_answer(examples)
    if count and not version_2_with_negative:
        line = (
            f"{source}: {count} of {len(examples)} {split} questions have no answer, but --version_2_with_negative is "
            "not given: in evaluation each such question gets an answer all the same and scores 0 (NoAns_exact, "
            "NoAns_f1)"
        )
    elif not count and version_2_with_negative and split == "train":
        line = (
            f"{source}: --version_2_with_negative is given, but each of {len(examples)} train questions has an answer: "
            'the model does not learn when there is none, and "no answer", where it is chosen, is a guess that lowers '
            "the scores"
        )
    else:
        return None
    logger.warning("%s.", line)
    return line


# ---- Misplaced answers ----


def align_answers(examples: Dataset, source: str, misplaced: str = "repair") -> tuple[Dataset, list[dict]]:
    """Training examples whose first answer, if they have one, stands at its answer_start; and what was changed.

    Of a first answer that does not stand there, `misplaced` says what is done: "repair" takes the place that
    `find_answer` finds, and leaves the question out where it finds none; "drop" leaves out all; "refuse" raises. The
    text of a repaired answer becomes the context's own characters there, which differ from the gold text in white space
    alone; nothing that is scored is changed, since only training examples come here.

    The changes, in the order of `examples`: {"id", "text", "answer_start", "repaired_start", "repaired_end"}, which
    count characters of the context, end exclusive; the last two are None where the question is left out. Logs the count
    and first ids of both.

    Raises QAError when none remain, and for "refuse".
    """
    changes = misplaced_answers(examples, repair=misplaced == "repair")
    if changes and misplaced == "refuse":
        what = "have an answer that does not stand at its answer_start: --misplaced_answers repair looks for it"
        raise QAError(_count(changes.values(), examples, source, f"questions {what} in its context"))
    left_out = {row: change for row, change in changes.items() if change["repaired_start"] is None}
    repaired = {row: change for row, change in changes.items() if row not in left_out}
    if repaired:
        what = "have an answer that does not stand at its answer_start but elsewhere in its context: trained on there"
        logger.warning(_count(repaired.values(), examples, source, f"questions {what}"))
        examples = _with_repaired_answers(examples, repaired)
    if left_out:
        why = "stands nowhere in its context, or has no answer_start and stands in several places"
        if misplaced == "drop":
            why = "does not stand at its answer_start"
        what = f"questions are left out of training, because the answer's text {why}"
        logger.warning(_count(left_out.values(), examples, source, what))
        if len(left_out) == len(examples):
            raise QAError(f"{source}: no question's answer stands at its answer_start; nothing to train on")
        examples = examples.select(np.delete(np.arange(len(examples)), list(left_out)))
    return examples, list(changes.values())


def warn_of_misplaced_answers(split: str, examples: Dataset, source: str) -> None:
    """Logs one line where first gold answers of a split that is not trained on do not stand at their answer_start."""
    changes = misplaced_answers(examples, repair=False).values()
    if changes:
        what = (
            f"{split} questions have a first answer that does not stand at its answer_start: the loss takes what "
            "stands there for the answer, and none where there is no answer_start; exact and f1 take the text"
        )
        logger.warning(_count(changes, examples, source, what))


def misplaced_answers(examples: Dataset, repair: bool) -> dict[int, dict]:
    """The changes of `align_answers`, by row. Without `repair` all are left out."""
    contexts = distinct_texts(examples, "context")
    strings, row_of = contexts.distinct.to_pylist(), contexts.row
    ids, answers = column(examples, "id"), column(examples, "answers")
    texts, starts = pc.struct_field(answers, "text"), pc.struct_field(answers, "answer_start")
    answered = np.flatnonzero(pc.list_value_length(texts))
    first_texts, first_starts = (pc.list_flatten(pc.list_slice(lists, 0, 1)).to_pylist() for lists in (texts, starts))
    changes = {}
    for row, text, start in zip(answered.tolist(), first_texts, first_starts, strict=True):
        context = strings[row_of[row]]
        if text and start >= 0 and context.startswith(text, start):
            continue
        begin, end = (find_answer(context, text, start) if repair else None) or (None, None)
        changes[row] = {
            "id": ids[row].as_py(),
            "text": text,
            "answer_start": start,
            "repaired_start": begin,
            "repaired_end": end,
        }
    return changes


def find_answer(context: str, text: str, start: int) -> tuple[int, int] | None:
    """(begin, end) of `text` in `context`, end exclusive: where it stands nearest to `start`, the earlier of two.

    All runs of white space are alike, and those at its ends do not count. A negative `start` is none: the text is then
    found only where it occurs once. None where it is not found, or is white space.
    """
    if not text.strip():
        return None
    words = r"\s+".join(map(re.escape, text.split()))
    spans = [found.span(1) for found in re.finditer(f"(?=({words}))", context)]  # occurrences may overlap
    if start < 0 and len(spans) > 1:
        return None
    return min(spans, key=lambda span: abs(span[0] - start), default=None)


def _with_repaired_answers(examples: Dataset, repaired: dict[int, dict]) -> Dataset:
    """With the context's own characters as the first answers of the rows that are repaired."""
    # Of a selection of rows, add_column would first write each of its contexts out once a question.
    stored = Dataset(examples.data, info=examples.info)
    rows = np.arange(len(stored)) if examples._indices is None else examples._indices.column(0).to_numpy()
    answers = column(stored, "answers")
    values = answers.to_pylist()
    for row, change in repaired.items():
        begin, end = change["repaired_start"], change["repaired_end"]
        answer = values[rows[row]]
        answer["text"][0], answer["answer_start"][0] = examples[row]["context"][begin:end], begin
    stored = stored.remove_columns("answers").add_column("answers", pa.array(values, answers.type))
    return stored.select(rows)


def _count(changes: Collection[dict], examples: Dataset, source: str, what: str) -> str:
    ids = [change["id"] for change in changes]
    return f"{source}: {len(ids)} of {len(examples)} {what}; first ids: {', '.join(ids[:IDS_SHOWN])}"
