"""Reading SQuAD: files in every layout, the hub from its cache on disk."""

import json
import multiprocessing
import random
import tracemalloc
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Value
from hub_cache import cache_dataset
from test_windows import golden_tokenizer
from tiny import NO_ANSWER

from qa import read_squad
from qa.columns import distinct_texts
from qa.read_squad import EXAMPLE_FEATURES, STORED_FEATURES, load_examples, read_squad_file
from qa.train_questions import place_answers
from qa.windows import (
    WindowSettings,
    make_train_features,
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


# ----------------------------------------------------------------------------------------------------------------------
# Reading files

NESTED = [
    {
        "title": "Kings",
        "paragraphs": [
            {
                "context": "The king was born.",
                "qas": [
                    {"id": "a", "question": "Who?", "answers": [{"text": "king", "answer_start": 4}]},
                    {
                        "id": "b",
                        "question": "What?",
                        "answers": [{"text": "The king", "answer_start": 0}, {"text": "king", "answer_start": 4}],
                    },
                ],
            }
        ],
    },
    {
        "title": "Ünïcode 😀",
        "paragraphs": [{"context": "Élan.", "qas": [{"id": "c", "question": "?", "answers": []}]}],
    },
]
ROWS = [
    {
        "id": "a",
        "title": "Kings",
        "context": "The king was born.",
        "question": "Who?",
        "answers": {"text": ["king"], "answer_start": [4]},
    },
    {
        "id": "b",
        "title": "Kings",
        "context": "The king was born.",
        "question": "What?",
        "answers": {"text": ["The king", "king"], "answer_start": [0, 4]},
    },
    {"id": "c", "title": "Ünïcode 😀", "context": "Élan.", "question": "?", "answers": NO_ANSWER},
]


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def without(item: dict, *keys: str) -> dict:
    return {key: value for key, value in item.items() if key not in keys}


LAYOUTS = {
    "nested": json.dumps({"version": "1.1", "data": NESTED}),
    "flat in data": json.dumps({"data": ROWS}),
    "list of rows": json.dumps(ROWS, ensure_ascii=False),
    "json lines": "\n".join(json.dumps(row) for row in ROWS),
    "json lines, crlf, blank lines, byte order mark": "\ufeff" + "\r\n\r\n".join(json.dumps(r) for r in ROWS) + "\r\n",
    "rows with answers as SQuAD has them": json.dumps([*ROWS[:2], {**ROWS[2], "answers": []}]),
    "indented": json.dumps({"data": NESTED}, indent=4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    examples = read_squad_file(write(tmp_path / "file", LAYOUTS[layout]), tmp_path / "cache")
    assert examples.features == STORED_FEATURES
    assert examples.to_list() == ROWS


def test_one_row_in_json_lines(tmp_path):
    assert read_squad_file(write(tmp_path / "file", json.dumps(ROWS[1])), tmp_path / "cache").to_list() == ROWS[1:2]


def test_squad_2(tmp_path):
    questions = [
        {"id": "a", "question": "Who?", "is_impossible": False, "answers": [{"text": "king", "answer_start": 4}]},
        {"id": "b", "question": "?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]},
        {"id": "c", "question": "?", "is_impossible": True, "answers": [{"text": "king", "answer_start": 4}]},
        {"id": "d", "question": "?", "is_impossible": True},
    ]
    data = [{"title": "t", "paragraphs": [{"context": "The king", "qas": questions}]}]
    examples = read_squad_file(write(tmp_path / "file", json.dumps({"data": data})), tmp_path / "cache")
    assert examples["answers"][:] == [{"text": ["king"], "answer_start": [4]}, NO_ANSWER, NO_ANSWER, NO_ANSWER]


def test_no_gold_answers_title_or_string_ids(tmp_path):
    rows = [{"id": 7, "context": "c", "question": "q"}, {"id": "x", "title": None, "context": "c", "question": "r"}]
    examples = read_squad_file(write(tmp_path / "file", json.dumps(rows)), tmp_path / "cache")
    assert examples.column_names == ["id", "title", "context", "question"]
    assert examples["id"][:] == ["7", "x"] and examples["title"][:] == ["", ""]


def test_files_are_cached_by_content(tmp_path, monkeypatch):
    path, copy = write(tmp_path / "file", LAYOUTS["nested"]), write(tmp_path / "copy", LAYOUTS["nested"])
    read_squad_file(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(read_squad, "squad_rows", None)
        assert read_squad_file(copy, tmp_path / "cache").to_list() == ROWS
    write(path, LAYOUTS["nested"].replace("Who?", "Why?"))
    assert read_squad_file(path, tmp_path / "cache")["question"][0] == "Why?"


def nested(**changes) -> str:
    question = {"id": "a", "question": "Who?", "answers": [{"text": "king", "answer_start": 4}], **changes}
    question = {key: value for key, value in question.items() if value is not Ellipsis}
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "The king", "qas": [question]}]}]})


QA = r"data\[0\]\.paragraphs\[0\]\.qas\[0\]"
REFUSED = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t ", "is empty"),
    "not JSON": (b'{"data": [', "line 1 column 11: not JSON"),
    "cut off": (LAYOUTS["indented"][:200], r"line \d+ column \d+: not JSON"),
    "not JSON lines": (json.dumps(ROWS[0]) + '\n{"id": ', "line 2 column 8: not JSON"),
    "more after the end": (LAYOUTS["indented"] + "\n}", r"line \d\d column 1: not JSON: Extra data"),
    "not UTF-8": (b'{"data": "\xff"}', "byte 10: not UTF-8"),
    "UTF-16": (LAYOUTS["nested"].encode("utf-16"), "byte 0: not UTF-8"),
    "nested too deep": (b"[" * 100_000, "JSON that cannot be read"),
    "a number of 5000 digits": (b'{"data": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
    "a number": (b"5", "the file: must be a list, is 5"),
    "no data": (b'{"version": "1.1"}', 'missing key "data"'),
    "data is null": (b'{"data": null}', "data: must be a list, is None"),
    "no question": (b'{"data": []}', "holds no question"),
    "no question in paragraphs": (b'{"data": [{"paragraphs": [{"context": "c", "qas": []}]}]}', "holds no question"),
    "neither layout": (b'{"data": [{"text": "x"}]}', r'data\[0\]: missing key "paragraphs" .* or "context"'),
    "row is a string": (b'["x"]', "row 0: must be an object, is 'x'"),
    "paragraph is a list": (b'{"data": [{"paragraphs": [[]]}]}', r"data\[0\]\.paragraphs\[0\]: must be an object"),
    "no context": (b'{"data": [{"paragraphs": [{"qas": []}]}]}', r'paragraphs\[0\]: missing key "context"'),
    "no qas": (b'{"data": [{"paragraphs": [{"context": "c"}]}]}', r'paragraphs\[0\]: missing key "qas"'),
    "no question key": (nested(question=...), rf'{QA}: missing key "question"'),
    "question is null": (nested(question=None), rf"{QA}\.question: must be a string, is None"),
    "id is a float": (nested(id=1.5), rf"{QA}\.id: must be a string, is 1.5"),
    "id is true": (nested(id=True), rf"{QA}\.id: must be a string, is True"),
    "title is a list": (json.dumps([{**ROWS[0], "title": []}]), r"row 0\.title: must be a string"),
    "answers is a string": (nested(answers="king"), rf"{QA}\.answers: must be a list, is 'king'"),
    "answer without text": (nested(answers=[{"answer_start": 1}]), rf'{QA}\.answers\[0\]: missing key "text"'),
    "start is a word": (nested(answers=[{"text": "x", "answer_start": "four"}]), "must be an integer, is 'four'"),
    "start is no whole number": (nested(answers=[{"text": "x", "answer_start": 4.5}]), r"must be an integer, is 4\.5"),
    "start is a long text": (nested(answers=[{"text": "x", "answer_start": "9" * 5000}]), "must be an integer, is '99"),
    "start is NaN": (nested(answers=[{"text": "x", "answer_start": float("nan")}]), r"must be an integer, is nan"),
    "start is true": (nested(answers=[{"text": "x", "answer_start": True}]), r"must be an integer, is True"),
    "start is huge": (nested(answers=[{"text": "x", "answer_start": 2**31}]), "2147483648 is outside every text"),
    "fewer starts": (nested(answers={"text": ["x"], "answer_start": []}), "1 texts but 0 answer_starts"),
    "is_impossible is a string": (nested(is_impossible="no"), rf"{QA}\.is_impossible: must be true or false, is 'no'"),
    "half a surrogate pair": (nested(question="a\ud800"), rf"{QA}\.question: character 1 is half of a surrogate pair"),
    "duplicate id": (
        json.dumps([ROWS[0], ROWS[1], {**ROWS[2], "id": "a"}]),
        "row 2: id 'a' is already the id of row 0",
    ),
    "id 7 and id '7'": (json.dumps([{**ROWS[0], "id": 7}, {**ROWS[1], "id": "7"}]), "row 1: id '7' is already"),
    "answers in some rows only": (json.dumps([ROWS[0], without(ROWS[1], "answers")]), 'row 1: missing key "answers"'),
    "a row of JSON lines without question": (
        json.dumps(ROWS[0]) + "\n" + json.dumps(without(ROWS[1], "question")),
        'row 1: missing key "question"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name, tmp_path):
    content, message = REFUSED[name]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_squad_file(path, tmp_path / "cache")
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert list(tmp_path.rglob("*.arrow")) == []


def test_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: cannot be read: No such file or directory"):
        read_squad_file(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_squad_file(tmp_path)


def test_two_processes_at_once(tmp_path):
    """Both read the file, make features and find the same; what they write in turn is whole at any time."""
    source = tmp_path / "squad.json"
    source.write_text(json.dumps({"data": NESTED}))
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        results = pool.starmap(read_and_make, [(source, tmp_path / "cache")] * 6, chunksize=1)
    assert all(result == results[0] for result in results)


def read_and_make(source, cache_dir):
    examples = read_squad_file(source, cache_dir)
    features = make_train_features(examples, golden_tokenizer(), WindowSettings(), overwrite_cache=True)
    return examples[:], features[:]


# ----------------------------------------------------------------------------------------------------------------------
# A context is there once


def contracts(questions: int, length: int = 60_000) -> list[dict]:
    texts = ["the king " * (length // 9), "was born " * (length // 9)]
    return [
        {"id": str(i), "title": "", "context": texts[i % 2], "question": f"who {i}", "answers": NO_ANSWER}
        for i in range(questions)
    ]


CONTRACTS = {
    "nested": lambda rows: json.dumps(
        {
            "data": [
                {"paragraphs": [{"context": text, "qas": [without(row, "context", "title") for row in rows[i::2]]}]}
                for i, text in enumerate(dict.fromkeys(row["context"] for row in rows))
            ]
        }
    ),
    "flat": lambda rows: json.dumps(rows, indent=1),
    "json lines": lambda rows: "\n".join(json.dumps(row) for row in rows),
}


@pytest.mark.parametrize("layout", CONTRACTS)
def test_a_context_is_stored_once(layout, tmp_path):
    rows = contracts(200)
    examples = read_squad_file(write(tmp_path / "file", CONTRACTS[layout](rows)), tmp_path / "cache")
    assert sorted(examples.to_list(), key=lambda row: int(row["id"])) == rows
    assert Path(examples.cache_files[0]["filename"]).stat().st_size < 3 * 60_000
    some = examples.select([150, 3, 151])
    assert [row["context"] for row in some] == some["context"][:] == [examples[i]["context"] for i in (150, 3, 151)]


@pytest.mark.parametrize("layout", CONTRACTS)
def test_memory_does_not_grow_with_the_questions_on_a_context(layout, tmp_path):
    """Beyond the file itself, of which a layout in one JSON value is held as bytes and as text."""
    path = write(tmp_path / "file", CONTRACTS[layout](contracts(400, 100_000)))
    tracemalloc.start()
    read_squad_file(path, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = path.stat().st_size
    assert size > 20e6 or layout == "nested"
    assert peak < {"nested": 3e6, "json lines": 3e6, "flat": 2 * size + 3e6}[layout]


def test_distinct_texts():
    """Of rows selected, shuffled, joined, and of columns that hold each text once or once a row."""
    rng, rows = random.Random(0), [{"context": f"text {i % 7}", "n": i} for i in range(50)]
    plain = Dataset.from_list(rows)
    stored = plain.cast(Features({"context": STORED_FEATURES["context"], "n": Value("int64")}))
    chosen = [rng.randrange(50) for _ in range(20)]
    for change in (
        lambda dataset: dataset,
        lambda dataset: dataset.select(range(5, 9)),
        lambda dataset: dataset.select(chosen),
        lambda dataset: datasets.concatenate_datasets([dataset.select([4, 2]), dataset.select([3, 2, 40])]),
        lambda dataset: dataset.select([]),
    ):
        expected = [row["context"] for row in change(plain)]
        for dataset in (plain, stored):
            for part in (slice(None), slice(1, 3)):
                texts = distinct_texts(change(dataset), "context", part)
                assert [texts.distinct[i].as_py() for i in texts.row.tolist()] == expected[part]
                assert texts.distinct.to_pylist() == list(dict.fromkeys(expected[part]))


@pytest.mark.slow
def test_more_than_2_gb_of_texts(tmp_path):
    """What the 32-bit offsets of Arrow's strings cannot hold."""
    with open(tmp_path / "file", "w") as file:
        for i in range(22):
            row = {"id": str(i), "context": f"text {i} " + "a" * 100_000_000 + " king", "question": "who"}
            row["answers"] = [{"text": "king", "answer_start": len(row["context"]) - 4}]
            file.write(json.dumps(row) + "\n")
    examples = read_squad_file(tmp_path / "file", tmp_path / "cache")
    assert examples[21]["context"].startswith("text 21 ") and examples.select([20])["context"][0][:7] == "text 20"
    assert place_answers(examples, "file", "refuse")[1] == []
    assert len(distinct_texts(examples, "context").distinct) == 22


# ----------------------------------------------------------------------------------------------------------------------
# The hub, from its cache on disk


@pytest.fixture
def hub(tmp_path):
    def load(name="squad", config_name=None, files=None):
        return load_examples(name, config_name, files or {}, cache_dir=tmp_path / "datasets")

    return load


def test_hub_dataset(hub, tmp_path, monkeypatch):
    train = Dataset.from_list(ROWS, features=EXAMPLE_FEATURES)
    cache_dataset(tmp_path, "squad", "plain_text", {"train": train, "validation": train.select([1])})
    splits = hub()
    assert {name: split["id"][:] for name, split in splits.items()} == {"train": ["a", "b", "c"], "validation": ["b"]}
    assert splits["train"].to_list() == ROWS
    assert splits["train"].features == STORED_FEATURES
    assert [len(chunk.dictionary) for chunk in splits["train"].data.column("context").chunks] == [2]
    with monkeypatch.context() as patch:  # and is there for the next process
        patch.setattr(read_squad, "_conform_hub_table", None)
        assert hub()["train"].to_list() == ROWS
    assert hub(config_name="plain_text").keys() == splits.keys()
    own = write(tmp_path / "own.json", json.dumps(ROWS[2:]))
    splits = hub(files={"train": None, "validation": own, "test": own})
    assert [splits[name]["id"][:] for name in ("train", "validation", "test")] == [["a", "b", "c"], ["c"], ["c"]]


def test_hub_dataset_in_other_types(hub, tmp_path):
    """Columns in another order, more columns, no title, 64 bit starts: read. Features land beside the dataset."""
    features = Features(
        {
            "level": Value("int32"),
            "answers": {"answer_start": datasets.List(Value("int64")), "text": datasets.List(Value("string"))},
            "question": Value("string"),
            "context": Value("large_string"),
            "id": Value("string"),
        }
    )
    rows = [{**without(row, "title"), "level": 3} for row in ROWS]
    cache_dataset(tmp_path, "org/QaSet", "default", {"train": Dataset.from_list(rows, features=features)})
    train = hub("org/QaSet")["train"]
    assert train.to_list() == [{**row, "title": ""} for row in ROWS]
    make_train_features(train, golden_tokenizer(), WindowSettings())


def test_hub_dataset_without_answers(hub, tmp_path):
    test = Dataset.from_list([without(row, "answers") for row in ROWS])
    cache_dataset(tmp_path, "squad", "plain_text", {"test": test})
    assert "answers" not in hub()["test"].column_names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [without(row, "context") for row in rows],
            r'squad \(train\): no column "context"; found id, title',
        ),
        (lambda rows: [{**row, "answers": "king"} for row in rows], "its columns are not those of SQuAD"),
        (lambda rows: [{**row, "id": "same"} for row in rows], "id 'same' stands more than once"),
        (lambda rows: [rows[0], {**rows[1], "question": None}], 'row 1 has no value in column "question"'),
        (lambda rows: [rows[0], {**rows[1], "answers": None}], 'row 1 has no value in column "answers"'),
        (
            lambda rows: [rows[0], {**rows[1], "answers": {"text": ["x"], "answer_start": []}}],
            "row 1 has not as many answer_starts as answer texts",
        ),
        (
            lambda rows: [rows[0], {**rows[1], "answers": {"text": [None], "answer_start": [1]}}],
            'column "answers" has an answer without "text"',
        ),
    ],
)
def test_hub_dataset_that_does_not_fit(change, message, hub, tmp_path):
    cache_dataset(tmp_path, "squad", "plain_text", {"train": Dataset.from_list(change(ROWS))})
    with pytest.raises(ValueError, match=message) as error:
        hub()
    assert "\n" not in str(error.value)


def test_hub_dataset_that_is_not_there(hub, tmp_path):
    with pytest.raises(ValueError, match="--dataset_name squad: cannot be loaded .*OfflineModeIsEnabled") as error:
        hub()
    assert "\n" not in str(error.value)
    cache_dataset(tmp_path, "squad", "plain_text", {"train": Dataset.from_list(ROWS)})
    with pytest.raises(ValueError, match="--dataset_name squad: .* for config 'other'") as error:
        hub(config_name="other")
    assert "\n" not in str(error.value)
