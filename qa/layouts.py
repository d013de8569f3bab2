"""From a file's bytes, or a table's rows, to questions: JSON, JSON lines and Parquet, in any of SQuAD's layouts."""

import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from qa.files import QAError, one_line

NO_START = -1  # of an answer that was given as a text alone
# What names a place in a file, and so a question without an id of its own.
PLACE = r"(data\[\d+\]|row \d+)(\.paragraphs\[\d+\])?(\.qas\[\d+\])?"
KEYS = ("paragraphs", "qas", "id", "title", "context", "question", "answers", "is_impossible")
LAYOUT_KEYS = (
    '"paragraphs" (an article of SQuAD), "context" and "qas" (a paragraph) or "context" and "question" (a flat row)'
)
FORMATS = "read are JSON, JSON lines and Parquet, each also gzipped"

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # how such files begin
MOST_DECOMPRESSED = 2**33  # bytes that a file may hold when it is decompressed
MOST_COMPRESSION = 250  # times its own size; of questions 3 to 60 is usual, and gzip reaches 1032
ALWAYS_DECOMPRESSED = 2**26  # bytes that no file is refused for, however small it is
ROWS_PER_BATCH = 1000

# Id, title, context, question, and the answers as (text, start), which are None where the source has none.
Row = tuple[str, str, str, str, list[tuple[str, int]] | None]


class Source(NamedTuple):
    """What a file holds, before anything of it is checked."""

    format: str
    items: Iterator[Any]  # articles, paragraphs or flat rows
    place: str  # of an item, with {} for its number


def squad_rows(file: BinaryIO, path: str) -> Iterator[tuple[Row, str]]:
    """The questions of an open file that `path` names, each with its place in it; reads as they are asked for.

    JSON, JSON lines (one item a line) or Parquet (one item a row), gzipped or not, as the bytes say, not the name. An
    item is an article `{"title", "paragraphs": [...]}`, a paragraph `{"context", "qas": [...]}` or a flat row
    `{"context", "question", ...}`; JSON holds them in a list, in a list under "data", or one alone. Answers are
    `[{"text", "answer_start"}]`, `{"text": [], "answer_start": []}` or texts alone; `answer_start` may be a text or a
    whole float, and is NO_START where it is missing. `is_impossible` (SQuAD 2.0) gives no answers. A question without
    an id gets its place for one. Parquet's empty cells are missing keys.

    Raises ValueError of one line with `path` and the place; so too where more than MOST_DECOMPRESSED bytes, or (beyond
    ALWAYS_DECOMPRESSED) MOST_COMPRESSION times the file's size, would come out of a file.
    """
    source = _open(file, path)
    return _rows(source.items, source.place, path)


def table_rows(batches: Iterable[pa.Table], path: str) -> Iterator[tuple[Row, str]]:
    """As `squad_rows`, of a table whose rows are articles, paragraphs or flat rows."""
    return _rows(chain.from_iterable(batch.to_pylist() for batch in batches), "row {}", path)


def layout(file: BinaryIO, path: str) -> str:
    """What a file is to `squad_rows`, such as "gzipped JSON, articles". Raises ValueError as it does."""
    source = _open(file, path)
    for number, item in enumerate(source.items):
        return f"{source.format}, {_kind(item, source.place.format(number), path)}"
    raise QAError(f"{path}: holds no question")


# ---- From bytes to items ----


def _open(file: BinaryIO, path: str) -> Source:
    gzipped = ""
    if _begins(file, GZIP):
        gzipped, file = "gzipped ", io.BufferedReader(_Gunzipped(file, path))
    if _begins(file, PARQUET):
        # Of Parquet the end is read first.
        return Source(f"{gzipped}Parquet", _parquet_items(io.BytesIO(file.read()) if gzipped else file, path), "row {}")
    root = _parse_json(file, path)
    if isinstance(root, Iterator):
        return Source(f"{gzipped}JSON lines", root, "row {}")
    if isinstance(root, dict) and "data" in root:
        return Source(f"{gzipped}JSON", iter(_typed(root["data"], list, "data", path)), "data[{}]")
    if isinstance(root, dict):
        if _kind_of(root) is None:
            raise QAError(f'{path}: missing key "data" (SQuAD), {LAYOUT_KEYS}; found {shown(list(root))}')
        root = [root]
    return Source(f"{gzipped}JSON", iter(_typed(root, list, "the file", path)), "row {}")


def _begins(file: BinaryIO, magic: bytes) -> bool:
    file.seek(0)
    begins = file.read(len(magic)) == magic
    file.seek(0)
    return begins


class _Gunzipped(io.RawIOBase):
    """What a gzipped file holds, up to the size where reading stops. Raises ValueError of one line."""

    def __init__(self, file: BinaryIO, path: str):
        self.path, self.size = path, file.seek(0, io.SEEK_END)
        self.limit = min(MOST_DECOMPRESSED, max(ALWAYS_DECOMPRESSED, MOST_COMPRESSION * self.size))
        file.seek(0)
        self.file = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer) -> int:
        try:
            part = self.file.read(len(buffer))
        except EOFError as error:
            raise QAError(f"{self.path}: its gzip data breaks off after {self.size} bytes: fetch it again") from error
        except (OSError, zlib.error) as error:
            raise QAError(f"{self.path}: damaged gzip: {one_line(error)}") from error
        if self.tell() > self.limit:
            raise QAError(
                f"{self.path}: {self.size} bytes of gzip hold more than {self.limit}, which is where reading stops (at "
                f"{MOST_COMPRESSION} times the size, at {MOST_DECOMPRESSED} bytes at most): decompress it yourself if "
                "that is meant"
            )
        buffer[: len(part)] = part
        return len(part)


def _parse_json(file: BinaryIO, path: str) -> Any:
    """The file's JSON value, or an iterator over the values of its lines, which reads one at a time."""
    file.seek(0)
    lines = _lines(file, path)
    _, first = next(lines, (0, None))
    if first is None:
        raise QAError(f"{path}: is empty")
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
        raise QAError(f"{path}: line {error.lineno} column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise QAError(f"{path}: JSON that cannot be read: {one_line(error)}") from error
    except ValueError as error:
        if str(error).startswith(path):
            raise
        raise QAError(f"{path}: JSON that cannot be read: {one_line(error)}") from error


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
            raise QAError(f"{path}: line {number} column {error.colno}: not JSON: {error.msg}") from error
        except (RecursionError, ValueError) as error:
            raise QAError(f"{path}: line {number}: JSON that cannot be read: {one_line(error)}") from error


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
        raise QAError(f"{path}: byte {start + error.start}: not UTF-8 text; {FORMATS}") from error


def _parquet_items(file: BinaryIO, path: str) -> Iterator[dict]:
    size = 0
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if _kind_of(dict.fromkeys(names, True)) is None:
            raise _NoLayout(f"{path}: no column {LAYOUT_KEYS}; found {shown(names)}")
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=[name for name in names if name in KEYS]):
            size += batch.nbytes
            if size > MOST_DECOMPRESSED:
                raise _NoLayout(f"{path}: Parquet of more than {MOST_DECOMPRESSED} bytes, which is where reading stops")
            yield from batch.to_pylist()
    except _NoLayout as error:
        raise QAError(str(error)) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
        raise QAError(f"{path}: Parquet that cannot be read: {one_line(error)[:200]}") from error


class _NoLayout(Exception):
    """Told apart from what pyarrow raises."""


# ---- From items to questions ----


def _kind_of(item: dict) -> str | None:
    """What the item is by its keys, of which Parquet's empty cells are none."""
    for key, kind in (("paragraphs", "articles"), ("qas", "paragraphs")):
        if item.get(key) is not None:
            return kind
    return "flat rows" if "context" in item else None


def _kind(item: Any, place: str, path: str) -> str:
    kind = _kind_of(_typed(item, dict, place, path))
    if kind is None:
        raise QAError(f"{path}: {place}: missing key {LAYOUT_KEYS}; found {shown(list(item))}")
    return kind


def _rows(items: Iterable[Any], place_of: str, path: str) -> Iterator[tuple[Row, str]]:
    for i, item in enumerate(items):
        place = place_of.format(i)
        kind = _kind(item, place, path)
        title = "" if item.get("title") is None else _string(item, "title", place, path)
        if kind == "articles":
            for j, paragraph in enumerate(_typed(item["paragraphs"], list, f"{place}.paragraphs", path)):
                yield from _paragraph_rows(paragraph, title, f"{place}.paragraphs[{j}]", path)
        elif kind == "paragraphs":
            yield from _paragraph_rows(item, title, place, path)
        else:
            context = _string(item, "context", place, path)
            yield _question_row(item, title, context, place, path), place


def _paragraph_rows(paragraph: Any, title: str, place: str, path: str) -> Iterator[tuple[Row, str]]:
    _typed(paragraph, dict, place, path)
    context = _string(paragraph, "context", place, path)
    for k, question in enumerate(_typed(_required(paragraph, "qas", place, path), list, f"{place}.qas", path)):
        question_place = f"{place}.qas[{k}]"
        _typed(question, dict, question_place, path)
        yield _question_row(question, title, context, question_place, path), question_place


def _question_row(item: dict, title: str, context: str, place: str, path: str) -> Row:
    id_ = item.get("id")
    if id_ is None:
        id_ = place
    elif type(id_) is int:
        id_ = str(id_)
    else:
        id_ = _string(item, "id", place, path)
    question = _string(item, "question", place, path)
    if item.get("is_impossible") is not None and _typed(item["is_impossible"], bool, f"{place}.is_impossible", path):
        answers = []
    elif item.get("answers") is None:
        answers = None
    else:
        answers = _answers(item["answers"], f"{place}.answers", path)
    return id_, title, context, question, answers


def _answers(value: Any, place: str, path: str) -> list[tuple[str, int]]:
    """Of {"text": [...], "answer_start": [...]}, [{"text", "answer_start"}, ...] or [text, ...]."""
    if isinstance(value, dict):
        texts = _typed(_required(value, "text", place, path), list, f"{place}.text", path)
        starts = value.get("answer_start")
        if starts is None:
            starts = [None] * len(texts)
        if len(texts) != len(_typed(starts, list, f"{place}.answer_start", path)):
            raise QAError(f"{path}: {place}: {len(texts)} texts but {len(starts)} answer_starts")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    answers = []
    for i, answer in enumerate(_typed(value, list, place, path)):
        answer_place = f"{place}[{i}]"
        if isinstance(answer, str):
            answer = {"text": answer}
        _typed(answer, dict, answer_place, path)
        text = _string(answer, "text", answer_place, path)
        answers.append((text, _start(answer.get("answer_start"), f"{answer_place}.answer_start", path)))
    return answers


def _start(value: Any, place: str, path: str) -> int:
    if value is None:
        return NO_START
    start = value
    if isinstance(value, str) and (number := re.fullmatch(r"\s*(-?[0-9]{1,19})(\.0*)?\s*", value)):
        start = int(number[1])
    elif isinstance(value, float) and value.is_integer():
        start = int(value)
    start = _typed(start, int, place, path)
    if not -(2**31) <= start < 2**31:
        raise QAError(f"{path}: {place}: {shown(value)} is outside every text")
    return start


def shown(value: Any) -> str:
    """The beginning of a value for a message, however large or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}


def _required(item: dict, key: str, place: str, path: str) -> Any:
    if key not in item:
        raise QAError(f'{path}: {place}: missing key "{key}"; found {shown(list(item))}')
    return item[key]


def _typed(value: Any, kind: type, place: str, path: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise QAError(f"{path}: {place}: must be {JSON_NAMES[kind]}, is {shown(value)}")
    return value


def _string(item: dict, key: str, place: str, path: str) -> str:
    value = _typed(_required(item, key, place, path), str, f"{place}.{key}", path)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QAError(f"{path}: {place}.{key}: character {error.start} is half of a surrogate pair") from error
    return value
