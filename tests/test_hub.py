"""Models and datasets from a hub: names that have moved, what the cache serves, and each thing that can go wrong."""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from hub_cache import cache_dataset
from hub_server import GOOGLE_BASE, RELATIVE_BASE, RELATIVE_KEY, Hub, Repository, bert_weights, published, torch_file
from online import Outcome, Programs
from tiny import tiny_bert, tiny_questions

import run_squad
from qa.hub import loading
from qa.read_squad import EXAMPLE_FEATURES, load_examples

ROOT = Path(run_squad.__file__).parent
TOKEN = "hf_admitted"
WINDOWS = "--max_seq_length 64 --doc_stride 16".split()
ONE_STEP = "--do_train --max_steps 1".split()  # what the hub has was not trained to answer questions
OUR_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) |run_squad\.py: |ask\.py: ")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("anna lives in rome . ben lives in paris .")
    bert, questions = tiny_bert(folder / "bert"), tiny_questions(folder / "questions.json")
    return {"bert": bert, "questions": questions, "text": str(folder / "text.txt")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, inputs):
    """The published repositories; models that answer; both kinds behind a gate; and a model that nobody can load."""
    repositories = published(tmp_path_factory.mktemp("repositories"))
    trained = {path.name: path.read_bytes() for path in Path(inputs["bert"]).iterdir()}
    repositories["models", "somebody/no-settings"] = Repository(trained)
    repositories["models", "somebody/trained"] = Repository(trained | {"qa_settings.json": b'{"n_best_size": 2}'})
    repositories["models", "somebody/gated"] = Repository(trained, gated=True, admitted={TOKEN})
    squad = repositories["datasets", "rajpurkar/squad"].files
    repositories["datasets", "somebody/gated-squad"] = Repository(squad, gated=True, admitted={TOKEN})
    absolute = repositories["models", GOOGLE_BASE].files | {"pytorch_model.bin": torch_file(bert_weights(3), False)}
    del absolute["model.safetensors"]
    repositories["models", "somebody/absolute-bin"] = Repository(absolute)
    repositories["models", "somebody/no-config"] = Repository({"README.md": b"# Soon\n"})
    hub = Hub(repositories)
    hub.tokens |= {TOKEN, "hf_not_admitted"}
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def programs(hub, tmp_path_factory):
    programs = Programs(hub.environment(tmp_path_factory.mktemp("home")))
    assert programs.run("ask", "--help").status == 0  # all is imported
    yield programs
    programs.close()


def start(programs, inputs, folder: Path, kind: str, name: str, *flags: str) -> Path:
    """A run that loads the `kind` by this name; of run_squad.py, with a cache of its own in `folder`."""
    if kind == "ask":
        question = ["--context_file", inputs["text"], "--question", "who lives in rome ?", "--json"]
        return programs.start("ask", name, *question, *WINDOWS, *flags)
    model = name if kind == "model" else inputs["bert"]
    argv = ["--model_name_or_path", model, "--output_dir", folder / "out", "--cache_dir", folder / "cache", *ONE_STEP]
    argv += ["--dataset_name", name] if kind == "dataset" else ["--train_file", inputs["questions"]]
    argv += ["--tokenizer_name", name] if kind == "tokenizer" else []
    return programs.start("run_squad", *argv, *WINDOWS, *flags)


# ---- Errors ----

NOT_THERE = r"on the hub no (model|dataset) of that name, or it is private: check the name; .*`hf auth login`"
GATED = r"have accepted its terms: accept them at http\S+/(datasets/)?somebody/gated.*`hf auth login`.*--token"
UNKNOWN_TOKEN = "the hub does not know the token: say who you are"
WHAT = {
    "model": r"run_squad\.py: error: cannot load a configuration from {}: ",
    "tokenizer": r"run_squad\.py: error: cannot load a tokenizer from {}: ",
    "dataset": r"run_squad\.py: error: --dataset_name {}: cannot be loaded from the hub or its cache: ",
    "ask": r"ask\.py: error: cannot load a configuration from {}: ",
}
# What is loaded, its name, flags, and what the one line says; None where all is well
ONLINE = [
    ("model", "somebody/none", [], NOT_THERE),
    ("dataset", "none", [], NOT_THERE),
    ("dataset", "somebody/none", ["--token", TOKEN], NOT_THERE),
    ("dataset", "somebody/gated-squad", [], GATED),
    ("ask", "somebody/gated", [], GATED),
    ("model", "somebody/gated", ["--token", "hf_not_admitted"], GATED),
    ("tokenizer", "somebody/gated", ["--token", "hf_mistyped"], UNKNOWN_TOKEN),
    ("dataset", "somebody/gated-squad", ["--token", "hf_mistyped"], UNKNOWN_TOKEN),
    ("model", "somebody/gated", ["--token", TOKEN], None),
    ("dataset", "somebody/gated-squad", ["--token", TOKEN], None),
    ("model", "somebody/trained", ["--model_revision", "v9"], "on the hub it has no revision v9"),
    ("model", "somebody/no-config", [], "config.json"),
]
OUT_OF_REACH = [("model", GOOGLE_BASE), ("tokenizer", GOOGLE_BASE), ("dataset", "squad"), ("ask", GOOGLE_BASE)]


def check_loads(programs, inputs, folder: Path, cases: list[tuple], notes: int = 0) -> None:
    """All cases at once: each ends with status 2 and, after `notes` warnings, one line that names what and why."""
    started = [start(programs, inputs, folder / f"{i}", *case[:2], *case[2]) for i, case in enumerate(cases)]
    for outcome_folder, (kind, name, _, says) in zip(started, cases, strict=True):
        outcome = programs.outcome(outcome_folder)
        if says is None:
            assert outcome.status == 0, outcome.err
            continue
        assert (outcome.status, outcome.out) == (2, ""), outcome.err
        *warnings, line = outcome.lines
        assert re.match(WHAT[kind].format(name) + ".*" + says, line), outcome.err
        assert len(warnings) == notes and all("WARNING" in warning for warning in warnings), outcome.err


def test_what_the_hub_refuses_is_one_line(programs, inputs, tmp_path):
    check_loads(programs, inputs, tmp_path, ONLINE)


@pytest.mark.parametrize(("fault", "why"), [({"status": 500}, "500 Internal"), ({"stopped": True}, "refused")])
def test_a_hub_that_does_not_answer_is_one_line_where_the_cache_is_empty(fault, why, hub, programs, inputs, tmp_path):
    says = rf"the hub at {hub.url} does not answer \(.*{why}.*\), and the cache \(\S+\) does not hold all of it: give"
    with hub.fault(**fault):
        check_loads(programs, inputs, tmp_path, [(*case, [], says) for case in OUT_OF_REACH], notes=2)


def test_a_download_that_breaks_off_is_made_up_for_by_the_same_command(hub, programs, inputs, tmp_path):
    """Nothing of the half file stays, and the second run gets the right bytes."""
    cases = [  # what the error says, the file that breaks off, what is loaded
        ("a configuration from", "config.json", "model", RELATIVE_KEY),
        ("a tokenizer from", "tokenizer.json", "tokenizer", GOOGLE_BASE),
        ("a model from", "pytorch_model.bin", "model", RELATIVE_BASE),
        ("--dataset_name", "plain_text/validation-00000-of-00001.parquet", "dataset", "rajpurkar/squad"),
        ("qa_settings.json from", "qa_settings.json", "ask", "somebody/trained"),
    ]
    files = {id_: repository.files for (_, id_), repository in hub.repositories.items()}

    def outcomes():
        started = [start(programs, inputs, tmp_path / f"{i}", *case[2:]) for i, case in enumerate(cases)]
        return [programs.outcome(folder) for folder in started]

    with hub.fault(break_off={files[id_][file]: 9 for _, file, _, id_ in cases}):
        broken_off = outcomes()
    for (what, *_), outcome in zip(cases, broken_off, strict=True):
        assert outcome.status == 2 and outcome.out == "", outcome.err
        says = rf"error: .*{what}.*: the download broke off \(.*\): give the same command again"
        assert re.search(says, outcome.lines[-1]), outcome.err
    caches = [path for path in tmp_path.glob("*/cache/**/*") if path.is_file()]
    assert caches and not [path for path in caches if path.suffix == ".incomplete"]

    for outcome in outcomes():
        assert outcome.status == 0, outcome.err
    right = {hashlib.sha256(data).hexdigest() for r in hub.repositories.values() for data in r.files.values()}
    blobs = [path for path in tmp_path.glob("*/cache/models--*/blobs/*") if path.is_file()]
    blobs += [path for path in tmp_path.glob("*/cache/downloads/*") if re.fullmatch("[0-9a-f.]+", path.name)]
    assert len(blobs) > 8 and {hashlib.sha256(path.read_bytes()).hexdigest() for path in blobs} <= right


# ---- Names and the cache ----


def test_the_cache_serves_a_command_with_old_names_where_the_hub_does_not_answer(hub, programs, inputs, tmp_path):
    argv = ["--model_name_or_path", "bert-base-uncased", "--dataset_name", "squad", "--do_eval", *ONE_STEP, *WINDOWS]
    argv += ["--cache_dir", tmp_path / "cache"]
    hub.requests.clear()
    online = programs.run("run_squad", *argv, "--output_dir", tmp_path / "online")
    assert online.status == 0, online.err
    assert all(OUR_LINE.match(line) for line in online.lines)
    assert "WARNING" not in online.err and "HTTP Request" not in online.err
    assert any(path.startswith("/api/datasets/rajpurkar/squad") for path in hub.requests)
    assert not any(path.endswith((".h5", ".msgpack")) and "/resolve/" in path for path in hub.requests)
    for fault in ({"status": 503}, {"stopped": True}):
        hub.requests.clear()
        with hub.fault(**fault):
            cached = programs.run("run_squad", *argv, "--output_dir", tmp_path / "-".join(fault))
        assert cached.status == 0, cached.err
        assert cached.out.splitlines()[1:] == online.out.splitlines()[1:]  # of which the first is the time it took
        assert len(hub.requests) <= 5  # twice for each name; what does not answer is not asked for each file
        assert re.findall(r"WARNING (\S+): the hub at .* does not answer \(.*\): (.*)\.\n", cached.err) == [
            (name, then)
            for name in ("bert-base-uncased", "squad")
            for then in ("asking again in 1 s", "looking in the cache")
        ]


def cached_questions(folder: Path, name: str, ids: str) -> None:
    answers = {"text": ["a"], "answer_start": [0]}
    rows = [{"id": i, "title": "", "context": "a", "question": "?", "answers": answers} for i in ids]
    cache_dataset(folder, name, "plain_text", {"train": Dataset.from_list(rows, features=EXAMPLE_FEATURES)})


def test_offline_the_present_name_is_before_the_old_one_and_no_other_is_guessed(tmp_path):
    def ids(name: str) -> list[str]:
        return load_examples(name, None, {}, cache_dir=tmp_path / "datasets")["train"]["id"][:]

    for name in ("somebody/squad", "google/xquad", "somebody/xquad"):
        cached_questions(tmp_path, name, "own")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, .* it holds somebody/squad: give that name"):
        ids("squad")
    with pytest.raises(ValueError, match="it holds google/xquad and somebody/xquad: give that name"):
        ids("xquad")
    cached_questions(tmp_path, "squad", "old")  # as versions of datasets before 2.16 left it
    assert ids("squad") == list("old")
    cached_questions(tmp_path, "rajpurkar/squad", "new")
    assert ids("squad") == list("new")


def ask(programs, inputs, name: str, *flags: str) -> Outcome:
    return programs.outcome(start(programs, inputs, Path(), "ask", name, *flags))


def test_ask_takes_the_settings_that_came_with_the_model(hub, programs, inputs):
    online = ask(programs, inputs, "somebody/trained")
    assert (online.status, online.err) == (0, ""), online.err
    more = ask(programs, inputs, "somebody/trained", "--n_best_size", "20")
    assert len(json.loads(online.out)["n_best"]) <= 2 < len(json.loads(more.out)["n_best"])
    with hub.fault(stopped=True):
        cached = ask(programs, inputs, "somebody/trained")
    assert (cached.status, cached.out) == (0, online.out), cached.err
    assert all("WARNING" in line for line in cached.lines)


def test_ask_says_where_the_settings_are_not_known(hub, programs, inputs):
    """A cache without qa_settings.json: silent where the hub has said that there is none, else a warning."""
    name = "somebody/no-settings"
    says = f"The cache does not hold qa_settings.json of {name}: run_squad.py's defaults are taken."
    online = ask(programs, inputs, name)
    assert (online.status, online.err) == (0, "")
    with hub.fault(stopped=True):
        assert says not in ask(programs, inputs, name).err
        (known,) = Path(programs.home).glob("hub/models--somebody--no-settings/.no_exist/*/qa_settings.json")
        known.unlink()
        unsure = ask(programs, inputs, name)
    assert (unsure.status, unsure.out) == (0, online.out) and says in unsure.err


# ---- What is on the screen, and what leaves the machine ----


def test_downloads_show_bars():
    with loading("", str(ROOT), "model"):
        assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_nobody_is_asked_to_convert_a_model(hub, programs, inputs, tmp_path):
    """transformers would, in a thread, where there is pytorch_model.bin only."""
    hub.requests.clear()
    outcome = programs.outcome(start(programs, inputs, tmp_path, "model", "somebody/absolute-bin"))
    assert outcome.status == 0, outcome.err
    assert all(OUR_LINE.match(line) for line in outcome.lines)
    assert not [path for path in hub.requests if "/discussions" in path or "/commits" in path]
