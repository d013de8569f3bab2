"""Questions from files and from the hub's cache on disk: how they are kept, each context once."""

import json
import multiprocessing
import random
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Split, Value
from hub_cache import cache_dataset
from tiny import NO_ANSWER

from qa import read_squad
from qa.columns import column, distinct_texts, write_arrow
from qa.files import QAError
from qa.layouts import NO_START
from qa.read_squad import EXAMPLE_FEATURES, STORED_FEATURES, load_examples, read_squad_file


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


KING = {"text": ["The king", "king"], "answer_start": [0, 4]}
ROWS = [
    {"id": "a", "title": "Kings", "context": "The king was born.", "question": "Who?", "answers": KING},
    {"id": "b", "title": "Kings", "context": "The king was born.", "question": "What?", "answers": NO_ANSWER},
    {"id": "c", "title": "Ünïcode 😀", "context": "Élan.", "question": "?", "answers": NO_ANSWER},
]


def without(item: dict, *keys: str) -> dict:
    return {key: value for key, value in item.items() if key not in keys}


def write(path: Path, rows) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_files_are_kept_by_their_content_and_by_the_code_that_reads_them(tmp_path, monkeypatch):
    path, copy = write(tmp_path / "file", ROWS), write(tmp_path / "copy", ROWS)
    read_squad_file(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(read_squad, "_to_table", None)
        assert read_squad_file(copy, tmp_path / "cache").to_list() == ROWS
        patch.setattr(read_squad, "READER", "another")
        with pytest.raises(TypeError):
            read_squad_file(copy, tmp_path / "cache")
    write(path, [{**row, "question": "Why?"} for row in ROWS])
    assert read_squad_file(path, tmp_path / "cache")["question"][:] == ["Why?"] * 3


def test_two_processes_read_a_file_at_once(tmp_path):
    path = write(tmp_path / "file", ROWS)
    tasks = [(path, tmp_path / f"cache {number // 2}") for number in range(16)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.starmap(read_rows, tasks, chunksize=1)
    assert results == [ROWS] * 16


def read_rows(path: Path, cache: Path) -> list[dict]:
    return read_squad_file(path, cache).to_list()


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    def tables():
        yield pa.table({"id": ["a"]})
        raise OSError(28, "No space left on device")

    with pytest.raises(QAError, match="cannot write .*x.arrow: No space left on device"):
        write_arrow(str(tmp_path / "cache" / "x.arrow"), Features({"id": Value("string")}), tables())
    assert list((tmp_path / "cache").iterdir()) == []


# ---- A context is there once ----


def contracts(questions: int, length: int) -> list[dict]:
    texts = ["the king " * (length // 9), "was born " * (length // 9)]
    common = {"title": "", "answers": NO_ANSWER}
    return [{"id": str(i), "context": texts[i % 2], "question": f"who {i}", **common} for i in range(questions)]


def as_parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, EXAMPLE_FEATURES.arrow_schema), sink)
    return sink.getvalue().to_pybytes()


FORMS = {
    "JSON": lambda rows: json.dumps(rows).encode(),
    "indented JSON": lambda rows: json.dumps(rows, indent=1).encode(),
    "JSON lines": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "Parquet": as_parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_context_is_stored_once_and_memory_does_not_grow_with_its_questions(form, tmp_path):
    """Beyond the file itself: the text of one JSON value is held, and its bytes while they are decoded."""
    rows = contracts(200, 100_000)
    content = FORMS[form](rows)
    (tmp_path / "file").write_bytes(content)
    tracemalloc.start()
    examples = read_squad_file(tmp_path / "file", tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows_held = 0 if form == "JSON lines" else 20e6 if form == "Parquet" else 2 * len(content)
    assert peak < rows_held + 3e6
    assert Path(examples.cache_files[0]["filename"]).stat().st_size < 3 * 100_000
    assert examples.to_list() == rows
    some = examples.select([150, 3, 151])
    assert some["context"][:] == [rows[i]["context"] for i in (150, 3, 151)]


def test_distinct_texts_and_columns():
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
            assert column(change(dataset), "n").to_pylist() == [row["n"] for row in change(plain)]
            for part in (slice(None), slice(1, 3)):
                texts = distinct_texts(change(dataset), "context", part)
                assert [texts.distinct[i].as_py() for i in texts.row.tolist()] == expected[part]
                assert texts.distinct.type == pa.large_string()  # whose texts may be more than 2 GB
                assert texts.distinct.to_pylist() == list(dict.fromkeys(expected[part]))


# ---- The hub, from its cache on disk ----


@pytest.fixture
def hub(tmp_path):
    """Puts the rows into the hub's cache, if they are given, and loads the dataset."""

    def load(rows=None, name="squad", config_name=None, files=None, features=None):
        if rows is not None:
            train = Dataset.from_list(rows, features=features)
            cache_dataset(tmp_path, name, "plain_text", {"train": train, "validation": train.select([0])})
        return load_examples(name, config_name, files or {}, cache_dir=tmp_path / "datasets")

    return load


def test_hub_dataset(hub, tmp_path, monkeypatch):
    splits = hub(ROWS)
    assert {name: split["id"][:] for name, split in splits.items()} == {"train": ["a", "b", "c"], "validation": ["a"]}
    assert splits["train"].to_list() == ROWS and splits["train"].features == STORED_FEATURES
    assert "datasets" in splits["train"].cache_files[0]["filename"]  # whose folder the features go to
    with monkeypatch.context() as patch:  # and is there for the next process
        patch.setattr(read_squad, "_to_table", None)
        assert hub(config_name="plain_text")["train"].to_list() == ROWS
    own = write(tmp_path / "own.json", ROWS[2:])
    splits = hub(files={"train": None, "validation": own, "test": own})
    assert [splits[name]["id"][:] for name in ("train", "validation", "test")] == [["a", "b", "c"], ["c"], ["c"]]


def test_hub_dataset_in_another_layout_without_ids_and_starts(hub):
    """All that is read from Parquet is read from the hub."""
    question = {"question": "?", "answers": ["king"]}
    train = hub([{"title": "Kings", "paragraphs": [{"context": "The king", "qas": [question]}]}])["train"]
    answers = {"text": ["king"], "answer_start": [NO_START]}
    context = {"title": "Kings", "context": "The king"}
    assert train.to_list() == [{"id": "row 0.paragraphs[0].qas[0]", **context, "question": "?", "answers": answers}]


def test_folders_of_save_to_disk(hub, tmp_path):
    rows = Dataset.from_list(ROWS)
    part = Dataset(rows.data, split=Split("validation[:3]"))  # as load_dataset(split="validation[:3]") names it
    saved = {"train": rows, "validation": part, "train test": DatasetDict(train=rows, test=rows)}
    for splits, dataset in saved.items():
        folder = tmp_path / splits
        dataset.save_to_disk(folder)
        before = sorted(folder.rglob("*"))
        found = hub(name=str(folder))
        assert " ".join(found) == splits and [split.to_list() for split in found.values()] == [ROWS] * len(found)
        assert sorted(folder.rglob("*")) == before  # which is the user's
    Dataset.from_list(ROWS[2:]).save_to_disk(tmp_path / "train")
    assert hub(name=str(tmp_path / "train"))["train"].to_list() == ROWS[2:]
    (tmp_path / "train" / "dataset_info.json").unlink()
    with pytest.raises(QAError, match="--dataset_name .*train: cannot be loaded .* is neither a `Dataset` directory"):
        hub(name=str(tmp_path / "train"))


def test_a_hub_dataset_is_not_read_as_an_earlier_one(hub, tmp_path):
    hub(ROWS)
    (kept,) = (tmp_path / "datasets").rglob("squad-train.arrow")
    kept.unlink()
    assert hub(ROWS[2:])["train"]["id"][:] == ["c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [without(ROWS[0], "context")],
            r"squad \(train\): its columns: missing key .* found \['id', 'title', 'question'",
        ),
        ([ROWS[0], {**ROWS[1], "question": None}], "row 1.question: must be a string, is None"),
    ],
)
def test_hub_dataset_that_does_not_fit(rows, message, hub):
    with pytest.raises(QAError, match=message) as error:
        hub(rows)
    assert "\n" not in str(error.value)


def test_hub_dataset_that_is_not_there(hub):
    with pytest.raises(QAError, match="--dataset_name squad: cannot be loaded .*HF_HUB_OFFLINE is set") as error:
        hub()
    assert "\n" not in str(error.value)
    with pytest.raises(QAError, match="--dataset_name squad: .* for config 'other'") as error:
        hub(ROWS, config_name="other")
    assert "\n" not in str(error.value)
