"""Broken and hostile dataset files: each is read as it says, or refused in one line that names file and place."""

import copy
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa.read_squad import read_squad_file

FILES = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads bytes as a file; returns the rows, or None if the file is refused as it should be."""
    # Nothing is written, because 2,000 cache files would take most of the time; the reader's own tests cover them.
    tables = []
    monkeypatch.setattr("qa.read_squad.write_arrow", lambda path, features, written: tables.extend(written))
    monkeypatch.setattr(Dataset, "from_file", lambda path: tables[-1])
    path = tmp_path / "hostile.json"

    def read(content: bytes) -> list[dict] | None:
        path.write_bytes(content)
        try:
            return read_squad_file(path, tmp_path / "cache").to_pylist()
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError, repr(error)
            assert message.startswith(f"{path}: ") and len(message) > len(str(path)) + 5
            assert "\n" not in message and len(message) < len(str(path)) + 400
            message.encode("utf-8")  # can be printed
            return None

    return read


def rows_as_they_say(file: dict) -> list[dict]:
    """What a file of SQuAD's own layout holds, by a reader that trusts it."""
    rows = []
    for article in file["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question["answers"]
                if not isinstance(answers, dict):
                    answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
                row = {
                    "id": str(question["id"]),
                    "title": article.get("title") or "",
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": answers,
                }
                rows.append(row)
    return rows


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


@pytest.mark.parametrize("layout", ["nested", "flat"])
@FILES
@given(data=st.data())
def test_one_value_replaced(layout, read, data):
    """Anywhere in a good file stands something else, or nothing."""
    good = GOOD if layout == "nested" else FLAT
    place = data.draw(st.sampled_from([place for place in places(good) if place]))
    new = data.draw(st.one_of(HOSTILE_VALUES, st.just(...)))
    bad = change(good, place, new)
    rows = read(to_bytes(bad))
    if rows is not None and layout == "nested":
        assert rows == rows_as_they_say(json.loads(json.dumps(bad)))
        assert all(type(start) is int for row in rows for start in row["answers"]["answer_start"])


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


def test_the_reader_that_trusts_is_another(tmp_path: Path):
    """`rows_as_they_say` and the reader agree on the good file through the cache file as well."""
    path = tmp_path / "good.json"
    path.write_bytes(to_bytes(GOOD))
    assert read_squad_file(path, tmp_path / "cache").to_list() == rows_as_they_say(GOOD)
