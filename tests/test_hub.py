"""Models and datasets from a hub: names that have moved, what the cache serves, and each thing that can go wrong."""

import hashlib
import json
import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from hub_cache import cache_dataset
from hub_server import (
    GOOGLE_BASE,
    RELATIVE_BASE,
    RELATIVE_KEY,
    Hub,
    Repository,
    bert_weights,
    google_bert,
    published,
    squad,
    torch_file,
)
from online import Programs
from tiny import tiny_bert, tiny_questions

import run_squad
from qa import processes
from qa.read_squad import EXAMPLE_FEATURES, load_examples

ROOT = Path(run_squad.__file__).parent
VALIDATION = "plain_text/validation-00000-of-00001.parquet"
TOKEN = "hf_admitted"
WINDOWS = "--max_seq_length 64 --doc_stride 16".split()
OUR_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) |run_squad\.py: |ask\.py: ")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("anna lives in rome . ben lives in paris .")
    return {
        "bert": tiny_bert(folder / "bert"),
        "questions": tiny_questions(folder / "questions.json"),
        "text": str(folder / "text.txt"),
    }


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, inputs):
    """The published repositories; a model that answers; and both kinds behind a gate."""
    folder = tmp_path_factory.mktemp("repositories")
    repositories = published(folder)
    trained = files_of(inputs["bert"]) | {"qa_settings.json": b'{"n_best_size": 2}'}
    repositories["models", "somebody/trained"] = Repository(trained)
    for seed in (2, 3):
        other = files_of(tiny_bert(folder / "bert", seed=seed)) | {"qa_settings.json": b'{"n_best_size": %d}' % seed}
        repositories["models", f"somebody/trained-{seed}"] = Repository(other)
    repositories["models", "somebody/gated"] = Repository(trained, gated=True, admitted={TOKEN})
    gated = squad(folder, "plain_text", False, 4, 4)
    gated.gated, gated.admitted = True, {TOKEN}
    repositories["datasets", "somebody/gated-squad"] = gated
    plain = google_bert(with_tokenizer_json=False).files
    plain["pytorch_model.bin"] = torch_file(bert_weights("absolute"), legacy=False)
    del plain["model.safetensors"]
    repositories["models", "somebody/absolute-bin"] = Repository(plain)
    hub = Hub(repositories)
    hub.tokens |= {TOKEN, "hf_not_admitted"}
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def programs(hub, tmp_path_factory):
    programs = Programs(hub.environment(tmp_path_factory.mktemp("home")))
    yield programs
    programs.close()


def model_flags(inputs, name: str) -> list[str]:
    return ["--model_name_or_path", name, "--validation_file", inputs["questions"], "--do_eval", *WINDOWS]


def tokenizer_flags(inputs, name: str) -> list[str]:
    return [*model_flags(inputs, inputs["bert"]), "--tokenizer_name", name]


def dataset_flags(inputs, name: str) -> list[str]:
    return ["--model_name_or_path", inputs["bert"], "--dataset_name", name, "--do_eval", *WINDOWS]


def start_each(programs, inputs, folder: Path, model: str, dataset: str, *flags: str) -> dict[str, Path]:
    """A run for each thing that comes from the hub, each with a cache of its own."""
    started = {}
    for kind, argv in [
        ("configuration", model_flags(inputs, model)),
        ("tokenizer", tokenizer_flags(inputs, model)),
        ("dataset", dataset_flags(inputs, dataset)),
    ]:
        own = ["--output_dir", folder / kind / "out", "--cache_dir", folder / kind / "cache"]
        started[kind] = programs.start("run_squad", *argv, *own, *flags)
    ask = [model, "--context_file", inputs["text"], "--question", "who lives in rome ?", *WINDOWS]
    started["ask"] = programs.start("ask", *ask)
    return started


WHAT = {
    "configuration": "run_squad.py: error: cannot load a configuration from {model}: ",
    "tokenizer": "run_squad.py: error: cannot load a tokenizer from {model}: ",
    "dataset": "run_squad.py: error: --dataset_name {dataset}: cannot be loaded from the hub or its cache: ",
    "ask": "ask.py: error: cannot load a configuration from {model}: ",
}


def check_each(programs, started, model: str, dataset: str, says: str, notes: int = 0) -> None:
    """Each ends with status 2 and one line that names the thing and `says`, after `notes` lines of ours."""
    for kind, folder in started.items():
        outcome = programs.outcome(folder)
        assert (outcome.status, outcome.out) == (2, ""), outcome.err
        assert len(outcome.lines) == notes + 1, outcome.err
        assert outcome.lines[-1].startswith(WHAT[kind].format(model=model, dataset=dataset)), outcome.err
        assert re.search(says, outcome.lines[-1]), outcome.err
        assert all(OUR_LINE.match(line) for line in outcome.lines)
        assert outcome.seconds < 30


# ---- Errors ----


def test_what_is_not_there(programs, inputs, tmp_path):
    started = start_each(programs, inputs, tmp_path, "somebody/none", "none")
    says = r"on the hub no (model|dataset) of that name, or it is private: check the name; .*`hf auth login`"
    check_each(programs, started, "somebody/none", "none", says)
    started = start_each(programs, inputs, tmp_path / "token", "none", "somebody/none", "--token", TOKEN)
    del started["ask"]
    check_each(programs, started, "none", "somebody/none", says)


def test_what_is_gated(hub, programs, inputs, tmp_path):
    model, dataset = "somebody/gated", "somebody/gated-squad"
    says = rf"have accepted its terms: accept them at {hub.url}/(datasets/)?somebody/gated.*`hf auth login`.*--token"
    check_each(programs, start_each(programs, inputs, tmp_path / "a", model, dataset), model, dataset, says)
    flags = ["--token", "hf_not_admitted"]
    started = start_each(programs, inputs, tmp_path / "b", model, dataset, *flags)
    del started["ask"]
    check_each(programs, started, model, dataset, says)
    started = start_each(programs, inputs, tmp_path / "c", model, dataset, "--token", "hf_mistyped")
    del started["ask"]
    check_each(programs, started, model, dataset, "the hub does not know the token")
    started = start_each(programs, inputs, tmp_path / "d", model, dataset, "--token", TOKEN)
    del started["ask"]
    for folder in started.values():
        assert programs.outcome(folder).status == 0, programs.outcome(folder).err


def test_a_revision_that_is_not_there(programs, inputs, tmp_path):
    argv = [*model_flags(inputs, "somebody/trained"), "--output_dir", tmp_path, "--model_revision", "v9"]
    outcome = programs.run("run_squad", *argv)
    assert outcome.status == 2
    (line,) = outcome.lines
    assert "cannot load a configuration from somebody/trained: on the hub it has no revision v9" in line


def test_a_hub_that_cannot_be_reached(hub, programs, inputs, tmp_path):
    programs.run("ask", "--help")  # so that all is imported before the hub goes
    hub.stop()
    try:
        started = start_each(programs, inputs, tmp_path, GOOGLE_BASE, "squad")
        says = rf"the hub at {hub.url} cannot be reached .*refused.*: check the network"
        check_each(programs, started, GOOGLE_BASE, "squad", says, notes=3)
    finally:
        hub.start()


def test_a_hub_that_is_out_of_order(hub, programs, inputs, tmp_path):
    with hub.fault(status=500):
        started = start_each(programs, inputs, tmp_path, GOOGLE_BASE, "squad")
        says = rf"the hub at {hub.url} answers 500 Internal Server Error, .*: try again later"
        check_each(programs, started, GOOGLE_BASE, "squad", says, notes=3)


def test_a_download_that_breaks_off_is_made_up_for_by_the_same_command(hub, programs, inputs, tmp_path):
    """Nothing of the half file stays, and the second run gets the right bytes."""
    ask = ["--context_file", inputs["text"], "--question", "who ?", *WINDOWS]
    cases = [  # what the error says, the file that breaks off, the command
        ("a configuration from", RELATIVE_KEY, "config.json", model_flags(inputs, RELATIVE_KEY)),
        ("a tokenizer from", GOOGLE_BASE, "tokenizer.json", tokenizer_flags(inputs, GOOGLE_BASE)),
        ("a model from", RELATIVE_BASE, "pytorch_model.bin", model_flags(inputs, RELATIVE_BASE)),
        ("--dataset_name squad: ", "rajpurkar/squad", VALIDATION, dataset_flags(inputs, "squad")),
        ("a model from", "somebody/trained-2", "model.safetensors", ["somebody/trained-2", *ask]),
        ("qa_settings.json from", "somebody/trained-3", "qa_settings.json", ["somebody/trained-3", *ask]),
    ]
    files = {id_: repository.files for (_, id_), repository in hub.repositories.items()}
    commands = []
    for i, (*_, argv) in enumerate(cases):
        own = ["--output_dir", tmp_path / "out" / str(i), "--cache_dir", tmp_path / "cache" / str(i)]
        commands.append(["ask", *argv] if argv[0].startswith("somebody/") else ["run_squad", *argv, *own])
    with hub.fault(break_off={files[id_][file]: 9 for _, id_, file, _ in cases}):
        started = [programs.start(*command) for command in commands]
        outcomes = [programs.outcome(folder) for folder in started]
    for (what, *_), outcome in zip(cases, outcomes, strict=True):
        assert outcome.status == 2 and outcome.out == "", outcome.err
        assert re.search(r"error: .*the download broke off \(.*\): give the same command again", outcome.lines[-1])
        assert what in outcome.lines[-1]
    caches = [path for path in tmp_path.glob("cache/**/*") if path.is_file()]
    assert caches and not [path for path in caches if path.suffix == ".incomplete"]

    for folder in [programs.start(*command) for command in commands]:
        outcome = programs.outcome(folder)
        assert outcome.status == 0, outcome.err
    right = {hashlib.sha256(data).hexdigest() for r in hub.repositories.values() for data in r.files.values()}
    blobs = [path for path in tmp_path.glob("cache/*/models--*/blobs/*") if path.is_file()]
    blobs += [path for path in tmp_path.glob("cache/*/downloads/*") if re.fullmatch("[0-9a-f.]+", path.name)]
    assert len(blobs) > 8 and {hashlib.sha256(path.read_bytes()).hexdigest() for path in blobs} <= right


# ---- Names and the cache ----


def cached_questions(folder: Path, name: str, ids: str) -> None:
    rows = [{"id": i, "title": "", "context": "a", "question": "?", "answers": ANSWERS} for i in ids]
    cache_dataset(folder, name, "plain_text", {"train": Dataset.from_list(rows, features=EXAMPLE_FEATURES)})


ANSWERS = {"text": ["a"], "answer_start": [0]}


@pytest.mark.parametrize("fault", [{"status": 503}, "stopped"])
def test_what_the_cache_holds_serves_where_the_hub_does_not(fault, hub, programs, inputs, tmp_path):
    """The whole command, by names that the hub redirects, with the cache's own answers."""
    argv = ["--model_name_or_path", "bert-base-uncased", "--dataset_name", "squad", "--do_eval", *WINDOWS]
    argv += ["--cache_dir", tmp_path / "cache"]
    online = programs.run("run_squad", *argv, "--output_dir", tmp_path / "online")
    assert online.status == 0, online.err
    assert all(OUR_LINE.match(line) for line in online.lines)
    assert "WARNING" not in online.err and "HTTP Request" not in online.err
    asked = [path for _, path, _ in hub.requests]
    assert any(path.startswith("/api/datasets/rajpurkar/squad") for path in asked)
    assert not any(path.endswith((".h5", ".msgpack")) and "/resolve/" in path for path in asked)
    if fault == "stopped":
        hub.stop()
    try:
        with hub.fault(**({} if fault == "stopped" else fault)):
            cached = programs.run("run_squad", *argv, "--output_dir", tmp_path / "cached")
    finally:
        if fault == "stopped":
            hub.start()
    assert (cached.status, cached.out) == (0, online.out), cached.err
    warnings = [line[9:] for line in cached.lines if "WARNING" in line]
    assert [re.sub(":.*", "", line) for line in warnings] == [
        "WARNING Asking again in 1 s",
        "WARNING Asking again in 4 s",
        *2 * ["WARNING Looking for bert-base-uncased in the cache"],  # configuration and tokenizer
        "WARNING Looking for squad in the cache",
        "WARNING Looking for bert-base-uncased in the cache",
    ]
    assert cached.seconds < 30


def test_a_name_without_a_network(tmp_path):
    """The folder that an older datasets has filled under the plain name serves, but what the hub has said is first."""

    def ids():
        return load_examples("squad", None, {}, cache_dir=tmp_path / "datasets")["train"]["id"][:]

    cached_questions(tmp_path, "rajpurkar/squad", "new")
    cached_questions(tmp_path, "somebody/squad", "own")
    with pytest.raises(ValueError, match="does not hold all of it. There is rajpurkar/squad and somebody/squad: give"):
        ids()
    cached_questions(tmp_path, "squad", "old")
    assert ids() == list("old")
    (tmp_path / "datasets" / "hub_names").mkdir()
    (tmp_path / "datasets" / "hub_names" / "squad").write_text("rajpurkar/squad")
    assert ids() == list("new")
    (tmp_path / "datasets" / "hub_names" / "squad").write_text("rajpurkar/squad-that-is-gone")
    assert ids() == list("old")


def test_a_folder_is_no_name(programs, inputs, tmp_path):
    """A folder of files given as a dataset is read without a word to the hub."""
    folder = tmp_path / "folder"
    folder.mkdir()
    cached_questions(tmp_path, "squad", "abc")
    load_examples("squad", None, {}, cache_dir=tmp_path / "datasets")["train"].to_parquet(folder / "validation.parquet")
    outcome = programs.run("run_squad", *dataset_flags(inputs, str(folder)), "--output_dir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["total"] == 3


# ---- ask.py ----


def test_ask_by_a_name_on_the_hub(hub, programs, inputs):
    argv = ["somebody/trained-2", "--context_file", inputs["text"], "--question", "who ?", "--json", *WINDOWS]
    outcome = programs.run("ask", *argv)
    assert (outcome.status, outcome.err) == (0, ""), outcome.err
    more = programs.run("ask", *argv, "--n_best_size", "20")
    assert len(json.loads(outcome.out)["n_best"]) <= 2 < len(json.loads(more.out)["n_best"])
    hub.stop()
    try:
        again = programs.run("ask", *argv)
    finally:
        hub.start()
    assert (again.status, again.out) == (0, outcome.out), again.err
    assert all("WARNING" in line for line in again.lines)


def test_ask_says_that_it_does_not_know_the_settings(hub, programs, inputs):
    """A cache without qa_settings.json: silent where the hub has said that there is none, else a warning."""
    argv = ["somebody/no-settings", "--context_file", inputs["text"], "--question", "who ?", "--json", *WINDOWS]
    trained = hub.repositories["models", "somebody/trained"].files
    hub.repositories["models", "somebody/no-settings"] = Repository(
        {name: data for name, data in trained.items() if name != "qa_settings.json"}
    )
    says = "The cache does not hold qa_settings.json of somebody/no-settings: run_squad.py's defaults are taken."
    online = programs.run("ask", *argv)
    assert (online.status, online.err) == (0, "")
    with hub.fault(status=500):
        assert says not in programs.run("ask", *argv).err
    (known,) = Path(programs.home).glob("hub/models--somebody--no-settings/.no_exist/*/qa_settings.json")
    known.unlink()
    with hub.fault(status=500):
        unsure = programs.run("ask", *argv)
    assert (unsure.status, unsure.out) == (0, online.out)
    assert says in unsure.err


# ---- What is on the screen ----


@pytest.fixture
def logging_as_it_was():
    yield
    for name in (*processes.OUR_LOGGERS, "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)


def reaches_root(name: str) -> bool:
    """Whether what a logger says comes to the screen; wandb's, for one, says everything, and to its own file."""
    logger = logging.getLogger(name)
    while logger.parent is not None and logger.propagate:
        logger = logger.parent
    return logger is logging.root


def test_only_this_program_speaks_below_a_warning(logging_as_it_was):
    processes.set_up_logging(logging.INFO)
    ours = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("qa/*.py"), *ROOT.glob("scripts/*.py")]:
        for name in re.findall(r"logging\.getLogger\((.*)\)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if name in ("__name__", '"run_squad"'):
                ours.add(path.relative_to(ROOT).with_suffix("").parts[0] if name == "__name__" else "run_squad")
    assert ours == set(processes.OUR_LOGGERS)
    assert all(logging.getLogger(name).isEnabledFor(logging.INFO) for name in ours)
    libraries = [name for name in logging.root.manager.loggerDict if name.split(".")[0] not in ours]
    assert len(libraries) > 100
    for name in [*libraries, "httpx2", "a_library_of_tomorrow"]:
        assert not (logging.getLogger(name).isEnabledFor(logging.INFO) and reaches_root(name)), name
    processes.set_up_logging(logging.ERROR)  # on the other processes
    for name in (*ours, "huggingface_hub", "a_library_of_tomorrow"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING), name


def test_nobody_is_asked_to_convert_a_model(hub, programs, inputs, tmp_path):
    """transformers would, in a thread, where there is pytorch_model.bin only."""
    argv = [*model_flags(inputs, "somebody/absolute-bin"), "--output_dir", tmp_path]
    outcome = programs.run("run_squad", *argv)
    assert outcome.status == 0, outcome.err
    assert all(OUR_LINE.match(line) for line in outcome.lines)
    assert not [path for _, path, _ in hub.requests if "/discussions" in path or "/commits" in path]
