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


def as_csv(items, **how) -> bytes:
    return pandas.DataFrame(items).to_csv(index=False, **how).encode("utf-8-sig")


ROW = {"id": "1", "title": "", "context": 'Das Haus, "alt",\nsteht 日本に。', "question": "Was?"}
HOUSE = {**ROW, "answers": {"text": ["Haus", "alt"], "answer_start": [4, 11]}}
ONE = {**ROW, "answers": {"text": ["Haus"], "answer_start": [4]}}
IN_A_CELL = {**ROW, "answers": json.dumps(HOUSE["answers"] | {"text": ["Haus", "😀"]})}
BESIDE = {
    "qid": "1",
    "context_text": ROW["context"],
    "query_text": "Was?",
    "answer": "Haus",
    "answer_begin_position": 4,
}
TABLES = {
    "datasets": (lambda path: Dataset.from_list([HOUSE]).to_csv(path), HOUSE),
    "pandas": (lambda path: pandas.DataFrame([HOUSE]).to_csv(path), HOUSE),  # with its index
    "NumPy's numbers": (
        lambda path: path.write_bytes(
            as_csv([{**ROW, "answers": "{'text': array([str_('Haus')]), 'answer_start': int64(4)}"}])
        ),
        ONE,
    ),
    "JSON in a cell": (
        lambda path: path.write_bytes(as_csv([IN_A_CELL])),
        {**ROW, "answers": {"text": ["Haus", "😀"], "answer_start": [4, 11]}},
    ),
    "Excel": (lambda path: path.write_bytes(as_csv([BESIDE], sep=";", lineterminator="\r\n")), ONE),
    "TSV, gzipped": (lambda path: path.write_bytes(gzip.compress(as_csv([BESIDE], sep="\t"))), ONE),
}


@pytest.mark.parametrize("name", TABLES)
def test_csv(name, tmp_path):
    write, expected = TABLES[name]
    write(tmp_path / "file")
    assert read_squad_file(tmp_path / "file", tmp_path / "cache").to_list() == [expected]


def test_csv_without_answers_and_with_cells_that_only_look_like_code(read):
    shown = "[{'text': __import__('os').abort()}]", "{'text': print('run')}", "[sic]", "{", "{x: y}"
    items = [{"context": f"[{number}]", "question": "?", "answers": cell} for number, cell in enumerate(("", *shown))]
    rows = read(as_csv(items))
    assert [answers["text"] for answers in rows["answers"]] == [
        [],
        [shown[0]],
        ["run"],
        *([text] for text in shown[2:]),
    ]
    assert rows["context"][1] == "[1]"


def test_csv_of_many_blocks(read, monkeypatch):
    monkeypatch.setattr("qa.layouts.CSV_BLOCK", 100)
    items = [{"id": str(i), "context": "zwei\nZeilen " * (i % 5), "question": "¿Qué?\n"} for i in range(50)]
    assert read(as_csv(items)).remove_columns("title").to_list() == items


def test_json_with_a_text_like_the_columns_of_csv(read):
    rows = [{"id": str(i), "context": "It is culture, context, and language.", "question": "?"} for i in range(2)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    assert read(rows).remove_columns("title").to_list() == read(lines).remove_columns("title").to_list() == rows


# ---- Other names and forms ----


def test_answers_of_null_and_a_row_again_without_answers(read):
    row = {"id": "a", "context": "zwei", "question": "?"}
    nulls = ([None], [{"text": None, "answer_start": None}], {"text": [None], "answer_start": [None]})
    for answers in nulls:
        assert read([{**row, "answers": answers, "is_impossible": True}])["answers"][0]["text"] == []
    assert read([{**row, "answers": "zwei"}, row])["answers"][0]["text"] == ["zwei"]


START = {"text": ["made of"], "answer_start": [30]}
FORMS = {
    "an object": {"answer": {"text": "made of", "answer_start": 30}},
    "an object of lists": {"answer": {"text": ["made of"], "answer_start": [30]}},
    "a text": {"answers": "made of", "answer_start": 30},
    "a list beside a list": {"answer": ["made of"], "answer_start": [30]},
    "a list beside a number": {"answers": ["made of"], "answer_begin_position": "30"},
    "answer_text": {"answer_text": "made of", "answer_start": 30, "answer": None},
    "answer_text in an object": {"answers": [{"answer_text": "made of", "answer_start": 30}]},
    "spans": {"detected_answers": [{"text": "made of", "char_spans": [[30, 36], [50, 56]]}]},
    "spans of the hub": {"detected_answers": {"text": ["made of"], "char_spans": [{"start": [30], "end": [36]}]}},
}


@pytest.mark.parametrize("name", FORMS)
def test_answers_in_other_forms(name, read):
    assert read([row(**{"answers": ..., **FORMS[name]})])["answers"][:] == [START]


def test_other_names_of_a_row(read):
    names = {"context_text": CONTEXT, "query_text": "Wovon?", "answer": "steel"}
    ids = [
        {"question_id": "a"},
        {"query_id": 2},
        {"qid": "c", "guid": "x"},
        {"guid": "d", "id": None},
        {"id": "e", "qid": "x"},
    ]
    rows = read([{**names, **id_} for id_ in ids])
    assert rows["id"][:] == ["a", "2", "c", "d", "e"]
    assert set(rows["context"]) == {CONTEXT} and set(rows["question"]) == {"Wovon?"}


def test_mrqa(read):
    found = [{"text": "Steel", "char_spans": [[42, 46]], "token_spans": [[9, 9]]}]
    question = {"qid": "q1", "question": "Of what?", "answers": ["Steel", "iron"], "detected_answers": found}
    lines = [{"header": {"dataset": "SQuAD", "split": "dev"}}, {"id": "", "context": CONTEXT, "qas": [question]}]
    rows = read(as_json_lines(lines))
    assert rows["id"][:] == ["q1"]
    assert rows["answers"][:] == [{"text": ["Steel", "Steel", "iron"], "answer_start": [42, NO_START, NO_START]}]
    assert layout(io.BytesIO(as_json_lines(lines)), "file") == "JSON lines, paragraphs"


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


def test_is_impossible_as_text_and_beside_an_answer(read, caplog):
    marks = ["false", "TRUE", " True ", "0", 1.0, "", None, True]
    items = [row(id=str(i), is_impossible=mark, answers=["x"] * (i not in (1, 2))) for i, mark in enumerate(marks)]
    texts = [answers["text"] for answers in read(items)["answers"]]
    assert texts == [["x"], [], [], ["x"], [], ["x"], ["x"], []]
    line = "2 of 8 questions have an answer but are marked is_impossible: taken as without an answer; first ids: 4, 7"
    assert line in caplog.text


def test_ids_that_are_there_again(read, caplog):
    steel, bridge = ({"text": [text], "answer_start": [CONTEXT.index(text)]} for text in ("steel", "bridge"))
    same = row(answers=steel), row(answers=bridge), row(answers=steel)
    other = row(question="¿De qué?"), row(context="acero"), row(question="¿De qué?", answers=["acero"])
    rows = read(
        [*same, *other, row(id="r"), row(id=7), row(id="7"), row(id="row 3", question="x"), row(id="", question="y")]
    )
    assert rows["id"][:] == ["q1", "row 3", "row 4", "r", "7", "row 9", "row 10"]
    assert rows[0]["answers"] == {"text": ["steel", "bridge"], "answer_start": [41, 15]}
    assert rows[1]["answers"] == {"text": ["steel", "acero"], "answer_start": [42, NO_START]}
    line = "3 of 7 questions are there again, of the same id and context: taken once, with all answers; first ids: "
    assert f"{line}q1, row 3, 7" in caplog.text
    line = "3 of 7 questions have the id of another one: their place in the file is taken instead; first ids: "
    assert f"{line}row 3, row 4, row 9" in caplog.text


def test_empty_questions_are_counted(read, caplog):
    assert len(read([row(), row(id="a", question=""), row(id="b", question=" \u3000\n")])) == 3
    line = "2 of 3 questions are empty: left out of training, and answered in evaluation; first ids: a, b"
    assert line in caplog.text


# ---- Several files ----


def test_files_of_a_folder_or_of_a_pattern_are_one(tmp_path, caplog):
    (tmp_path / "set" / "folder").mkdir(parents=True)
    (tmp_path / "set" / ".hidden").write_text("no")
    (tmp_path / "set" / "a.json").write_text(json.dumps([row(), row(id=..., question="Woraus?")]))
    (tmp_path / "set" / "b.csv").write_bytes(as_csv([row(id="c", answers="steel"), row(id="", answers="steel")]))
    with caplog.at_level(logging.INFO, logger="qa"):
        for path in ("set", "set/*", "s*/*.*"):
            rows = read_squad_file(tmp_path / path, tmp_path / "cache")
            assert rows["id"][:] == ["q1", "a.json: row 1", "c", "b.csv: row 1"]
            assert f"{tmp_path / path}: 2 files are read as one: a.json, b.csv." in caplog.text
    assert read_squad_file(tmp_path / "set" / "*.json", tmp_path / "cache")["id"][:] == ["q1", "row 1"]
    (tmp_path / "set" / "a.json").rename(tmp_path / "set" / "aa.json")
    (tmp_path / "set").rename(tmp_path / "set[*]")
    assert read_squad_file(tmp_path / "set[*]", tmp_path / "cache")["id"][1] == "aa.json: row 1"
    (tmp_path / "set[*]").rename(tmp_path / "set")
    (tmp_path / "set" / "b.csv").write_bytes(as_csv([row(id="c", answers="steel")]) + b"too,few\n")
    with pytest.raises(QAError, match="set: b.csv: CSV that cannot be read: .* Expected 5 columns, got 2"):
        read_squad_file(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "set" / "b.csv").write_bytes(as_csv([row(id="c", answers=...)]))
    with pytest.raises(QAError, match='set: b.csv: row 0: missing key "answers", which other questions'):
        read_squad_file(tmp_path / "set", tmp_path / "cache")


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
        assert f"2 of 4 questions have no id: their place in the file is taken for one; first ids: {places[0]}" in line
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


@pytest.mark.parametrize(
    "answers",
    [["a", "b"], {"text": ["a", "b"]}, [{"text": "a", "answer_start": ""}, {"text": "", "answer_start": 3}, "b"]],
)
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
    "UTF-16": (json.dumps(ARTICLE).encode("utf-16"), "not JSON: .*; read are JSON, JSON lines, CSV with"),
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
    "is_impossible is a word": (nested(is_impossible="no"), rf"{QA}\.is_impossible: must be true or false, is 'no'"),
    "answers is a number": (nested(answers=5), rf"{QA}\.answers: must be a string, is 5"),
    "an object in an answer": (nested(answers={"text": {}}), rf'{QA}\.answers: missing key "text"; found \[\]'),
    "is_impossible is deep": (
        nested(is_impossible=json.loads("[" * 500 + "]" * 500)),
        r"must be true or false, is \[\[",
    ),
    "answer without text": (nested(answers=[{"answer_start": 1}]), rf'{QA}\.answers\[0\]: missing key "text"'),
    "answer is a number": (nested(answers=[5]), rf"{QA}\.answers\[0\]: must be a string, is 5"),
    "fewer starts": (nested(answers={"text": ["x"], "answer_start": []}), "1 texts but 0 answer_starts"),
    "an id that is another's place": ([row(id="row 1"), row(id=...)], "row 1: needs its place for an id, but another"),
    "is_impossible means the opposite": (
        [row(id=str(i), is_impossible="TRUE") for i in range(7)] + [row(id="7", is_impossible=True, answers=[])],
        r"7 of the 8 questions that are marked is_impossible have an answer \(first ids: 0, 1, 2, 3, 4\): take out",
    ),
    "CSV of other columns": (b"text,question\na,b\n", "line 1 column 1: not JSON: .* CSV with the columns' names"),
    "CSV without questions": (
        b"context,answer\na,b\n",
        r"row 0: missing key \"question\"; found \['answers', 'context'\]",
    ),
    "CSV with a cell too many": (
        b"context,question\na,b\na,b,c\n",
        "CSV that cannot be read: .* Expected 2 columns, got 3",
    ),
    "CSV in Latin-1": (b"context\tquestion\na\xe9\tb\n", "TSV that cannot be read: .* invalid UTF8 data"),
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
    with pytest.raises(QAError, match=r"\*.json: cannot be read: No such file or directory"):
        read_squad_file(tmp_path / "*.json")
    with pytest.raises(QAError, match="cannot be read: Is a directory"):  # which holds no file
        read_squad_file(tmp_path)
