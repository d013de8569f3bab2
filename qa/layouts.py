"""From a file's bytes to questions: JSON, JSON lines, Parquet, CSV and TSV, each also gzipped, in SQuAD's layouts.

A file holds records: articles `{"title", "paragraphs": [...]}`, paragraphs `{"context", "qas": [...]}` or flat rows
`{"context", "question", ...}`. JSON holds them in a list, in a list under "data", or one alone; JSON lines hold one a
line, after MRQA's header if there is one; Parquet and CSV one a row, where null is a missing key. The bytes say which
it is, not the file's name.

Errors are QAErrors that name the place in the file; `errors_of` puts the file's name before it.
"""

import ast
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
import pyarrow.csv
import pyarrow.parquet as pq

from qa.files import QAError, one_line

NO_START = -1  # of an answer that was given as a text alone
KEYS = ("paragraphs", "qas", "id", "title", "context", "question", "answers", "answer_start", "is_impossible")
# What others call them, the first before the later ones.
OTHER_NAMES = {
    **dict.fromkeys(("question_id", "query_id", "qid", "guid"), "id"),
    **dict.fromkeys(("context_text",), "context"),
    **dict.fromkeys(("question_text", "query_text"), "question"),
    **dict.fromkeys(("answer", "answer_text"), "answers"),
    **dict.fromkeys(("answer_begin_position", "char_spans"), "answer_start"),
}
COLUMNS = {*KEYS, *OTHER_NAMES, "detected_answers"}
LAYOUT_KEYS = (
    '"data" (a file of SQuAD), "paragraphs" (an article), "context" and "qas" (a paragraph) or "context" and "question"'
)
FORMATS = "read are JSON, JSON lines, CSV with the columns' names (context, question) and Parquet, in UTF-8, or gzipped"
DELIMITERS = {",": "CSV", ";": "CSV", "\t": "TSV"}
ROWS_PER_BATCH = 1000
CSV_BLOCK = 2**24  # bytes that are read at once, of which each row must be smaller
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
TRUTHS = dict.fromkeys(("true", "1", "1.0"), True) | dict.fromkeys(("false", "0", "0.0", "", "none"), False)


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
            return f"{format_}, {_kind(record, place.format(0))[0]}"
        raise QAError("holds no question")


def file_rows(file: BinaryIO) -> Iterator[dict]:
    """The questions of an open file, as `record_rows` gives them."""
    _, records, place = _open(file)
    yield from record_rows(records, place)


# ---- From bytes to records ----


def _open(file: BinaryIO) -> tuple[str, Iterator[Any], str]:
    """The format, the records, read as they are asked for, and what names a record, with {} for its number."""
    packed, file = file, gunzipped(file)
    gzipped = "" if file is packed else "gzipped "
    if _begins(file, b"PAR1"):
        # Of Parquet the end is read first.
        batches = _parquet_batches(io.BytesIO(file.read()) if gzipped else file)
        return f"{gzipped}Parquet", _table_records(batches, "Parquet"), "row {}"
    columns, delimiter = _csv_columns(file)
    if columns:
        records = _table_records(_csv_batches(file, columns, delimiter), DELIMITERS[delimiter])
        records = ({name: _cell(name, cell) for name, cell in record.items()} for record in records)
        return f"{gzipped}{DELIMITERS[delimiter]}", records, "row {}"
    value = _read_json(file)
    if isinstance(value, Iterator):
        return f"{gzipped}JSON lines", value, "row {}"
    if isinstance(value, dict) and "data" in value:
        return f"{gzipped}JSON", iter(_check(value["data"], list, "data")), "data[{}]"
    records = [value] if isinstance(value, dict) else _check(value, list, "the file")
    return f"{gzipped}JSON", iter(records), "row {}"


def gunzipped(file: BinaryIO) -> BinaryIO:
    """The file, or what it holds in gzip's format."""
    return gzip.GzipFile(fileobj=file) if _begins(file, b"\x1f\x8b") else file


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
    if isinstance(value, dict) and value.keys() == {"header"}:  # MRQA's first line
        return others
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


def _csv_columns(file: BinaryIO) -> tuple[list[str], str]:
    """The columns that the first line names, and what stands between them; none where it names no context."""
    line = file.readline(2000).decode("utf-8-sig", errors="replace")  # of the buffer, to which seek goes back
    file.seek(0)
    if line.lstrip().startswith(("{", "[")):  # JSON, of which a text may say ", context,"
        return [], ""
    for delimiter in DELIMITERS:
        columns = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(columns) > 1 and "context" in _with_our_names(dict.fromkeys(columns, "")):
            return columns, delimiter
    return [], ""


def _csv_batches(file: BinaryIO, columns: list[str], delimiter: str) -> Iterator[pa.RecordBatch]:
    known = known_columns(columns)
    yield from pa.csv.open_csv(
        file,
        pa.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, column_names=columns, skip_rows=1),
        pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pa.csv.ConvertOptions(include_columns=known, column_types=dict.fromkeys(known, pa.string())),
    )


def _cell(name: str, cell: str) -> Any:
    """A cell of CSV: of answers also JSON, or Python's and NumPy's literals, as Dataset.to_csv writes them."""
    if not cell.startswith(("[", "{")) or OTHER_NAMES.get(name, name) in ("id", "title", "context", "question"):
        return cell
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(cell)
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(_WithoutCalls().visit(ast.parse(cell, mode="eval")))
    return cell


class _WithoutCalls(ast.NodeTransformer):
    """What is called becomes its first argument: array(['a'], dtype=object) the list. Nothing is run."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return self.visit(node.args[0]) if node.args else node


def _parquet_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    parquet = pq.ParquetFile(file)
    yield from parquet.iter_batches(ROWS_PER_BATCH, columns=known_columns(parquet.schema_arrow.names))


def _table_records(batches: Iterator[pa.RecordBatch], format_: str) -> Iterator[dict]:
    try:
        for batch in batches:
            yield from batch.to_pylist()
    except QAError:
        raise
    # Damaged files; values that Python has none for, such as dates after the year 9999 or of unknown time zones.
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise QAError(f"{format_} that cannot be read: {one_line(error)[:200]}") from error


def known_columns(names: list[str]) -> list[str]:
    """Those of a table's columns that are read. Raises QAError where they are those of no layout."""
    _kind(dict.fromkeys(names, True), "its columns")
    return [name for name in names if name in COLUMNS]


# ---- From records to questions ----


def record_rows(records: Iterable[Any], place: str = "row {}") -> Iterator[dict]:
    """The questions of articles, paragraphs and flat rows; `place` names a record, with {} for its number.

    Each is {"id", "title", "context", "question", "answers", "is_impossible", "place"}. The id is "" where there is
    none. Answers are {"text": [str, ...], "answer_start": [int, ...]}, or None where the source says nothing of them; a
    missing start is NO_START.
    """
    for number, record in enumerate(records):
        record_place = place.format(number)
        kind, record = _kind(record, record_place)
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


def _kind(record: Any, place: str) -> tuple[str, dict]:
    """What a record is, and the record with our names."""
    record = _with_our_names(_check(record, dict, place))
    for key, kind in (("paragraphs", "articles"), ("qas", "paragraphs")):
        if record.get(key) is not None:
            return kind, record
    if "context" not in record:
        raise QAError(f"{place}: missing key {LAYOUT_KEYS}; found {shown(list(record))}")
    return "flat rows", record


def _with_our_names(item: dict) -> dict:
    if OTHER_NAMES.keys().isdisjoint(item):
        return item
    named = {ours: item[name] for name, ours in reversed(OTHER_NAMES.items()) if item.get(name) is not None}
    return named | {key: value for key, value in item.items() if key not in OTHER_NAMES and value is not None}


def _row(item: dict, title: str, context: str, place: str) -> dict:
    id_ = item.get("id")
    impossible = _is_impossible(item, place)
    return {
        "id": str(id_) if type(id_) is int else _get(item, "id", str, place, default=""),
        "title": title,
        "context": context,
        "question": _get(item, "question", str, place),
        "answers": _gold_answers(item, impossible, place),
        "is_impossible": impossible,
        "place": place,
    }


def _is_impossible(item: dict, place: str) -> bool:
    value = item.get("is_impossible")
    truth = value if isinstance(value, bool | list | dict) else TRUTHS.get(str(value).strip().lower())
    if not isinstance(truth, bool):
        raise QAError(f"{place}.is_impossible: must be true or false, is {shown(value)}")
    return truth


def _gold_answers(item: dict, impossible: bool, place: str) -> dict[str, list] | None:
    answers = item.get("answers")
    detected = item.get("detected_answers")  # of MRQA: those of the answers whose places are known
    if answers is None and detected is None and not impossible:
        return None
    read: dict[str, list] = {"text": [], "answer_start": []}
    if detected:
        _add_answers(read, detected, None, f"{place}.detected_answers")
    if answers:
        _add_answers(read, answers, item.get("answer_start"), f"{place}.answers")
    return read


def _add_answers(read: dict[str, list], value: Any, starts: Any, place: str) -> None:
    """Adds a text, unless it is empty or null, or those of an object or a list; `starts` stand beside them."""
    if isinstance(value, dict):
        value = _with_our_names(value)
        texts = value["answers"] if "answers" in value else _get(value, "text", object, place)
        _add_answers(read, texts, value.get("answer_start", starts), place)
    elif isinstance(value, list):
        if not isinstance(starts, list):
            starts = [None] * len(value) if starts is None else [starts]
        if len(value) != len(starts):
            raise QAError(f"{place}: {len(value)} texts but {len(starts)} answer_starts")
        for number, (one, start) in enumerate(zip(value, starts, strict=True)):
            _add_answers(read, one, start, f"{place}[{number}]")
    elif value is not None and _check(value, str, place):
        read["text"].append(value)
        read["answer_start"].append(_start(starts, f"{place}.answer_start"))


def _start(value: Any, place: str) -> int:
    while isinstance(value, list) and value or isinstance(value, dict) and "start" in value:
        value = value[0] if isinstance(value, list) else value["start"]  # of several, and of a span, the first
    if value is None or value == "":
        return NO_START
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,19}(\.0*)?\s*", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not -(2**31) <= _check(value, int, place) < 2**31:
        raise QAError(f"{place}: {shown(value)} is outside every text")
    return value


def _objects(item: dict, key: str, place: str) -> Iterator[tuple[dict, str]]:
    """The objects of the list under `key`, with our names, each with its place."""
    for number, value in enumerate(_get(item, key, list, place)):
        value_place = f"{place}.{key}[{number}]"
        yield _with_our_names(_check(value, dict, value_place)), value_place


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
    if kind is str and not value.isascii():
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
