"""Questions in: from the hub or from files in any SQuAD layout, as `datasets.Dataset` of STORED_FEATURES.

The layouts are those of `qa.layouts`.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from itertools import chain

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.table import table_cast

from qa import hub
from qa.columns import ROWS_PER_RECORD_BATCH, DistinctText, write_arrow
from qa.files import QAError
from qa.layouts import KEYS, PLACE, Row, shown, squad_rows, table_rows

logger = logging.getLogger(__name__)

READER_VERSION = 2  # part of every cache file's name: raise it when the same file is read as something else
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


def load_examples(
    dataset_name: str | None,
    dataset_config_name: str | None,
    files: dict[str, str | None],
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Dataset]:
    """Examples of each split ("train", "validation", "test") from the hub, from files, or from both.

    `files` maps a split to a path; a file takes the place of the hub dataset's split of that name. Every split has the
    columns of `STORED_FEATURES`, "answers" only where the source has gold answers.

    Raises ValueError: the dataset is not found or has other columns, a file is not SQuAD, a split holds no question.
    """
    splits = _load_hub_dataset(dataset_name, dataset_config_name, cache_dir, token) if dataset_name else {}
    for split, path in files.items():
        if path is not None:
            splits[split] = read_squad_file(path, cache_dir)
    return splits


def _load_hub_dataset(name: str, config_name: str | None, cache_dir: str | None, token) -> dict[str, Dataset]:
    what = f"--dataset_name {name}: cannot be loaded from the hub or its cache"
    with hub.loading(what, name, "dataset", token=token, cache_dir=cache_dir) as id_:
        dataset_splits = datasets.load_dataset(id_, config_name, cache_dir=cache_dir, token=token)
    return {
        split: _conform_hub_split(dataset, f"{name} ({split})")
        for split, dataset in dataset_splits.items()
        if split in ("train", "validation", "test")
    }


def _conform_hub_split(dataset: Dataset, source: str) -> Dataset:
    """The columns of STORED_FEATURES, in their types; "title" may be missing, and "answers" where there are none.

    The dataset's columns may be those of any layout. The result is kept beside the dataset's own file.
    """
    files = [file["filename"] for file in dataset.cache_files]
    directory = os.path.dirname(files[0]) if files else datasets.config.HF_DATASETS_CACHE
    # A builder's fingerprint says where its files are, not what is in them.
    key = repr((dataset._fingerprint, [(file, os.stat(file).st_mtime_ns) for file in files]))
    name = f"squad-{hashlib.sha256(key.encode()).hexdigest()[:32]}-v{READER_VERSION}.arrow"
    path = os.path.join(directory, name)
    if not os.path.exists(path):
        table = _conform_hub_table(dataset, source)
        write_arrow(path, _stored_features(table), [table])
    return _with_ids_noted(Dataset.from_file(path), source)


def _conform_hub_table(dataset: Dataset, source: str) -> pa.Table:
    if "paragraphs" in dataset.column_names or "qas" in dataset.column_names:
        return _read_hub_rows(dataset, source)
    for column in ("context", "question"):
        if column not in dataset.column_names:
            raise QAError(f'{source}: no column "{column}"; found {", ".join(dataset.column_names)}')
    if len(dataset) == 0:
        raise QAError(f"{source}: holds no question")
    if "id" not in dataset.column_names or "is_impossible" in dataset.column_names:
        return _read_hub_rows(dataset, source)
    original = dataset
    if "title" not in dataset.column_names:
        dataset = dataset.add_column("title", pa.array([""] * len(dataset)))
    features = Features({name: kind for name, kind in EXAMPLE_FEATURES.items() if name in dataset.column_names})
    table = dataset.select_columns(list(features)).with_format("arrow")[:]
    texts = features.copy()
    texts["context"] = Value("large_string")  # of which a column holds more than 2 GB
    try:
        table = table_cast(table, texts.arrow_schema)
    except (pa.ArrowInvalid, TypeError, ValueError):
        return _read_hub_rows(original, source)
    if "answers" in features and pc.list_flatten(pc.struct_field(table["answers"], "answer_start")).null_count:
        return _read_hub_rows(original, source)
    _check_hub_rows(table, source)
    place = table.column_names.index("context")
    return table.set_column(place, "context", table["context"].dictionary_encode())


def _read_hub_rows(dataset: Dataset, source: str) -> pa.Table:
    """The table of a dataset whose columns are those of another layout."""
    columns = [name for name in dataset.column_names if name in KEYS]
    batches = dataset.select_columns(columns).with_format("arrow").iter(ROWS_PER_RECORD_BATCH)
    what = f"{source}: its columns are not those of SQuAD"
    return _parse_squad(table_rows(batches, what), what)


def _stored_features(table: pa.Table) -> Features:
    return Features({name: STORED_FEATURES[name] for name in table.column_names})


def _check_hub_rows(table: pa.Table, source: str) -> None:
    for column in table.column_names:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise QAError(f'{source}: row {row} has no value in column "{column}"')
    if pc.count_distinct(table["id"]).as_py() < len(table):
        counts = pc.value_counts(table["id"])
        duplicate = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise QAError(f"{source}: id {duplicate!r} stands more than once")
    if "answers" in table.column_names:
        texts, starts = (pc.struct_field(table["answers"], name) for name in ("text", "answer_start"))
        uneven = pc.not_equal(pc.list_value_length(texts), pc.list_value_length(starts))
        row = pc.index(pc.fill_null(uneven, True), True).as_py()
        if row >= 0:
            raise QAError(f"{source}: row {row} has not as many answer_starts as answer texts")
        for name, values in (("text", texts), ("answer_start", starts)):
            if pc.list_flatten(values).null_count:
                raise QAError(f'{source}: column "answers" has an answer without "{name}"')


def read_squad_file(path: str, cache_dir: str | None = None) -> Dataset:
    """Examples of one file: columns id, title, context, question and, where the file has gold answers, answers.

    The file may be all that `qa.layouts.squad_rows` reads; there are the sizes, too, at which it stops. An answer
    without an `answer_start` has NO_START there. The result is kept in `cache_dir` (default: the datasets cache) under
    the sha256 of the file's bytes.

    Raises ValueError of one line that names the file and the place in it.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            name = f"squad-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}-v{READER_VERSION}.arrow"
            cache_path = os.path.join(os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE), "squad_files", name)
            table = None if os.path.exists(cache_path) else _parse_squad(squad_rows(file, path), path)
    except OSError as error:
        raise QAError(f"{path}: cannot be read: {error.strerror}") from error
    if table is not None:
        write_arrow(cache_path, _stored_features(table), [table])
    return _with_ids_noted(Dataset.from_file(cache_path), path)


def _with_ids_noted(examples: Dataset, source: str) -> Dataset:
    """The same examples, after a line that says how many of them have their place for an id."""
    made = made_ids(examples)
    if made:
        logger.info(
            "%s: %d of %d questions have no id: their place in it is taken for one, such as %s.",
            source,
            len(made),
            len(examples),
            made[0],
        )
    return examples


def made_ids(examples: Dataset) -> list[str]:
    """The ids that are places in a file: of questions that had none."""
    ids = examples.with_format("arrow", columns=["id"])[:]["id"]
    return ids.filter(pc.match_substring_regex(ids, f"^{PLACE}$")).to_pylist()


def _parse_squad(squad: Iterable[tuple[Row, str]], path: str) -> pa.Table:
    rows: dict[str, list] = {name: [] for name in ("id", "title", "context", "question", "answers")}
    places: dict[str, str] = {}
    contexts: dict[str, int] = {}  # each distinct one, and its number
    for (id_, title, context, question, answers), place in squad:
        if id_ in places:
            raise QAError(f"{path}: {place}: id {shown(id_)} is already the id of {places[id_]}")
        places[id_] = place
        row = id_, title, contexts.setdefault(context, len(contexts)), question, answers
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
    if not places:
        raise QAError(f"{path}: holds no question")
    answers = rows.pop("answers")
    columns = {name: pa.array(rows[name], pa.string()) for name in ("id", "title", "question")}
    columns["context"] = pa.DictionaryArray.from_arrays(
        pa.array(rows["context"], pa.int32()), pa.array(contexts, pa.large_string())
    )
    table = pa.table({name: columns[name] for name in rows})
    if all(answer is None for answer in answers):
        return table
    if any(answer is None for answer in answers):
        place = places[rows["id"][next(i for i, answer in enumerate(answers) if answer is None)]]
        raise QAError(f'{path}: {place}: missing key "answers", which other questions of the file have')
    offsets = np.cumsum([0] + [len(answer) for answer in answers], dtype=np.int32)
    texts, starts = zip(*chain.from_iterable(answers), strict=True) if offsets[-1] else ((), ())
    struct = pa.StructArray.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(texts, pa.string())),
            pa.ListArray.from_arrays(offsets, pa.array(starts, pa.int32())),
        ],
        names=["text", "answer_start"],
    )
    return table.append_column("answers", struct)
