"""Questions in: from the hub or from files in any of SQuAD's layouts, as `datasets.Dataset` of STORED_FEATURES."""

import contextlib
import gc
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from qa import columns, hub, layouts
from qa.columns import DistinctText, write_arrow
from qa.files import QAError
from qa.layouts import errors_of, file_rows, known_columns, record_rows

logger = logging.getLogger(__name__)

EXAMPLE_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
# What EXAMPLE_FEATURES are on disk and in memory: a contract of 40 questions is there once.
STORED_FEATURES = Features({**EXAMPLE_FEATURES, "context": DistinctText()})
# Part of the name of each file that is kept, so that nothing is read as earlier code has read it.
SOURCES = [Path(file).read_bytes() for file in (__file__, layouts.__file__, columns.__file__)]
READER = hashlib.sha256(b"".join(SOURCES)).hexdigest()[:8]
SAVED_TO_DISK = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
IDS_SHOWN = 5
# What may be odd about questions as they are read, and what is said of it after their number.
NOTES = {
    "without_id": "questions have no id: their place in the file is taken for one",
    "id_of_another": "questions have the id of another one: their place in the file is taken instead",
    "repeated": "questions are there again, of the same id and context: taken once, with all answers",
    "impossible_with_answer": "questions have an answer but are marked is_impossible: taken as without an answer",
    "empty": "questions are empty: left out of training, and answered in evaluation",
}


def load_examples(
    dataset_name: str | None,
    dataset_config_name: str | None,
    files: dict[str, str | None],
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Dataset]:
    """Examples of each split ("train", "validation", "test") from the hub, from files, or from both.

    `dataset_name` may be a folder, also one of `save_to_disk`: a single Dataset is of the split that it was taken from.
    `files` maps a split to a path; a file takes the place of the hub dataset's split of that name. Every split has the
    columns of STORED_FEATURES, "answers" only where the source has gold answers.

    Raises QAError: the dataset is not found or has other columns, a file is not SQuAD, a split holds no question.
    """
    splits = {}
    if dataset_name:
        what = f"--dataset_name {dataset_name}: cannot be loaded from the hub or its cache"
        with hub.loading(what, dataset_name, "dataset", token=token, cache_dir=cache_dir) as id_:
            if any(os.path.exists(os.path.join(id_, name)) for name in SAVED_TO_DISK):
                found = datasets.load_from_disk(id_)
                if isinstance(found, Dataset):
                    found = {re.match(r"\w+", str(found.split or "train"))[0]: found}  # which may be "train[:100]"
            else:
                found = datasets.load_dataset(id_, dataset_config_name, cache_dir=cache_dir, token=token)
        for split in ("train", "validation", "test"):
            if split in found and files.get(split) is None:
                splits[split] = _read_hub_split(found[split], f"{dataset_name} ({split})", cache_dir)
    for split, path in files.items():
        if path is not None:
            splits[split] = read_squad_file(path, cache_dir)
    return splits


def read_squad_file(path: str | os.PathLike, cache_dir: str | None = None) -> Dataset:
    """Examples of one file, or of `files_of` as one: id, title, context, question and, if it has gold answers, answers.

    A file may have any layout that `qa.layouts` reads. An answer without an `answer_start` has NO_START there. The
    result is kept in `cache_dir` (default: the datasets cache) under the sha256 of the bytes.

    Raises QAError that names the file and the place in it.
    """
    path = os.fspath(path)
    files = files_of(path)
    with errors_of(path):
        digests = []
        for file in files.values():
            with open(file, "rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
        key = digests[0]
        if len(files) > 1:
            logger.info("%s: %d files are read as one: %s.", path, len(files), ", ".join(files))
            key = hashlib.sha256(repr([*zip(files, digests, strict=True)]).encode()).hexdigest()
        return _read_once(_rows(files), path, cache_dir, key)


def files_of(path: str) -> dict[str, str]:
    """The file of that name, those in that folder or those that match it (`*`): paths by names within their folder."""
    pattern = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path
    found = [] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    folder = os.path.commonpath(map(os.path.dirname, found)) if found else ""
    return {os.path.relpath(file, folder or "."): file for file in found or [path]}


def _rows(files: dict[str, str]) -> Iterator[dict]:
    """Their questions, one after the other. Of several files each is named before its places."""
    for name, path in files.items():
        before = f"{os.fsencode(name).decode(errors='backslashreplace')}: " if len(files) > 1 else ""
        with errors_of(name) if before else contextlib.nullcontext(), open(path, "rb") as file:
            for row in file_rows(file):
                row["place"] = before + row["place"]
                yield row


def _read_hub_split(dataset: Dataset, source: str, cache_dir: str | None) -> Dataset:
    """The examples of a dataset whose rows are of any layout, kept as those of a file."""
    files = [file["filename"] for file in dataset.cache_files]
    # A builder's fingerprint says where its files are, not what is in them.
    key = repr((dataset._fingerprint, [(file, os.stat(file).st_mtime_ns) for file in files]))
    key = hashlib.sha256(key.encode()).hexdigest()
    with errors_of(source):
        known = dataset.select_columns(known_columns(dataset.column_names)).with_format("arrow")
        records = chain.from_iterable(table.to_pylist() for table in known.iter(layouts.ROWS_PER_BATCH))
        return _read_once(record_rows(records), source, cache_dir, key)


def _read_once(rows: Iterator[dict], source: str, cache_dir: str | os.PathLike | None, key: str) -> Dataset:
    """The examples of these rows, kept under `key`, a hash of their source; the rows are not read if they are there."""
    directory = os.path.join(os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE), "squad_files")
    path = os.path.join(directory, f"squad-{key[:32]}-{READER}.arrow")
    if not os.path.exists(path):
        gc.disable()  # else all that was read is searched for cycles, of which it has none, again and again
        try:
            table, found = _to_table(rows)
        finally:
            gc.enable()
        features = Features({name: STORED_FEATURES[name] for name in table.column_names})
        write_arrow(path, features, [table], json.dumps(found))
    examples = Dataset.from_file(path)
    for name, odd in notes(examples).items():
        logger.warning("%s: %s", source, counted(odd, len(examples), NOTES[name]))
    return examples


def notes(examples: Dataset) -> dict[str, dict]:
    """Those of NOTES that hold for the file of these examples, each as `first_of`."""
    return json.loads(columns.read_notes(examples.cache_files[0]["filename"]))


def first_of(ids: list[str]) -> dict:
    return {"count": len(ids), "first_ids": ids[:IDS_SHOWN]}


def counted(some: dict, total: int, what: str) -> str:
    """A line on some of the questions: `first_of` them, or `moved` of qa.train_questions."""
    distance = f", at most {some['farthest']} characters away" if some.get("farthest") else ""
    zero = f" (the answer_start of {some['start_is_0']} is 0)" if some.get("start_is_0") else ""
    return f"{some['count']} of {total} {what}{distance}{zero}; first ids: {', '.join(some['first_ids'])}"


def _to_table(rows: Iterable[dict]) -> tuple[pa.Table, dict[str, dict]]:
    """The rows in Arrow, their contexts dictionary-encoded, without "answers" where no row has any; and their notes."""
    values: dict[str, list] = {name: [] for name in STORED_FEATURES}
    contexts: dict[str, int] = {}  # each distinct one, and its number
    ids: dict[str, int] = {}  # each one, and its row's number
    given: dict[tuple, int] = {}  # of ids that are there again: the id, context and question, and their row's number
    odd: dict[str, dict[str, None]] = {name: {} for name in NOTES}  # the ids, each once
    impossible, unanswered = 0, ""
    for row in rows:
        id_, place, number = row["id"], row["place"], len(ids)
        row["context"] = contexts.setdefault(row["context"], len(contexts))
        if id_ in ids:
            first = ids[id_]
            given.setdefault((id_, values["context"][first], values["question"][first]), first)
            number = given.setdefault((id_, row["context"], row["question"]), number)
        if again := number < len(ids):
            row["id"] = values["id"][number]
            odd["repeated"][row["id"]] = None
        elif not id_ or id_ in ids:
            if place in ids:
                raise QAError(f"{place}: needs its place for an id, but another question has it: give it an id")
            row["id"] = place
            odd["id_of_another" if id_ else "without_id"][place] = None
        if not row["question"].strip():
            odd["empty"][row["id"]] = None
        if row["is_impossible"]:
            impossible += 1
            if row["answers"]["text"]:
                odd["impossible_with_answer"][row["id"]] = None
                row["answers"] = {"text": [], "answer_start": []}
        if row["answers"] is None and not again:
            unanswered = unanswered or place
        if not again:
            ids[row["id"]] = number
            for name, column in values.items():
                column.append(row[name])
        elif row["answers"] is not None:
            known = values["answers"][number] = values["answers"][number] or row["answers"]
            for answer in zip(*row["answers"].values(), strict=True):
                if answer not in zip(*known.values(), strict=True):
                    for part, value in zip(known.values(), answer, strict=True):
                        part.append(value)
    if not ids:
        raise QAError("holds no question")
    wrong = list(odd["impossible_with_answer"])
    if 2 * len(wrong) > impossible:
        raise QAError(
            f"{len(wrong)} of the {impossible} questions that are marked is_impossible have an answer (first ids: "
            f"{', '.join(wrong[:IDS_SHOWN])}): take out these answers, or the mark, if it means something else"
        )
    if unanswered and any(values.pop("answers")):
        raise QAError(f'{unanswered}: missing key "answers", which other questions of the file have')
    distinct = pa.array(contexts, pa.large_string())
    values["context"] = pa.DictionaryArray.from_arrays(pa.array(values["context"], pa.int32()), distinct)
    schema = STORED_FEATURES.arrow_schema
    table = pa.table({name: pa.array(column, schema.field(name).type) for name, column in values.items()})
    return table, {name: first_of(list(ids)) for name, ids in odd.items() if ids}
