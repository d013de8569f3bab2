"""Questions in: from the hub or from files in any SQuAD layout, as `datasets.Dataset` of STORED_FEATURES."""

import contextlib
import hashlib
import json
import logging
import os
import reprlib
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.features import features as registry
from datasets.table import table_cast

from qa import hub
from utils_qa import distinct_texts, one_line

logger = logging.getLogger(__name__)

READER_VERSION = 2  # part of every cache file's name: raise it when the same file is read as something else
ROWS_PER_RECORD_BATCH = 1000  # as datasets writes them

EXAMPLE_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)


@dataclass
class DistinctText:
    """A column of strings that holds each distinct one once, of any total size: Arrow's dictionary encoding.

    datasets has no feature type for it, and would write out the strings row by row.
    """

    dtype: ClassVar[str] = "large_string"
    pa_type: ClassVar[pa.DataType] = pa.dictionary(pa.int32(), pa.large_string())
    _type: str = field(default="DistinctText", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        if storage.type == self.pa_type:
            return storage
        return storage.cast(self.pa_type.value_type).dictionary_encode()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # datasets calls all feature types of others experimental
    registry.register_feature(DistinctText, DistinctText.__name__)

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

    The result is kept beside the dataset's own file.
    """
    files = dataset.cache_files
    directory = os.path.dirname(files[0]["filename"]) if files else datasets.config.HF_DATASETS_CACHE
    path = os.path.join(directory, f"squad-{dataset._fingerprint}-v{READER_VERSION}.arrow")
    if not os.path.exists(path):
        table = _conform_hub_table(dataset, source)
        write_arrow(path, _stored_features(table), [table])
    return Dataset.from_file(path)


def _conform_hub_table(dataset: Dataset, source: str) -> pa.Table:
    for column in ("id", "context", "question"):
        if column not in dataset.column_names:
            raise ValueError(f'{source}: no column "{column}"; found {", ".join(dataset.column_names)}')
    if len(dataset) == 0:
        raise ValueError(f"{source}: holds no question")
    if "title" not in dataset.column_names:
        dataset = dataset.add_column("title", pa.array([""] * len(dataset)))
    features = Features({name: kind for name, kind in EXAMPLE_FEATURES.items() if name in dataset.column_names})
    table = dataset.select_columns(list(features)).with_format("arrow")[:]
    texts = features.copy()
    texts["context"] = Value("large_string")  # of which a column holds more than 2 GB
    try:
        table = table_cast(table, texts.arrow_schema)
    except (pa.ArrowInvalid, TypeError, ValueError) as error:
        raise ValueError(f"{source}: its columns are not those of SQuAD: {' '.join(str(error).split())}") from error
    _check_hub_rows(table, source)
    place = table.column_names.index("context")
    return table.set_column(place, "context", table["context"].dictionary_encode())


def _stored_features(table: pa.Table) -> Features:
    return Features({name: STORED_FEATURES[name] for name in table.column_names})


def _check_hub_rows(table: pa.Table, source: str) -> None:
    for column in table.column_names:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise ValueError(f'{source}: row {row} has no value in column "{column}"')
    if pc.count_distinct(table["id"]).as_py() < len(table):
        counts = pc.value_counts(table["id"])
        duplicate = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(f"{source}: id {duplicate!r} stands more than once")
    if "answers" in table.column_names:
        texts, starts = (pc.struct_field(table["answers"], name) for name in ("text", "answer_start"))
        uneven = pc.not_equal(pc.list_value_length(texts), pc.list_value_length(starts))
        row = pc.index(pc.fill_null(uneven, True), True).as_py()
        if row >= 0:
            raise ValueError(f"{source}: row {row} has not as many answer_starts as answer texts")
        for name, values in (("text", texts), ("answer_start", starts)):
            if pc.list_flatten(values).null_count:
                raise ValueError(f'{source}: column "answers" has an answer without "{name}"')


def read_squad_file(path: str, cache_dir: str | None = None) -> Dataset:
    """Examples of one file: columns id, title, context, question and, where the file has gold answers, answers.

    Layouts: SQuAD's own (`{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}`), flat rows (`{"data":
    [{"id", "context", "question", "answers"}]}`), a list of flat rows, and JSON lines of flat rows. `is_impossible`
    (SQuAD 2.0) gives empty answers. The result is kept in `cache_dir` (default: the datasets cache) under the sha256 of
    the file's bytes.

    Raises ValueError of one line that names the file and the place in it.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            name = f"squad-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}-v{READER_VERSION}.arrow"
            cache_path = os.path.join(os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE), "squad_files", name)
            table = None if os.path.exists(cache_path) else _parse_squad(file, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if table is not None:
        write_arrow(cache_path, _stored_features(table), [table])
    return Dataset.from_file(cache_path)


def _parse_squad(file: BinaryIO, path: str) -> pa.Table:
    rows: dict[str, list] = {name: [] for name in ("id", "title", "context", "question", "answers")}
    places: dict[str, str] = {}
    contexts: dict[str, int] = {}  # each distinct one, and its number
    for (id_, title, context, question, answers), place in _squad_rows(_parse_json(file, path), path):
        if id_ in places:
            raise ValueError(f"{path}: {place}: id {_shown(id_)} is already the id of {places[id_]}")
        places[id_] = place
        row = id_, title, contexts.setdefault(context, len(contexts)), question, answers
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
    if not places:
        raise ValueError(f"{path}: holds no question")
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
        raise ValueError(f'{path}: {place}: missing key "answers", which other questions of the file have')
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


def _parse_json(file: BinaryIO, path: str) -> Any:
    """The file's JSON value, or an iterator over the values of its lines, which reads one at a time."""
    file.seek(0)
    lines = _lines(file, path)
    _, first = next(lines, (0, None))
    if first is None:
        raise ValueError(f"{path}: is empty")
    try:
        value = json.loads(first, object_hook=_ShareContexts())
    except (RecursionError, ValueError):  # of a value of many lines, or of none; the whole file tells
        pass
    else:
        return value if next(lines, None) is None else _parse_json_lines(file, path)
    del first
    file.seek(0)
    try:
        return json.loads(_decode(file.read(), 0, path), object_hook=_ShareContexts())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: JSON that cannot be read: {one_line(error)}") from error
    except ValueError as error:
        if str(error).startswith(path):
            raise
        raise ValueError(f"{path}: JSON that cannot be read: {one_line(error)}") from error


class _ShareContexts:
    """Makes equal contexts of objects that `json` reads one string, as soon as each is read."""

    def __init__(self):
        self.contexts: dict[str, str] = {}

    def __call__(self, item: dict) -> dict:
        context = item.get("context")
        if isinstance(context, str):
            item["context"] = self.contexts.setdefault(context, context)
        return item


def _parse_json_lines(file: BinaryIO, path: str) -> Iterator[Any]:
    file.seek(0)
    for number, line in _lines(file, path):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} column {error.colno}: not JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: line {number}: JSON that cannot be read: {one_line(error)}") from error


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """The lines from here on that are not blank, and their numbers."""
    start = file.tell()
    for number, line in enumerate(file, start=1):
        text = _decode(line, start, path)
        start += len(line)
        if text and not text.isspace():
            yield number, text


def _decode(content: bytes, start: int, path: str) -> str:
    try:
        return content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {start + error.start}: not UTF-8 text") from error


def _squad_rows(root: Any, path: str) -> Iterator[tuple[tuple, str]]:
    """Yields ((id, title, context, question, answers), place): answers is a list of (text, start), or None."""
    if isinstance(root, dict):
        if "data" in root:
            items, name = _typed(root["data"], list, "data", path), "data[{}]"
        elif "context" in root:
            items, name = [root], "row {}"
        else:
            raise ValueError(f'{path}: missing key "data": neither the layout of SQuAD nor flat rows')
    else:
        items, name = root if isinstance(root, Iterator) else _typed(root, list, "the file", path), "row {}"
    for i, item in enumerate(items):
        place = name.format(i)
        _typed(item, dict, place, path)
        title = "" if item.get("title") is None else _string(item, "title", place, path)
        if "paragraphs" in item:
            for j, paragraph in enumerate(_typed(item["paragraphs"], list, f"{place}.paragraphs", path)):
                yield from _paragraph_rows(paragraph, title, f"{place}.paragraphs[{j}]", path)
        elif "context" in item:
            context = _string(item, "context", place, path)
            yield _question_row(item, title, context, place, path), place
        else:
            raise ValueError(f'{path}: {place}: missing key "paragraphs" (layout of SQuAD) or "context" (flat rows)')


def _paragraph_rows(paragraph: Any, title: str, place: str, path: str) -> Iterator[tuple[tuple, str]]:
    _typed(paragraph, dict, place, path)
    context = _string(paragraph, "context", place, path)
    for k, question in enumerate(_typed(_required(paragraph, "qas", place, path), list, f"{place}.qas", path)):
        question_place = f"{place}.qas[{k}]"
        _typed(question, dict, question_place, path)
        yield _question_row(question, title, context, question_place, path), question_place


def _question_row(item: dict, title: str, context: str, place: str, path: str) -> tuple:
    id_ = _required(item, "id", place, path)
    id_ = str(id_) if type(id_) is int else _string(item, "id", place, path)
    question = _string(item, "question", place, path)
    if item.get("is_impossible") is not None and _typed(item["is_impossible"], bool, f"{place}.is_impossible", path):
        answers = []
    elif item.get("answers") is None:
        answers = None
    else:
        answers = _answers(item["answers"], f"{place}.answers", path)
    return id_, title, context, question, answers


def _answers(value: Any, place: str, path: str) -> list[tuple[str, int]]:
    """Either {"text": [...], "answer_start": [...]} or [{"text", "answer_start"}, ...]."""
    if isinstance(value, dict):
        texts = _typed(_required(value, "text", place, path), list, f"{place}.text", path)
        starts = _typed(_required(value, "answer_start", place, path), list, f"{place}.answer_start", path)
        if len(texts) != len(starts):
            raise ValueError(f"{path}: {place}: {len(texts)} texts but {len(starts)} answer_starts")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    answers = []
    for i, answer in enumerate(_typed(value, list, place, path)):
        answer_place = f"{place}[{i}]"
        _typed(answer, dict, answer_place, path)
        text = _string(answer, "text", answer_place, path)
        start = _typed(_required(answer, "answer_start", answer_place, path), int, f"{answer_place}.answer_start", path)
        if not -(2**31) <= start < 2**31:
            raise ValueError(f"{path}: {answer_place}.answer_start: {_shown(start)} is outside every text")
        answers.append((text, start))
    return answers


def _shown(value: Any) -> str:
    """The beginning of a value for a message, however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}


def _required(item: dict, key: str, place: str, path: str) -> Any:
    if key not in item:
        raise ValueError(f'{path}: {place}: missing key "{key}"')
    return item[key]


def _typed(value: Any, kind: type, place: str, path: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path}: {place}: must be {JSON_NAMES[kind]}, is {_shown(value)}")
    return value


def _string(item: dict, key: str, place: str, path: str) -> str:
    value = _typed(_required(item, key, place, path), str, f"{place}.{key}", path)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: {place}.{key}: character {error.start} is half of a surrogate pair") from error
    return value


def drop_misplaced_answers(examples: Dataset, source: str) -> Dataset:
    """Training examples without those whose (first) answer is empty or does not stand at its answer_start.

    Logs their count and first ids. Raises ValueError when `examples` has no answers or none remain.
    """
    if "answers" not in examples.column_names:
        raise ValueError(f'{source}: missing key "answers": without gold answers it cannot be trained on')
    contexts = distinct_texts(examples, "context")
    table = examples.select_columns(["id", "answers"]).with_format("arrow")[:]
    answers = table["answers"].combine_chunks()
    texts, starts = answers.field("text"), answers.field("answer_start")
    answered = np.flatnonzero(pc.list_value_length(texts).to_numpy() > 0)
    first_texts = texts.values.take(pa.array(texts.offsets.to_numpy()[answered])).to_pylist()
    first_starts = starts.values.to_numpy()[starts.offsets.to_numpy()[answered]].tolist()
    misplaced = np.zeros(len(examples), bool)
    row, context = -1, ""
    for i in np.argsort(contexts.row[answered], kind="stable").tolist():  # each context is made a string once
        if row != contexts.row[answered[i]]:
            row = int(contexts.row[answered[i]])
            context = contexts.distinct[row].as_py()
        text, start = first_texts[i], first_starts[i]
        misplaced[answered[i]] = not text or start < 0 or not context.startswith(text, start)
    misplaced_ids = table["id"].filter(pa.array(misplaced)).to_pylist()
    if not misplaced_ids:
        return examples
    logger.warning(
        f"{source}: {len(misplaced_ids)} of {len(examples)} questions are left out of training, because the answer's "
        f"text does not stand at its answer_start; first ids: {', '.join(misplaced_ids[:5])}"
    )
    if len(misplaced_ids) == len(examples):
        raise ValueError(f"{source}: no question's answer stands at its answer_start; nothing to train on")
    return examples.select(np.flatnonzero(~misplaced))


def write_arrow(path: str, features: Features, tables: Iterable[pa.Table], notes: dict[str, str] | None = None) -> None:
    """Writes an Arrow file that `Dataset.from_file` reads, beside its place, and renames it.

    `notes` stand in the metadata of its schema, where `arrow_notes` finds them.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{uuid.uuid4().hex[:8]}.writing"
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, **(notes or {})})
    try:
        with pa.OSFile(beside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), max_chunksize=ROWS_PER_RECORD_BATCH)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise


def arrow_notes(path: str) -> dict[str, str]:
    """The notes of a file that `write_arrow` has written."""
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        return {key.decode(): value.decode() for key, value in reader.schema.metadata.items()}
