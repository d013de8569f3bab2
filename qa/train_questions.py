"""Which questions are read, and what of them is trained on: held-out contexts, misplaced answers, unfit flags."""

import logging
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from qa.columns import column, distinct_texts
from qa.files import QAError
from qa.read_squad import counted, first_of, load_examples

logger = logging.getLogger(__name__)

MISPLACED_ANSWERS = ("repair", "drop", "refuse")
# What is said of answers that do not stand at their answer_start.
REPAIRED = "questions have an answer that does not stand at its answer_start as written: trained on where it stands"
LEFT_OUT = (
    "questions are left out of training: their answer stands nowhere as whole words, or in several places and has no "
    "answer_start"
)
DROPPED = "questions are left out of training: their answer does not stand at its answer_start"
# How the names begin of letters that are written without spaces between words.
WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


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
    text of a repaired answer becomes the context's own characters there, which differ from the gold text in white
    space, case and Unicode's form alone; nothing that is scored is changed, since only training examples come here.
    Questions that are empty are left out.

    The changes, in the order of `examples`: {"id", "text", "answer_start", "repaired_start", "repaired_end"}, which
    count characters of the context, end exclusive; the last two are None where the question is left out. Logs the count
    and first ids of both.

    Raises QAError when none remain, and for "refuse".
    """
    examples = without_empty_questions(examples)
    if len(examples) == 0:
        raise QAError(f"{source}: each question is empty; nothing to train on")
    changes = misplaced_answers(examples, repair=misplaced == "repair")
    if changes and misplaced == "refuse":
        what = (
            "questions have an answer that does not stand at its answer_start: --misplaced_answers repair looks for it"
        )
        raise QAError(f"{source}: {counted(moved(changes.values()), len(examples), what)}")
    left_out = {row: change for row, change in changes.items() if change["repaired_start"] is None}
    repaired = {row: change for row, change in changes.items() if row not in left_out}
    if repaired:
        logger.warning("%s: %s", source, counted(moved(repaired.values()), len(examples), REPAIRED))
        examples = _with_repaired_answers(examples, repaired)
    if left_out:
        what = DROPPED if misplaced == "drop" else LEFT_OUT
        logger.warning("%s: %s", source, counted(moved(left_out.values()), len(examples), what))
        if len(left_out) == len(examples):
            raise QAError(f"{source}: no question's answer stands at its answer_start; nothing to train on")
        examples = examples.select(np.delete(np.arange(len(examples)), list(left_out)))
    return examples, list(changes.values())


def without_empty_questions(examples: Dataset) -> Dataset:
    """The others. How many are empty is among the reader's notes."""
    asked = pc.not_equal(pc.utf8_trim_whitespace(column(examples, "question")), "").to_numpy(zero_copy_only=False)
    return examples if asked.all() else examples.select(np.flatnonzero(asked))


def warn_of_misplaced_answers(split: str, examples: Dataset, source: str) -> None:
    """Logs one line where first gold answers of a split that is not trained on do not stand at their answer_start."""
    changes = misplaced_answers(examples, repair=False).values()
    if changes:
        what = (
            f"{split} questions have a first answer that does not stand at its answer_start: the loss takes what "
            "stands there for the answer, and none where there is no answer_start; exact and f1 take the text"
        )
        logger.warning("%s: %s", source, counted(moved(changes), len(examples), what))


def misplaced_answers(examples: Dataset, repair: bool) -> dict[int, dict]:
    """The changes of `align_answers`, by row. Without `repair` all are left out."""
    contexts = distinct_texts(examples, "context")
    strings, row_of = contexts.distinct.to_pylist(), contexts.row
    ids, answers = column(examples, "id"), column(examples, "answers")
    texts, starts = pc.struct_field(answers, "text"), pc.struct_field(answers, "answer_start")
    answered = np.flatnonzero(pc.list_value_length(texts))
    first_texts, first_starts = (pc.list_flatten(pc.list_slice(lists, 0, 1)).to_pylist() for lists in (texts, starts))
    changes = {}
    order = np.argsort(row_of[answered], kind="stable").tolist()  # contexts, which are folded, one after the other
    for row, text, start in ((answered[i].item(), first_texts[i], first_starts[i]) for i in order):
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
    return dict(sorted(changes.items()))


def find_answer(context: str, text: str, start: int) -> tuple[int, int] | None:
    """(begin, end) of `text` in `context`, end exclusive; None where it is not found, or is white space.

    Case, Unicode's form (composed or not) and the length of white space do not count, nor white space at its ends.
    Taken is, on whole words, the place at `start` itself; else the nearest, the earlier of two, of those without a
    difference in case; else of all; else the place at `start` within a word. A `start` of 0 or less where the text does
    not stand is none: the text is then found only where it stands once.
    """
    places = list(_places(context, text.strip()))
    at_start = next((place for place in places if place[0] == start), None)
    whole = [place for place in places if not any(_splits_word(context, end) for end in place)]
    if at_start in whole:
        return at_start
    same_case = [place for place in whole if _as_one_line(context[slice(*place)]) == _as_one_line(text)]
    found = same_case or whole or [at_start] * (at_start is not None)
    if start <= 0 and len(found) > 1:
        return None
    return min(found, key=lambda place: abs(place[0] - start), default=None)


def _places(context: str, text: str) -> Iterator[tuple[int, int]]:
    """Where `text` stands in `context`, in their folded forms; no place begins or ends within a character."""
    (folded, origin), (wanted, _) = _folded(context), _folded(text)
    at = folded.find(wanted) if wanted else -1
    while at >= 0:
        end = at + len(wanted)
        combined = unicodedata.combining(folded[end]) if end < len(folded) else 0
        if origin[at] != origin[at - 1] and origin[end - 1] != origin[end] and not combined:
            yield int(origin[at]), int(origin[end - 1]) + 1
        at = folded.find(wanted, at + 1)


@lru_cache(maxsize=8)
def _folded(text: str) -> tuple[str, np.ndarray]:
    """The text decomposed, without case, each run of white space as one space; and the place each character comes from.

    The places end with -1, which so stands before the first and after the last.
    """
    pieces = list(map(_fold, text))
    characters = np.frombuffer("".join(pieces).encode("utf-32-le"), np.uint32)
    places = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
    is_space = characters == ord(" ")
    kept = ~is_space | ~np.append(False, is_space[:-1])
    return characters[kept].tobytes().decode("utf-32-le"), np.append(places[kept], -1)


@cache
def _fold(character: str) -> str:
    if character in "\u0130\u0131":  # Turkish has an i with and one without a dot, each in both cases
        return "i"
    if character.isspace():
        return " "
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", character).casefold())


def _as_one_line(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _splits_word(context: str, place: int) -> bool:
    return 0 < place < len(context) and _is_of_word(context[place - 1]) and _is_of_word(context[place])


@cache
def _is_of_word(character: str) -> bool:
    """Whether it is a letter, mark or digit of writing that has spaces between words."""
    letter = unicodedata.category(character)[0] in "LMN"
    return letter and not unicodedata.name(character, "").startswith(WITHOUT_SPACES)


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


def moved(changes: Collection[dict]) -> dict:
    """`first_of` their ids, how far the farthest was from its answer_start, and how many of these are 0.

    A start of 0 may stand for none, and says nothing of distance.
    """
    found = [change for change in changes if change["answer_start"] > 0 and change["repaired_start"] is not None]
    farthest = max((abs(change["repaired_start"] - change["answer_start"]) for change in found), default=0)
    start_is_0 = sum(change["answer_start"] == 0 for change in changes)
    return {**first_of([change["id"] for change in changes]), "farthest": farthest, "start_is_0": start_is_0}
