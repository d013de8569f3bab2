"""What people really have: exports of annotation tools, files of simpletransformers and pandas, gzip, and bombs."""

import gzip
import io
import json
import logging

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hub_cache import cache_dataset

from qa import layouts
from qa.layouts import NO_START, layout
from qa.read_squad import STORED_FEATURES, load_examples, read_squad_file

CONTEXT = "The bridge of 1890 is made of steel. Steel rusts."
QUESTION = {"id": "q1", "question": "Of what?", "answers": [{"text": "steel", "answer_start": 30}]}
OTHER = {"id": "q2", "question": "When?", "answers": [{"text": "1890", "answer_start": 14}]}
PARAGRAPH = {"context": CONTEXT, "qas": [QUESTION, OTHER]}
ARTICLE = {"title": "Bridges", "paragraphs": [PARAGRAPH]}


def flat(question: dict, **changes) -> dict:
    return {"title": "", "context": CONTEXT, **question, **changes}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def read(tmp_path):
    """Reads what is given as the bytes of a file, or as the JSON in it."""

    def read(content, name: str = "file") -> Dataset:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        examples = read_squad_file(path, tmp_path / "cache")
        assert examples.features == STORED_FEATURES
        return examples

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
    "one article without a title": ({"paragraphs": [PARAGRAPH]}, "", "JSON, articles"),
    "one paragraph": (PARAGRAPH, "", "JSON, paragraphs"),
    "a list of articles": ([ARTICLE], "Bridges", "JSON, articles"),
    "articles under data": ({"data": [ARTICLE]}, "Bridges", "JSON, articles"),
    "flat rows": ([flat(QUESTION), flat(OTHER)], "", "JSON, flat rows"),
}


def as_json_lines(items) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def as_parquet(items) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_in_each_format(name, compress, read):
    content, title, what = LAYOUTS[name]
    items = content if isinstance(content, list) else content.get("data", [content])
    zipped = "gzipped " if compress is gzip.compress else ""
    forms = {"JSON": json.dumps(content).encode(), "Parquet": as_parquet(items)}
    if len(items) > 1:  # a single line is JSON
        forms["JSON lines"] = as_json_lines(items)
    for form, data in forms.items():
        data = compress(data)
        assert read(data, "data.json").to_list() == expected(title)
        assert layout(io.BytesIO(data), "file") == f"{zipped}{what.replace('JSON', form)}"


def test_the_bytes_say_what_a_file_is_and_not_its_name(read):
    assert read(as_parquet([ARTICLE]), "train.json").to_list() == expected("Bridges")
    assert read(json.dumps(ARTICLE).encode(), "train.parquet").to_list() == expected("Bridges")
    assert read(gzip.compress(as_json_lines([ARTICLE, {**ARTICLE, "paragraphs": []}])), "a").to_list() == expected(
        "Bridges"
    )
    members = gzip.compress(json.dumps(ARTICLE).encode()[:50]) + gzip.compress(json.dumps(ARTICLE).encode()[50:])
    assert read(members + bytes(20), "b").to_list() == expected("Bridges")  # as tape and cat leave them


def test_rows_and_articles_in_one_file(read):
    rows = read([{"context": "x", "question": "?", "id": "0", "answers": []}, PARAGRAPH])
    assert rows["id"][:] == ["0", "q1", "q2"]


@pytest.mark.parametrize("gold", ["dict of lists", "list of answers", "texts"])
def test_parquet_of_pandas(gold, read):
    """pandas writes NumPy arrays, an index column, categories and columns of its own."""
    golds = {
        "dict of lists": {"text": ["steel"], "answer_start": [30]},
        "list of answers": [{"text": "steel", "answer_start": 30.0}],
        "texts": ["steel"],
    }
    frame = pandas.DataFrame(
        {"context": [CONTEXT] * 2, "question": ["Of what?", "?"], "made": [1.5, None]}, index=[7, 9]
    )
    frame["title"] = pandas.Categorical(["Bridges", "Bridges"])
    frame["answers"] = [golds[gold], golds[gold]]
    rows = read(frame.to_parquet())
    start = NO_START if gold == "texts" else 30
    assert rows["answers"][:] == [{"text": ["steel"], "answer_start": [start]}] * 2
    assert rows["id"][:] == ["row 0", "row 1"] and rows["title"][:] == ["Bridges"] * 2


def test_parquet_of_many_row_groups(read):
    items = [flat(QUESTION, id=str(i)) for i in range(2500)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(items), sink, row_group_size=300, compression="zstd")
    assert read(sink.getvalue().to_pybytes())["id"][:] == [str(i) for i in range(2500)]


# ---- Ids, numbers, texts alone ----


def test_missing_ids_are_places_and_one_line_says_so(read, caplog):
    nameless = {key: value for key, value in QUESTION.items() if key != "id"}
    article = {"paragraphs": [PARAGRAPH, {"context": "x", "qas": [nameless, {**nameless, "id": None}]}]}
    with caplog.at_level(logging.INFO, logger="qa"):
        rows = read({"data": [article]})
        read({"data": [article]})  # from the cache
    places = ["data[0].paragraphs[1].qas[0]", "data[0].paragraphs[1].qas[1]"]
    assert rows["id"][:] == ["q1", "q2", *places]
    (line, again) = caplog.messages
    assert (
        line == again
        and f"2 of 4 questions have no id: their place in it is taken for one, such as {places[0]}" in line
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qa"):
        read({"data": [{"paragraphs": [PARAGRAPH]}]})
    assert caplog.messages == []
    assert read([{**PARAGRAPH, "qas": [nameless]}])["id"][:] == ["row 0.qas[0]"]
    with pytest.raises(ValueError, match="row 1: id 'row 1' is already the id of row 0"):
        read([flat(QUESTION, id="row 1"), flat(nameless)])


@pytest.mark.parametrize(
    ("start", "number"),
    [("30", 30), (" 30 ", 30), ("30.0", 30), (30.0, 30), (-0.0, 0), ("-1", -1), (-1, -1), (None, NO_START)],
)
def test_numbers_as_texts_and_floats(start, number, read):
    rows = read([flat(QUESTION, answers=[{"text": "steel", "answer_start": start}])])
    assert rows[0]["answers"] == {"text": ["steel"], "answer_start": [number]}
    rows = read([flat(QUESTION, answers={"text": ["steel"], "answer_start": [start]})])
    assert rows[0]["answers"] == {"text": ["steel"], "answer_start": [number]}


@pytest.mark.parametrize(
    "answers",
    [["steel", "Steel"], {"text": ["steel", "Steel"]}, [{"text": "steel"}, "Steel"]]
    + [{"text": ["steel", "Steel"], "answer_start": None}],
)
def test_answers_without_starts(answers, read):
    rows = read([flat(QUESTION, answers=answers)])
    assert rows[0]["answers"] == {"text": ["steel", "Steel"], "answer_start": [NO_START, NO_START]}


# ---- What fits no layout ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": "1", "rows": []}, r'file: missing key "data" .* found \[\'version\', \'rows\'\]'),
        (
            [{"text": "x", "label": 1}],
            r'row 0: missing key "paragraphs" .*"qas" .*"question".* found \[\'text\', \'label\'\]',
        ),
        ([{"context": "x", "answer": 1}], r'row 0: missing key "question"; found \[\'context\', \'answer\'\]'),
        ({"data": [{"qas": [QUESTION]}]}, r'data\[0\]: missing key "context"; found \[\'qas\'\]'),
        ([{**PARAGRAPH, "qas": QUESTION}], r"row 0\.qas: must be a list, is \{"),
        ([{**ARTICLE, "paragraphs": PARAGRAPH}], r"row 0\.paragraphs: must be a list"),
        (as_parquet([{"text": "x", "label": 1}]), r"no column .* found \['text', 'label'\]"),
        (as_parquet([{"context": "x", "label": 1}]), r'row 0: missing key "question"'),
        (as_parquet([{"context": "x", "question": 5}]), r"row 0\.question: must be a string, is 5"),
        (as_parquet([flat(QUESTION, qas="who?")]), r"row 0\.qas: must be a list, is 'who\?'"),
        (
            as_parquet([flat(QUESTION, answers=[{"text": "x", "answer_start": float("nan")}])]),
            "must be an integer, is nan",
        ),
        (as_parquet([flat(QUESTION)])[:-40], "Parquet that cannot be read"),
        (as_parquet([flat(QUESTION)])[:4], "Parquet that cannot be read"),
        (gzip.compress(json.dumps(ARTICLE).encode())[:-30], r"its gzip data breaks off after \d+ bytes"),
        (gzip.compress(json.dumps(ARTICLE).encode())[:-3], "its gzip data breaks off"),
        (gzip.compress(b"[]")[:2], "its gzip data breaks off after 2 bytes"),
        (gzip.compress(json.dumps(ARTICLE).encode())[:-8] + bytes(8), "damaged gzip: CRC check failed"),
        (gzip.compress(b"[]") + b"more", "damaged gzip: Not a gzipped file"),
        (gzip.compress(gzip.compress(b"[]")), "byte 1: not UTF-8 text; read are JSON, JSON lines and Parquet"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(as_parquet([flat(QUESTION)])[:60]), "Parquet that cannot be read"),
        (b"PK\x03\x04\xff", "not UTF-8 text; read are JSON, JSON lines and Parquet, each also gzipped"),
    ],
)
def test_refused_in_one_line(content, message, read, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(content)
    assert str(error.value).startswith(f"{tmp_path / 'file'}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 450


def test_a_gzip_bomb_stops_at_a_stated_size(read):
    bomb = gzip.compress(b"[" + b" " * 2**28)
    assert len(bomb) * layouts.MOST_COMPRESSION < 2**28
    with pytest.raises(ValueError, match=r"\d+ bytes of gzip hold more than 6\d{7}, .* 250 times .* 8589934592 bytes"):
        read(bomb)


def test_the_largest_size_is_kept_whatever_the_ratio(read, monkeypatch):
    monkeypatch.setattr(layouts, "MOST_DECOMPRESSED", 100)
    with pytest.raises(ValueError, match="of gzip hold more than 100,"):
        read(gzip.compress(json.dumps(ARTICLE).encode()))
    with pytest.raises(ValueError, match="Parquet of more than 100 bytes"):
        read(as_parquet([flat(QUESTION, context=CONTEXT * 9)]))


# ---- The hub ----


@pytest.fixture
def hub(tmp_path):
    def load(items: list[dict]) -> Dataset:
        cache_dataset(tmp_path, "squad", "plain_text", {"train": Dataset.from_list(items)})
        return load_examples("squad", None, {}, cache_dir=tmp_path / "datasets")["train"]

    return load


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "answers": [{"text": text, "answer_start": 30} for text in row["answers"]]},
        lambda row: {**row, "answers": [{"answer_start": "30", "text": text} for text in row["answers"]], "level": 1},
        lambda row: {**row, "answers": {"text": row["answers"], "answer_start": [30.0]}},
        lambda row: {**row, "answers": {"text": row["answers"], "answer_start": ["30"]}},
        lambda row: {"context": row["context"], "qas": [{**row, "answers": [{"text": "steel", "answer_start": 30}]}]},
    ],
    ids=["list of answers", "starts as texts", "floats", "texts in lists", "paragraphs"],
)
def test_hub_dataset_in_other_layouts(change, hub):
    row = {"id": "q1", "context": CONTEXT, "question": "Of what?", "answers": ["steel"]}
    train = hub([change(row)])
    answers = {"text": ["steel"], "answer_start": [30]}
    assert train.features == STORED_FEATURES
    assert train.to_list() == [{**row, "title": "", "answers": answers}]
    assert "datasets" in train.cache_files[0]["filename"]  # whose folder the features go to


def test_hub_dataset_of_texts_without_ids(hub, caplog):
    with caplog.at_level(logging.INFO, logger="qa"):
        train = hub([{"context": CONTEXT, "question": "?", "answers": ["steel"]}])
    assert train["id"][:] == ["row 0"] and "squad (train): 1 of 1 questions have no id" in caplog.text
    assert train[0]["answers"] == {"text": ["steel"], "answer_start": [NO_START]}


def test_hub_dataset_with_missing_starts(hub):
    row = {
        "id": "q1",
        "context": CONTEXT,
        "question": "?",
        "answers": {"text": ["steel", "x"], "answer_start": [None, 3]},
    }
    assert hub([row])[0]["answers"] == {"text": ["steel", "x"], "answer_start": [NO_START, 3]}


def test_hub_dataset_is_read_once(hub, tmp_path, monkeypatch):
    items = [{"context": CONTEXT, "qas": [QUESTION, OTHER]}]
    first = hub(items)
    monkeypatch.setattr("qa.read_squad.table_rows", None)
    again = load_examples("squad", None, {}, cache_dir=tmp_path / "datasets")["train"]
    assert again.to_list() == first.to_list() == expected()


def test_a_hub_dataset_is_not_read_as_an_earlier_one(hub, tmp_path):
    hub([{"context": CONTEXT, "qas": [QUESTION]}])
    (kept,) = (tmp_path / "datasets").rglob("squad-train.arrow")
    kept.unlink()
    assert hub([{"context": "other", "qas": [OTHER]}])["context"][:] == ["other"]
