"""Broken and hostile dataset files: each is read as it says, or refused in one line that names file and place."""

import copy
import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from qa.layouts import ALWAYS_DECOMPRESSED
from qa.read_squad import read_squad_file

FILES = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads bytes as a file; returns the rows, or None if the file is refused as it should be."""
    # Nothing is written, because 2,000 cache files would take most of the time; the reader's own tests cover them.
    tables = []
    monkeypatch.setattr("qa.read_squad.write_arrow", lambda path, features, written: tables.extend(written))
    monkeypatch.setattr(Dataset, "from_file", lambda path: Dataset(tables[-1]))
    path = tmp_path / "hostile.json"

    def read(content: bytes) -> list[dict] | None:
        path.write_bytes(content)
        try:
            return read_squad_file(path, tmp_path / "cache").to_list()
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError, repr(error)
            assert message.startswith(f"{path}: ") and len(message) > len(str(path)) + 5
            assert "\n" not in message and len(message) < len(str(path)) + 400
            message.encode("utf-8")  # can be printed
            return None

    return read


def rows_as_they_say(file) -> list[dict]:
    """What a file of any layout holds, by a reader that trusts it."""
    if isinstance(file, list):
        items, place = file, "row {}"
    else:
        items, place = (file["data"], "data[{}]") if "data" in file else ([file], "row {}")
    rows = []
    for i, item in enumerate(items):
        if "paragraphs" in item:
            for j, paragraph in enumerate(item["paragraphs"]):
                rows += paragraph_as_it_says(paragraph, item.get("title"), f"{place.format(i)}.paragraphs[{j}]")
        elif "qas" in item:
            rows += paragraph_as_it_says(item, item.get("title"), place.format(i))
        else:
            rows.append(question_as_it_says(item, item["context"], item.get("title"), place.format(i)))
    return rows


def paragraph_as_it_says(paragraph: dict, title: str | None, place: str) -> list[dict]:
    return [
        question_as_it_says(question, paragraph["context"], title, f"{place}.qas[{k}]")
        for k, question in enumerate(paragraph["qas"])
    ]


def question_as_it_says(question: dict, context: str, title: str | None, place: str) -> dict:
    answers = [] if question.get("is_impossible") else question["answers"]
    if isinstance(answers, dict):
        texts, starts = answers["text"], answers.get("answer_start")
        starts = starts or [None] * len(texts)
    else:
        texts = [answer if isinstance(answer, str) else answer["text"] for answer in answers]
        starts = [None if isinstance(answer, str) else answer.get("answer_start") for answer in answers]
    starts = [-1 if start is None else int(float(start)) for start in starts]
    id_ = question.get("id")
    return {
        "id": place if id_ is None else str(id_),
        "title": title or "",
        "context": context,
        "question": question["question"],
        "answers": {"text": texts, "answer_start": starts},
    }


GOOD = {
    "version": "v2.0",
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"The king of city {a} {p} was born in 18{a}{p}.",
                    "qas": [
                        {
                            "id": f"{a}-{p}-{q}",
                            "question": f"Who was {q}?",
                            "answers": [{"text": "king", "answer_start": 4}] * (q + 1),
                            "is_impossible": False,
                        }
                        for q in range(2)
                    ],
                }
                for p in range(2)
            ],
        }
        for a in range(2)
    ],
}
FLAT = [{**row} for row in rows_as_they_say(GOOD)]
PARAGRAPHS = [paragraph for article in GOOD["data"] for paragraph in article["paragraphs"]]
LAYOUTS = {
    "nested": GOOD,
    "flat": FLAT,
    "paragraphs": PARAGRAPHS,
    "paragraphs in data": {"data": PARAGRAPHS},
    "one article": GOOD["data"][0],
    "one paragraph": PARAGRAPHS[0],
    "texts alone": {"data": [{**row, "answers": row["answers"]["text"]} for row in FLAT]},
}

HOSTILE_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 10**30, 4.0, -0.0, 1e999, float("nan")]
        + ["", "\x00", "\ud800", "a\udfff", "\ud83d\ude00", "\u2028", "\n", "{}", "[]", "king", "x" * 3000]
        + [[], {}, [[]], [{}], [None], [[[[[[[[None] * 9] * 9] * 9] * 9]]]], {"a": {"b": {"c": [1, {"d": []}]}}}]
        + [
            {"text": ["king"], "answer_start": [4]},
            {"text": "king", "answer_start": 4},
            {"text": [], "answer_start": [4]},
        ]
        + [{"data": []}, {"paragraphs": []}, {"paragraphs": [{}]}, {"context": "c"}, {"context": "c", "qas": [None]}]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change(value, place, new):
    """Replaces what stands at the place; Ellipsis takes it away."""
    if not place:
        return new
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = new
    return value


def to_bytes(value) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("layout", LAYOUTS)
@FILES
@given(data=st.data())
def test_one_value_replaced(layout, read, data):
    """Anywhere in a good file stands something else, or nothing."""
    good = LAYOUTS[layout]
    place = data.draw(st.sampled_from([place for place in places(good) if place]))
    new = data.draw(st.one_of(HOSTILE_VALUES, st.just(...)))
    bad = change(good, place, new)
    rows = read(to_bytes(bad))
    if rows is not None and "answers" in rows[0]:
        assert rows == rows_as_they_say(json.loads(json.dumps(bad)))
        assert all(type(start) is int for row in rows for start in row["answers"]["answer_start"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_files(layout, read):
    assert len(read(to_bytes(LAYOUTS[layout]))) == {"one paragraph": 2, "one article": 4}.get(layout, 8)


@FILES
@given(value=HOSTILE_VALUES)
def test_any_json_value(read, value):
    for content in (to_bytes(value), to_bytes({"data": value}), to_bytes([value])):
        read(content)


@FILES
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), nested=st.booleans())
def test_damaged_bytes(read, seed, count, nested):
    """Bytes flipped, cut out, doubled, or cut off at the end."""
    generator = random.Random(seed)
    content = bytearray(to_bytes(GOOD if nested else FLAT))
    for _ in range(count):
        if not content:
            break
        position = generator.randrange(len(content))
        match generator.randrange(4):
            case 0:
                content[position] = generator.randrange(256)
            case 1:
                del content[position : position + generator.randrange(1, 40)]
            case 2:
                content[position:position] = content[position : position + generator.randrange(1, 40)]
            case 3:
                del content[position:]
    read(bytes(content))


def to_parquet(items: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue().to_pybytes()


PACKED = {
    "gzip": gzip.compress(to_bytes(GOOD)),
    "Parquet of rows": to_parquet(FLAT),
    "Parquet of paragraphs": to_parquet(PARAGRAPHS),
    "gzipped Parquet": gzip.compress(to_parquet(FLAT)),
}


@pytest.mark.parametrize("name", PACKED)
@FILES
@given(seed=st.integers(0, 2**32))
def test_damaged_gzip_and_parquet(name, read, seed):
    """A byte flipped, some cut out, or cut off at the end."""
    content, generator = bytearray(PACKED[name]), random.Random(seed)
    position = generator.randrange(2, len(content))
    match generator.randrange(3):
        case 0:
            content[position] ^= 1 << generator.randrange(8)
        case 1:
            del content[position : position + generator.randrange(1, 40)]
        case 2:
            del content[position:]
    rows = read(bytes(content))
    if "gzip" in name and rows is not None:
        assert rows == rows_as_they_say(GOOD)  # its checksum has seen to that


def test_every_cut_of_a_gzipped_file(read):
    content = PACKED["gzip"]
    assert read(content) == rows_as_they_say(GOOD)
    for length in range(len(content)):
        assert read(content[:length]) is None


COLUMNS = ["id", "title", "context", "question", "answers", "is_impossible", "paragraphs", "qas", "text", "id"]


@FILES
@given(data=st.data())
def test_parquet_of_other_columns(read, data):
    """Any column holds any value, or is not there; rows, paragraphs and articles are mixed."""
    good = data.draw(st.sampled_from([FLAT, PARAGRAPHS, GOOD["data"]]))
    columns = data.draw(st.dictionaries(st.sampled_from(COLUMNS), st.one_of(HOSTILE_VALUES, st.just(...)), max_size=3))
    items = [
        {key: value for key, value in {**item, **columns}.items() if value is not ...}
        for item in (good if data.draw(st.booleans()) else good[:1])
    ]
    try:
        content = to_parquet(items)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        reject()  # nobody can have written that
    rows = read(content)
    if rows is not None and not columns:
        assert rows == rows_as_they_say(items)


@FILES
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-16"))))
def test_any_bytes(read, content):
    read(content)


@FILES
@given(
    lines=st.lists(
        st.one_of(
            HOSTILE_VALUES.map(json.dumps), st.sampled_from([json.dumps(row) for row in FLAT]), st.text(max_size=10)
        ),
        min_size=2,
        max_size=5,
    )
)
def test_any_json_lines(read, lines):
    read("\n".join(lines).encode("utf-8", "surrogatepass"))


def test_every_cut_of_a_good_file(read):
    content = to_bytes(GOOD)
    assert read(content) == rows_as_they_say(GOOD)
    for length in range(0, len(content)):
        assert read(content[:length]) is None


def big_files():
    """Names and contents of about 10 MB."""
    text = "king " * 2_000_000
    question = GOOD["data"][0]["paragraphs"][0]["qas"][0]
    yield "context", to_bytes({"data": [{"paragraphs": [{"context": text, "qas": [question]}]}]}), True
    yield "question", to_bytes([{**FLAT[0], "question": text}]), True
    yield "id twice", to_bytes([{**FLAT[0], "id": text[:5_000_000]}, {**FLAT[1], "id": text[:5_000_000]}]), False
    yield "key", to_bytes([{**FLAT[0], text: 1}]), True
    yield "string instead of rows", to_bytes({"data": text}), False
    yield "title", to_bytes([{**FLAT[0], "title": [text]}]), False
    yield "number", b'{"data": ' + b"9" * 10_000_000 + b"}", False
    yield "open lists", b"[" * 10_000_000, False
    yield "open objects", b'{"data":' * 1_250_000, False
    yield "lines of numbers", b"1\n" * 5_000_000, False
    yield "numbers", b'{"data": [' + b"1," * 1_000_000 + b"1]}", False
    yield "blank", b" " * 10_000_000, False
    yield "zeros", bytes(10_000_000), False
    yield "escapes", b'{"data": "' + b"\\u0041" * 1_600_000 + b'"}', False
    yield "half surrogates", b'[{"id": "' + b"\\ud800" * 1_600_000 + b'"}]', False
    yield "no end of a string", b'{"data": "' + b"a" * 10_000_000, False


@pytest.mark.parametrize(("content", "good"), [pytest.param(*rest, id=name) for name, *rest in big_files()])
def test_big_files(read, content, good):
    """10 MB are read or refused within a few times the file's memory."""
    tracemalloc.start()
    rows = read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (rows is not None) == good
    assert peak < 8 * len(content)


@pytest.mark.parametrize("what", ["blanks", "open lists", "empty gzip, end to end", "a gzipped bomb"])
def test_gzip_bombs(read, what):
    """Stopped where the reader says, in seconds, whatever is in them."""
    content = {
        "blanks": lambda: gzip.compress(b" " * 2**28),
        "open lists": lambda: gzip.compress(b"[" * 2**28),
        "empty gzip, end to end": lambda: gzip.compress(b"") * 100_000,
        "a gzipped bomb": lambda: gzip.compress(gzip.compress(bytes(2**28))),
    }[what]()
    tracemalloc.start()
    assert read(content) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * ALWAYS_DECOMPRESSED


def test_the_reader_that_trusts_is_another(tmp_path: Path):
    """`rows_as_they_say` and the reader agree on the good file through the cache file as well."""
    path = tmp_path / "good.json"
    path.write_bytes(to_bytes(GOOD))
    assert read_squad_file(path, tmp_path / "cache").to_list() == rows_as_they_say(GOOD)
