"""Questions in: from the hub or from files in any of SQuAD's layouts, as `datasets.Dataset` of STORED_FEATURES."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from qa import columns, hub, layouts
from qa.columns import DistinctText, write_arrow
from qa.files import QAError
from qa.layouts import PLACE, errors_of, file_rows, known_columns, record_rows, shown

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
            if os.path.exists(os.path.join(id_, datasets.config.DATASET_STATE_JSON_FILENAME)):
                saved = datasets.load_from_disk(id_)
                found = {re.match(r"\w+", str(saved.split or "train"))[0]: saved}  # which may be "train[:100]"
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
    """Examples of one file: columns id, title, context, question and, where the file has gold answers, answers.

    The file may have any layout that `qa.layouts` reads. An answer without an `answer_start` has NO_START there. The
    result is kept in `cache_dir` (default: the datasets cache) under the sha256 of the file's bytes.

    Raises QAError that names the file and the place in it.
    """
    path = os.fspath(path)
    with errors_of(path), open(path, "rb") as file:
        return _read_once(file_rows(file), path, cache_dir, hashlib.file_digest(file, "sha256").hexdigest())


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
        table = _to_table(rows)
        write_arrow(path, Features({name: STORED_FEATURES[name] for name in table.column_names}), [table])
    examples = Dataset.from_file(path)
    if made := made_ids(examples):
        what = "questions have no id: their place in it is taken for one, such as"
        logger.info("%s: %d of %d %s %s.", source, len(made), len(examples), what, made[0])
    return examples


def made_ids(examples: Dataset) -> list[str]:
    """The ids that are places in a file: of questions that had none."""
    ids = examples.with_format("arrow", columns=["id"])[:]["id"]
    return ids.filter(pc.match_substring_regex(ids, f"^{PLACE}$")).to_pylist()


def _to_table(rows: Iterable[dict]) -> pa.Table:
    """The rows in Arrow, their contexts dictionary-encoded; without "answers" where no row has any."""
    values: dict[str, list] = {name: [] for name in STORED_FEATURES}
    places: dict[str, str] = {}  # of each id
    contexts: dict[str, int] = {}  # each distinct one, and its number
    for row in rows:
        id_, place = row["id"], row["place"]
        if id_ in places:
            raise QAError(f"{place}: id {shown(id_)} is already the id of {places[id_]}")
        places[id_] = place
        row["context"] = contexts.setdefault(row["context"], len(contexts))
        for name, column in values.items():
            column.append(row[name])
    if not places:
        raise QAError("holds no question")
    if None in values["answers"]:
        place = list(places.values())[values["answers"].index(None)]
        if any(values.pop("answers")):
            raise QAError(f'{place}: missing key "answers", which other questions of the file have')
    numbers, distinct = pa.array(values["context"], pa.int32()), pa.array(contexts, pa.large_string())
    values["context"] = pa.DictionaryArray.from_arrays(numbers, distinct)
    schema = STORED_FEATURES.arrow_schema
    return pa.table({name: pa.array(column, schema.field(name).type) for name, column in values.items()})
