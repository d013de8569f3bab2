"""Broken and hostile dataset files: each is read as it says, or refused in one line that names file and place."""

import copy
import gzip
import io
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from qa.files import QAError
from qa.read_squad import read_squad_file

FILES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads bytes as a file; returns the rows, or None if the file is refused as it should be."""
    # Nothing is written, because the cache files would take most of the time; the reader's own tests cover them.
    tables = []
    monkeypatch.setattr("qa.read_squad.write_arrow", lambda path, features, written, _: tables.extend(written))
    monkeypatch.setattr("qa.read_squad.notes", lambda examples: {})
    monkeypatch.setattr(Dataset, "from_file", lambda path: Dataset(tables[-1]))
    path = tmp_path / "hostile.json"

    def read(content: bytes) -> list[dict] | None:
        path.write_bytes(content)
        try:
            return read_squad_file(path, tmp_path / "cache").to_list()
        except QAError as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and len(message) > len(str(path)) + 5
            assert "\n" not in message and len(message) < len(str(path)) + 400
            message.encode("utf-8")  # can be printed
            return None

    return read


def question(a: int, p: int, q: int) -> dict:
    answers = [{"text": "king", "answer_start": 4}] * (q + 1)
    return {"id": f"{a}-{p}-{q}", "question": f"Who was {q}?", "answers": answers, "is_impossible": False}


def paragraph(a: int, p: int) -> dict:
    return {"context": f"The king of city {a} {p} was born.", "qas": [question(a, p, q) for q in range(2)]}


def as_read(context: str, item: dict) -> dict:
    answers = {key: [answer[key] for answer in item["answers"]] for key in ("text", "answer_start")}
    return {"id": item["id"], "title": "t", "context": context, "question": item["question"], "answers": answers}


ARTICLES = [{"title": "t", "paragraphs": [paragraph(a, p) for p in range(2)]} for a in range(2)]
PARAGRAPHS = [{"title": "t", **paragraph} for article in ARTICLES for paragraph in article["paragraphs"]]
FLAT = [as_read(paragraph["context"], item) for paragraph in PARAGRAPHS for item in paragraph["qas"]]
LAYOUTS = {"articles": {"data": ARTICLES}, "paragraphs": PARAGRAPHS, "flat rows": FLAT}

HOSTILE_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 2**31 - 1, 2**31, -(2**31) - 1, 10**30, 4.0, -0.0, 1e999, float("nan")]
        + ["", "\x00", "\ud800", "\ud83d\ude00", "\u2028", "\n", "{}", "king", "x" * 3000, [], {}, [[]], [{}], [None]]
        + [[[[[[[[[None] * 9] * 9] * 9] * 9]]]], {"a": {"b": {"c": [1, {"d": []}]}}}]
        + [{"text": ["king"], "answer_start": [4]}, {"text": "king"}, {"text": [], "answer_start": [4]}]
        + [{"data": []}, {"paragraphs": []}, {"paragraphs": [{}]}, {"context": "c"}, {"context": "c", "qas": [None]}]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
)


def to_bytes(value) -> bytes:
    return json.dumps(value).encode()


def to_parquet(items: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue().to_pybytes()


def to_csv(items: list[dict]) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(items).to_csv(file)
    return file.getvalue()


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("layout", LAYOUTS)
@FILES
@given(data=st.data())
def test_one_value_replaced(layout, read, data):
    """Anywhere in a good file stands something else, or nothing: each question has at most one other value."""
    bad = copy.deepcopy(LAYOUTS[layout])
    *path, last = data.draw(st.sampled_from([place for place in places(bad) if place]))
    holder = bad
    for key in path:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[last] = data.draw(HOSTILE_VALUES)
    else:
        del holder[last]
    rows = read(to_bytes(bad))
    for row in [] if rows is None or "answers" not in rows[0] else rows:
        assert min(sum(row[key] != good[key] for key in good) for good in FLAT) <= 1
        assert all(type(start) is int for start in row["answers"]["answer_start"])


PACKED = {
    **{layout: to_bytes(value) for layout, value in LAYOUTS.items()},
    "gzip": gzip.compress(to_bytes({"data": ARTICLES})),
    "Parquet of rows": to_parquet(FLAT),
    "Parquet of paragraphs": to_parquet(PARAGRAPHS),
    "CSV": to_csv(FLAT),
}


@pytest.mark.parametrize("name", PACKED)
def test_good_files(name, read):
    assert read(PACKED[name]) == FLAT


@pytest.mark.parametrize("name", PACKED)
@FILES
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes(name, read, seed):
    """A bit flipped, some bytes cut out or doubled, or the end cut off."""
    content, generator = bytearray(PACKED[name]), random.Random(seed)
    position, length = generator.randrange(2, len(content)), generator.randrange(1, 40)
    match generator.randrange(4):
        case 0:
            content[position] ^= 1 << generator.randrange(8)
        case 1:
            del content[position : position + length]
        case 2:
            content[position:position] = content[position : position + length]
        case 3:
            del content[position:]
    rows = read(bytes(content))
    if name == "gzip" and rows is not None:
        assert rows == FLAT  # its checksum has seen to that


COLUMNS = ["id", "title", "context", "question", "answers", "is_impossible", "paragraphs", "qas", "text"]


@FILES
@given(data=st.data())
def test_parquet_of_other_columns(read, data):
    """Any column holds any value, or is not there."""
    columns = data.draw(st.dictionaries(st.sampled_from(COLUMNS), st.one_of(HOSTILE_VALUES, st.just(...)), max_size=3))
    items = [{**item, **columns} for item in data.draw(st.sampled_from([FLAT, PARAGRAPHS, ARTICLES]))]
    try:
        content = to_parquet([{key: value for key, value in item.items() if value is not ...} for item in items])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        reject()  # nobody can have written that
    rows = read(content)
    assert columns or rows == FLAT


LINES = st.one_of(HOSTILE_VALUES.map(json.dumps), st.sampled_from(FLAT).map(json.dumps), st.text(max_size=10))


@FILES
@given(content=st.one_of(st.binary(max_size=200), st.lists(LINES, max_size=5).map("\n".join)))
def test_any_bytes_and_any_lines(read, content):
    read(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def big_files():
    """Names and contents of about 5 MB, and whether they are questions."""
    text = "king " * 1_000_000
    yield "context", to_bytes([{**FLAT[0], "context": text}]), True
    yield "id twice", to_bytes([{**FLAT[0], "id": text}, {**FLAT[1], "id": text}]), True
    yield "open lists", b"[" * 5_000_000, False
    yield "half surrogates", b'[{"id": "' + b"\\ud800" * 800_000 + b'"}]', False


@pytest.mark.parametrize(("content", "good"), [pytest.param(*rest, id=name) for name, *rest in big_files()])
def test_big_files(read, content, good):
    """Read or refused within a few times the file's memory."""
    tracemalloc.start()
    rows = read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (rows is not None) == good
    assert peak < 10 * len(content)
