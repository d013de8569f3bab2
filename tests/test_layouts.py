"""What people really have: exports of annotation tools, files of simpletransformers and pandas, broken files."""

import gzip
import io
import json
import logging

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qa.files import QAError
from qa.layouts import NO_START, layout
from qa.read_squad import STORED_FEATURES, read_squad_file

CONTEXT = "Ünïcode 😀: the bridge of 1890 is made of steel."
QUESTION = {"id": "q1", "question": "Of what?", "answers": [{"text": "steel", "answer_start": 42}]}
TWO_ANSWERS = [{"text": "1890", "answer_start": 26}, {"text": "18", "answer_start": 26}]
OTHER = {"id": "q2", "question": "When?", "answers": TWO_ANSWERS}
PARAGRAPH = {"context": CONTEXT, "qas": [QUESTION, OTHER]}
ARTICLE = {"title": "Bridges", "paragraphs": [PARAGRAPH]}


def row(**changes) -> dict:
    """A flat row; of a change to Ellipsis the key is missing."""
    item = {"title": "", "context": CONTEXT, **QUESTION, **changes}
    return {key: value for key, value in item.items() if value is not ...}


def nested(**changes) -> dict:
    return {"data": [{"title": "", "paragraphs": [{"context": CONTEXT, "qas": [row(title=..., **changes)]}]}]}


@pytest.fixture
def read(tmp_path):
    """Reads what is given as the bytes of a file, or as the JSON in it."""

    def read(content, name: str = "file") -> Dataset:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_squad_file(path, tmp_path / "cache")

    return read


def expected(title: str = "") -> list[dict]:
    return [
        {
            "id": question["id"],
            "title": title,
            "context": CONTEXT,
            "question": question["question"],
            "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
        }
        for question in (QUESTION, OTHER)
    ]


# ---- Articles, paragraphs, rows ----

LAYOUTS = {
    "a list of paragraphs (simpletransformers)": ([PARAGRAPH], "", "JSON, paragraphs"),
    "paragraphs under data (Haystack)": ({"data": [PARAGRAPH]}, "", "JSON, paragraphs"),
    "one article": (ARTICLE, "Bridges", "JSON, articles"),
    "one paragraph": (PARAGRAPH, "", "JSON, paragraphs"),
    "a list of articles": ([ARTICLE], "Bridges", "JSON, articles"),
    "articles under data": ({"version": "1.1", "data": [ARTICLE]}, "Bridges", "JSON, articles"),
    "flat rows": ([row(), row(**OTHER)], "", "JSON, flat rows"),
    "flat rows as datasets writes them": (expected("Bridges"), "Bridges", "JSON, flat rows"),
}


def as_json_lines(items) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def as_parquet(items) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_in_each_format(name, read):
    content, title, what = LAYOUTS[name]
    items = content if isinstance(content, list) else content.get("data", [content])
    forms = {
        "JSON": json.dumps(content, ensure_ascii=False).encode(),
        "indented JSON": json.dumps(content, indent=4).encode(),
        "Parquet": as_parquet(items),
    }
    if len(items) > 1:  # a single line is JSON
        forms["JSON lines"] = as_json_lines(items)
    for form, data in forms.items():
        for zipped, compressed in (("", data), ("gzipped ", gzip.compress(data))):
            examples = read(compressed)
            assert examples.to_list() == expected(title) and examples.features == STORED_FEATURES
            shown = f"{zipped}{what.replace('JSON', form.removeprefix('indented '))}"
            assert layout(io.BytesIO(compressed), "file") == shown


def test_the_bytes_say_what_a_file_is_and_not_its_name(read):
    assert read(as_parquet([ARTICLE]), "train.json").to_list() == expected("Bridges")
    assert read(json.dumps(ARTICLE).encode(), "train.parquet").to_list() == expected("Bridges")
    members = gzip.compress(json.dumps(ARTICLE).encode()[:50]) + gzip.compress(json.dumps(ARTICLE).encode()[50:])
    assert read(members + bytes(20)).to_list() == expected("Bridges")  # as tape and cat leave them
    windows = "\ufeff" + "\r\n\r\n".join(json.dumps(item) for item in expected()) + "\r\n \r\n"
    assert read(windows.encode()).to_list() == expected()


def test_rows_and_paragraphs_in_one_file(read):
    assert read([row(id="0"), PARAGRAPH])["id"][:] == ["0", "q1", "q2"]


@pytest.mark.parametrize(
    "answers",
    [{"text": ["steel"], "answer_start": [42]}, [{"text": "steel", "answer_start": 42.0}], ["steel"]],
    ids=["dict of lists", "list of answers", "texts"],
)
def test_parquet_of_pandas(answers, read):
    """pandas writes NumPy arrays, an index column, categories and columns of its own."""
    frame = pandas.DataFrame({"context": [CONTEXT] * 2, "question": "?", "made": [1.5, None]}, index=[7, 9])
    frame["title"] = pandas.Categorical(["Bridges", "Bridges"])
    frame["answers"] = [answers, answers]
    rows = read(frame.to_parquet())
    start = NO_START if answers == ["steel"] else 42
    assert rows["answers"][:] == [{"text": ["steel"], "answer_start": [start]}] * 2
    assert rows["id"][:] == ["row 0", "row 1"] and rows["title"][:] == ["Bridges"] * 2


def test_parquet_of_many_row_groups(read):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([row(id=str(i)) for i in range(2500)]), sink, row_group_size=300)
    assert read(sink.getvalue().to_pybytes())["id"][:] == [str(i) for i in range(2500)]


# ---- Answers, ids, numbers ----


def test_squad_2(read):
    plausible = [{"text": "steel"}]
    impossible = [
        row(id="b", is_impossible=True, answers=[], plausible_answers=plausible),
        row(id="c", is_impossible=True),
        row(id="d", is_impossible=True, answers=...),
        row(id="e", is_impossible=None, answers=[]),
    ]
    answers = read([row(is_impossible=False), *impossible])["answers"][:]
    assert answers == [{"text": ["steel"], "answer_start": [42]}] + 4 * [{"text": [], "answer_start": []}]


def test_no_gold_answers_title_or_string_ids(read):
    rows = read([row(id=7, title=None, answers=...), row(title=..., answers=None)])
    assert rows.column_names == ["id", "title", "context", "question"]
    assert rows["id"][:] == ["7", "q1"] and rows["title"][:] == ["", ""]


def test_missing_ids_are_places_and_one_line_says_so(read, caplog):
    nameless = row(id=..., context=...)
    article = {"paragraphs": [PARAGRAPH, {"context": "x", "qas": [nameless, {**nameless, "id": None}]}]}
    places = ["data[0].paragraphs[1].qas[0]", "data[0].paragraphs[1].qas[1]"]
    for _ in ("read", "read from the cache"):
        with caplog.at_level(logging.INFO, logger="qa"):
            assert read({"data": [article]})["id"][:] == ["q1", "q2", *places]
        (line,) = caplog.messages
        assert f"2 of 4 questions have no id: their place in it is taken for one, such as {places[0]}" in line
        caplog.clear()
    with caplog.at_level(logging.INFO, logger="qa"):
        read([PARAGRAPH])
    assert caplog.messages == []
    assert read([{**PARAGRAPH, "qas": [nameless]}])["id"][:] == ["row 0.qas[0]"]


@pytest.mark.parametrize(
    ("start", "number"),
    [("42", 42), (" 42 ", 42), ("42.0", 42), (42.0, 42), (-0.0, 0), ("-1", -1), (-1, -1), (None, NO_START)],
)
def test_starts_as_texts_and_floats(start, number, read):
    for answers in ([{"text": "steel", "answer_start": start}], {"text": ["steel"], "answer_start": [start]}):
        assert read([row(answers=answers)])[0]["answers"] == {"text": ["steel"], "answer_start": [number]}


@pytest.mark.parametrize("answers", [["a", "b"], {"text": ["a", "b"]}, [{"text": "a"}, "b"]])
def test_answers_without_starts(answers, read):
    assert read([row(answers=answers)])[0]["answers"] == {"text": ["a", "b"], "answer_start": [NO_START, NO_START]}


# ---- What is refused ----

GZIPPED = gzip.compress(json.dumps(ARTICLE).encode())
QA = r"data\[0\]\.paragraphs\[0\]\.qas\[0\]"
ANSWER = {"text": "x", "answer_start": 1}
LATE = pa.scalar(2**31 - 1, pa.date32())
REFUSED = {
    "empty": (b"", "is empty"),
    "not JSON": (b'{"data": [', "line 1 column 11: not JSON"),
    "cut off": (json.dumps(nested(), indent=4).encode()[:200], r"line \d+ column \d+: not JSON"),
    "not JSON lines": (json.dumps(row()).encode() + b'\n\n{"id": ', "line 3 column 8: not JSON"),
    "more after the end": (json.dumps(nested()).encode() + b"\n}", "line 2 column 1: not JSON"),
    "UTF-16": (json.dumps(ARTICLE).encode("utf-16"), "not JSON: .*; read are JSON and JSON lines in UTF-8, and Parq"),
    "Latin-1": (
        json.dumps([row()], ensure_ascii=False).replace("😀", "").encode("latin-1"),
        "character 0 is not UTF-8",
    ),
    "half a surrogate pair": (nested(question="a\ud800"), rf"{QA}\.question: character 1 .* half of a surrogate pair"),
    "nested too deep": (b"[" * 100_000, "JSON that cannot be read"),
    "a number of 5000 digits": (b'{"data": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
    "gzip cut off": (GZIPPED[:-30], "its gzip data breaks off or is damaged, fetch it again: Compressed file ended"),
    "another checksum": (GZIPPED[:-8] + bytes(8), "its gzip data breaks off or is damaged, .*: CRC check failed"),
    "damaged gzip data": (GZIPPED[:30] + b"\xff" * 9 + GZIPPED[39:], "its gzip data breaks off or is damaged"),
    "Parquet cut off": (as_parquet([row()])[:-40], "Parquet that cannot be read"),
    "Parquet of other columns": (
        as_parquet([{"text": "x", "label": 1}]),
        r"file: its columns: missing .*\['text', 'label'\]",
    ),
    "Parquet of a date beyond Python's": (as_parquet([row(title=LATE)]), "Parquet that cannot be read: "),
    "a number": (b"5", "the file: must be a list, is 5"),
    "data is null": ({"data": None}, "data: must be a list, is None"),
    "no question": ({"data": []}, "holds no question"),
    "no layout": ({"version": "1", "rows": []}, r'missing key "data" .* found \[\'version\', \'rows\'\]'),
    "a row of no layout": ([{"text": "x", "label": 1}], r'row 0: missing .* "context" and "question"; found \[\'text'),
    "no context": ({"data": [{"qas": [QUESTION]}]}, r'data\[0\]: missing key "context"; found \[\'qas\'\]'),
    "no qas": ([{"paragraphs": [{"context": "c"}]}], r'row 0\.paragraphs\[0\]: missing key "qas"'),
    "no question key": (nested(question=...), rf'{QA}: missing key "question"'),
    "id is a float": (nested(id=1.5), rf"{QA}\.id: must be a string, is 1.5"),
    "is_impossible is a string": (nested(is_impossible="no"), rf"{QA}\.is_impossible: must be true or false, is 'no'"),
    "answers is a string": (nested(answers="king"), rf"{QA}\.answers: must be a list, is 'king'"),
    "answer without text": (nested(answers=[{"answer_start": 1}]), rf'{QA}\.answers\[0\]: missing key "text"'),
    "answer is a number": (nested(answers=[5]), rf"{QA}\.answers\[0\]: must be an object, is 5"),
    "fewer starts": (nested(answers={"text": ["x"], "answer_start": []}), "1 texts but 0 answer_starts"),
    "duplicate id": ([row(), row(id="b"), row()], "row 2: id 'q1' is already the id of row 0"),
    "id 7 and id '7'": ([row(id=7), row(id="7")], "row 1: id '7' is already the id of row 0"),
    "an id that is another's place": ([row(id="row 1"), row(id=...)], "row 1: id 'row 1' is already the id of row 0"),
    "answers in some rows only": ([row(), row(id="b", answers=...)], 'row 1: missing key "answers", which other'),
}
STARTS = {"four": "is 'four'", 4.5: r"is 4\.5", "9" * 5000: "is '99", True: "is True", float("nan"): "is nan"}
for bad, shown in STARTS.items():
    REFUSED[f"start {str(bad)[:9]}"] = nested(answers=[{**ANSWER, "answer_start": bad}]), f"must be an integer, {shown}"
for bad in (2**31, -(2**31) - 1, str(2**31)):
    REFUSED[f"start {bad!r}"] = nested(answers=[{**ANSWER, "answer_start": bad}]), "2147483.* is outside every text"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, read, tmp_path):
    content, message = REFUSED[name]
    with pytest.raises(QAError, match=message) as error:
        read(content)
    assert str(error.value).startswith(f"{tmp_path / 'file'}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 450
    assert list(tmp_path.rglob("*.arrow")) == []


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(QAError, match="nowhere.json: cannot be read: No such file or directory"):
        read_squad_file(tmp_path / "nowhere.json")
    with pytest.raises(QAError, match="cannot be read: Is a directory"):
        read_squad_file(tmp_path)
