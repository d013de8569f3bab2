"""From a file's bytes to questions: JSON, JSON lines and Parquet, each also gzipped, in any of SQuAD's layouts.

A file holds records: articles `{"title", "paragraphs": [...]}`, paragraphs `{"context", "qas": [...]}` or flat rows
`{"context", "question", ...}`. JSON holds them in a list, in a list under "data", or one alone; JSON lines hold one a
line, Parquet one a row, whose empty cells are missing keys. The bytes say which it is, not the file's name.

Errors are QAErrors that name the place in the file; `errors_of` puts the file's name before it.
"""

import contextlib
import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qa.files import QAError, one_line

NO_START = -1  # of an answer that was given as a text alone
# What names a place in a file, and so a question without an id of its own.
PLACE = r"(data\[\d+\]|row \d+)(\.paragraphs\[\d+\])?(\.qas\[\d+\])?"
KEYS = ("paragraphs", "qas", "id", "title", "context", "question", "answers", "is_impossible")
LAYOUT_KEYS = (
    '"data" (a file of SQuAD), "paragraphs" (an article), "context" and "qas" (a paragraph) or "context" and "question"'
)
FORMATS = "read are JSON and JSON lines in UTF-8, and Parquet, each also gzipped"
ROWS_PER_BATCH = 1000
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}


@contextlib.contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Around all that reads from `path`: errors of reading become QAErrors that begin with it."""
    try:
        yield
    except QAError as error:
        raise QAError(f"{path}: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise QAError(f"{path}: its gzip data breaks off or is damaged, fetch it again: {one_line(error)}") from error
    except OSError as error:
        raise QAError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error


def layout(file: BinaryIO, path: str) -> str:
    """What an open file is to `file_rows`, such as "gzipped JSON, articles". Raises QAError that names `path`."""
    with errors_of(path):
        format_, records, place = _open(file)
        for record in records:
            return f"{format_}, {_kind(record, place.format(0))}"
        raise QAError("holds no question")


def file_rows(file: BinaryIO) -> Iterator[dict]:
    """The questions of an open file, as `record_rows` gives them."""
    _, records, place = _open(file)
    yield from record_rows(records, place)


# ---- From bytes to records ----


def _open(file: BinaryIO) -> tuple[str, Iterator[Any], str]:
    """The format, the records, read as they are asked for, and what names a record, with {} for its number."""
    gzipped = ""
    if _begins(file, b"\x1f\x8b"):
        gzipped, file = "gzipped ", gzip.GzipFile(fileobj=file)
    if _begins(file, b"PAR1"):
        # Of Parquet the end is read first.
        return f"{gzipped}Parquet", _parquet_records(io.BytesIO(file.read()) if gzipped else file), "row {}"
    value = _read_json(file)
    if isinstance(value, Iterator):
        return f"{gzipped}JSON lines", value, "row {}"
    if isinstance(value, dict) and "data" in value:
        return f"{gzipped}JSON", iter(_check(value["data"], list, "data")), "data[{}]"
    records = [value] if isinstance(value, dict) else _check(value, list, "the file")
    return f"{gzipped}JSON", iter(records), "row {}"


def _begins(file: BinaryIO, magic: bytes) -> bool:
    file.seek(0)
    begins = file.read(len(magic)) == magic
    file.seek(0)
    return begins


def _read_json(file: BinaryIO) -> Any:
    """The values of JSON lines, where the first line is one and others follow; else the one value of the file."""
    # What is not UTF-8 becomes halves of surrogate pairs, which no string may have.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")
    lines = ((number, line) for number, line in enumerate(text, start=1) if not line.isspace())
    number, line = next(lines, (0, ""))
    if not line:
        raise QAError("is empty")
    try:
        value = _parse(line, number)
    except QAError:  # of a value on many lines, or of none
        text.seek(0)
        return _parse(text.read(), 1)
    others = (_parse(line, number) for number, line in lines)
    values = [value, *islice(others, 1)]
    return chain(values, others) if len(values) > 1 else value


def _parse(text: str, line: int) -> Any:
    """The JSON value of a text that begins in that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} column {error.colno}"
        raise QAError(f"{place}: not JSON: {error.msg}; {FORMATS}") from error
    except (RecursionError, ValueError) as error:  # of very deep values and very long numbers
        raise QAError(f"line {line}: JSON that cannot be read: {one_line(error)}") from error


def _parquet_records(file: BinaryIO) -> Iterator[dict]:
    try:
        parquet = pq.ParquetFile(file)
        columns = known_columns(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=columns):
            yield from batch.to_pylist()
    except QAError:
        raise
    # Damaged files; values that Python has none for, such as dates after the year 9999 or of unknown time zones.
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise QAError(f"Parquet that cannot be read: {one_line(error)[:200]}") from error


def known_columns(names: list[str]) -> list[str]:
    """Those of a table's columns that are read. Raises QAError where they are those of no layout."""
    _kind(dict.fromkeys(names, True), "its columns")
    return [name for name in names if name in KEYS]


# ---- From records to questions ----


def record_rows(records: Iterable[Any], place: str = "row {}") -> Iterator[dict]:
    """The questions of articles, paragraphs and flat rows; `place` names a record, with {} for its number.

    Each is {"id", "title", "context", "question", "answers", "place"}. The id is the place where there is none. Answers
    are {"text": [str, ...], "answer_start": [int, ...]}, or None where the source has none. It may have them in this
    form, as [{"text", "answer_start"}, ...] or as texts alone, and a start as a text or a whole float; a missing one is
    NO_START. `is_impossible` (SQuAD 2.0) means no answers.
    """
    for number, record in enumerate(records):
        record_place = place.format(number)
        kind = _kind(record, record_place)
        title = _get(record, "title", str, record_place, default="")
        if kind == "flat rows":
            yield _row(record, title, _get(record, "context", str, record_place), record_place)
            continue
        paragraphs = [(record, record_place)]
        if kind == "articles":
            paragraphs = _objects(record, "paragraphs", record_place)
        for paragraph, paragraph_place in paragraphs:
            context = _get(paragraph, "context", str, paragraph_place)
            for question, question_place in _objects(paragraph, "qas", paragraph_place):
                yield _row(question, title, context, question_place)


def _kind(record: Any, place: str) -> str:
    _check(record, dict, place)
    for key, kind in (("paragraphs", "articles"), ("qas", "paragraphs")):
        if record.get(key) is not None:
            return kind
    if "context" not in record:
        raise QAError(f"{place}: missing key {LAYOUT_KEYS}; found {shown(list(record))}")
    return "flat rows"


def _row(item: dict, title: str, context: str, place: str) -> dict:
    id_ = item.get("id")
    return {
        "id": str(id_) if type(id_) is int else _get(item, "id", str, place, default=place),
        "title": title,
        "context": context,
        "question": _get(item, "question", str, place),
        "answers": _answers(item, place),
        "place": place,
    }


def _answers(item: dict, place: str) -> dict[str, list] | None:
    if _get(item, "is_impossible", bool, place, default=False):
        return {"text": [], "answer_start": []}
    if item.get("answers") is None:
        return None
    answers, place = item["answers"], f"{place}.answers"
    if isinstance(answers, dict):
        texts = _get(answers, "text", list, place)
        starts = _get(answers, "answer_start", list, place, default=[None] * len(texts))
        if len(texts) != len(starts):
            raise QAError(f"{place}: {len(texts)} texts but {len(starts)} answer_starts")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    read: dict[str, list] = {"text": [], "answer_start": []}
    for number, answer in enumerate(_check(answers, list, place)):
        answer_place = f"{place}[{number}]"
        answer = {"text": answer} if isinstance(answer, str) else _check(answer, dict, answer_place)
        read["text"].append(_get(answer, "text", str, answer_place))
        read["answer_start"].append(_start(answer.get("answer_start"), f"{answer_place}.answer_start"))
    return read


def _start(value: Any, place: str) -> int:
    if value is None:
        return NO_START
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,19}(\.0*)?\s*", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not -(2**31) <= _check(value, int, place) < 2**31:
        raise QAError(f"{place}: {shown(value)} is outside every text")
    return value


def _objects(item: dict, key: str, place: str) -> Iterator[tuple[dict, str]]:
    """The objects of the list under `key`, each with its place."""
    for number, value in enumerate(_get(item, key, list, place)):
        value_place = f"{place}.{key}[{number}]"
        yield _check(value, dict, value_place), value_place


def _get(item: dict, key: str, kind: type, place: str, default: Any = None) -> Any:
    """The value under `key`, checked; `default`, if there is one, where it is missing or null."""
    value = item.get(key)
    if value is None and default is not None:
        return default
    if key not in item:
        raise QAError(f'{place}: missing key "{key}"; found {shown(list(item))}')
    return _check(value, kind, f"{place}.{key}")


def _check(value: Any, kind: type, place: str) -> Any:
    """The value, which must be of that kind and, as a string, text that can be written."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise QAError(f"{place}: must be {JSON_NAMES[kind]}, is {shown(value)}")
    if kind is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = "is not UTF-8, or is half of a surrogate pair"
            raise QAError(f"{place}: character {error.start} {what}") from error
    return value


def shown(value: Any) -> str:
    """The beginning of a value for a message, however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
