"""The three published commands, as published (golden/published), and the recipes: parsed, and run against a hub that
holds small models and a small squad."""

import json
import os
import re
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
from hub_cache import cache_dataset, cache_model
from hub_server import RELATIVE_BASE, Hub, published
from tiny import PEOPLE, TOWNS, WORDS, tiny_bert, tiny_questions

from qa.legacy_flags import parse_flags, split_flags, translate_flags
from qa.read_squad import read_squad_file
from run_squad import DataTrainingArguments, ModelArguments, QATrainingArguments, main

ROOT = Path(__file__).parent.parent
BASE, LARGE = "train_base_relative_key_query.sh", "train_large_relative_key_query.sh"
# recipe -> batch, accumulation steps, batch in evaluation, tokens of a window
PUBLISHED = {BASE: (6, 1, 60, 512), LARGE: (2, 3, 6, 512), "train_large_absolute.sh": (3, 1, 3, 384)}
PUBLISHED_TEXT = ROOT / "tests" / "golden" / "published"
TRAIN_QUESTIONS, VALIDATION_QUESTIONS = 24, 6
# What may stand on the screen: the program's own lines and progress bars.
OUR_LINE = re.compile(
    r"\d\d:\d\d:\d\d INFO (?!HTTP Request)"
    r"|((Training|Answering|(train|validation) features \(\w+\)|Generating \w+ split): )? *\d+%\|.*\| \d+/\d+ \["
)


# ---- What they say ----

TORCHRUN_THAT_TELLS = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), *sys.argv[1:]]))
"""


def told_arguments(folder: Path, *command, **variables) -> list[str]:
    """CUDA_VISIBLE_DEVICES and the arguments that `command` gives to torchrun."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(TORCHRUN_THAT_TELLS)
    (folder / "bin" / "torchrun").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE")}
    environment = {**inherited, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    return json.loads(subprocess.check_output(command, cwd=folder, env=environment, text=True))


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_says_what_the_published_command_says_and_passes_flags_on(recipe, tmp_path):
    devices, processes, _, *flags = told_arguments(tmp_path, "bash", PUBLISHED_TEXT / recipe)
    ours = told_arguments(tmp_path, ROOT / "scripts" / recipe, "--seed", "7", "--run_name", "two words")
    assert ours[:2] == [devices, processes]
    assert os.path.samefile(tmp_path / ours[2], ROOT / "run_squad.py")
    todays, _ = translate_flags(split_flags([*flags, "--seed", "7", "--run_name", "two words"]))
    assert split_flags(ours[3:]) == todays


def test_a_recipe_takes_the_gpus_that_there_are(tmp_path):
    recipe = ROOT / "scripts" / BASE
    assert told_arguments(tmp_path, recipe, NPROC_PER_NODE="2")[:2] == ["0,1", "--nproc_per_node=2"]
    given = told_arguments(tmp_path, recipe, NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="5,6")  # by a scheduler
    assert given[:2] == ["5,6", "--nproc_per_node=2"]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_command_is_read_as_published(recipe, tmp_path):
    _, _, _, *flags = told_arguments(tmp_path, "bash", PUBLISHED_TEXT / recipe)
    (_, data, training), _ = parse_flags((ModelArguments, DataTrainingArguments, QATrainingArguments), flags)
    batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
    assert (*batches, training.per_device_eval_batch_size, data.max_seq_length) == PUBLISHED[recipe]
    assert (training.learning_rate, training.num_train_epochs, training.weight_decay) == (3e-5, 2, 0)
    assert training.do_train and training.do_eval and not training.do_predict
    assert (data.dataset_name, data.doc_stride) == ("squad", 128)


def test_all_recipes_are_here():
    recipes = {path.name for path in (ROOT / "scripts").glob("train_*.sh")}
    assert recipes == {*PUBLISHED, "train_contracts.sh", "train_made_relative.sh"}
    for recipe in recipes:
        assert os.access(ROOT / "scripts" / recipe, os.X_OK)
        assert re.match(r"#!/usr/bin/env bash\n# BERT", (ROOT / "scripts" / recipe).read_text())


# ---- What they do ----


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(published(tmp_path_factory.mktemp("hub"), TRAIN_QUESTIONS, VALIDATION_QUESTIONS))
    yield hub
    hub.stop()


def run_published_command(recipe: str, processes: int, folder: Path, environment: dict[str, str]) -> dict:
    """Runs it in `folder`, checks what stands on the screen and in its output_dir, and returns the scores."""
    text = (PUBLISHED_TEXT / recipe).read_text()
    (output_dir,) = re.findall(r"--output_dir (\S+)", text)
    text = text.replace("./examples/question-answering/run_squad.py", str(ROOT / "run_squad.py"))
    folder.mkdir(exist_ok=True)
    (folder / "command.sh").write_text(text.replace("--nproc_per_node=8", f"--nproc_per_node={processes}"))
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "command.sh"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not OUR_LINE.match(line)] == []

    printed = json.loads(done.stdout[done.stdout.rindex("{") :])
    assert list(printed) == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert printed["total"] == printed["HasAns_total"] == VALIDATION_QUESTIONS
    assert 0 <= printed["exact"] <= printed["f1"] <= 100
    assert done.stdout.count('"f1"') == 1  # one process prints

    def saved(name: str) -> dict:
        return json.loads((folder / output_dir / name).read_text())

    assert saved("eval_results.json")["eval_f1"] == printed["f1"]
    position_type = saved("config.json").get("position_embedding_type", "absolute")
    assert re.fullmatch(f"train_(base|large)_{position_type}.sh", recipe)
    # One question is one window here; all processes together make a batch.
    batch, accumulation, *_ = PUBLISHED[recipe]
    steps_per_epoch = ceil(ceil(TRAIN_QUESTIONS / (processes * batch)) / accumulation)
    assert saved("trainer_state.json")["global_step"] == 2 * steps_per_epoch
    return printed


def test_a_published_command_runs_online(tmp_path, hub):
    run_published_command(LARGE, 2, tmp_path, hub.environment(tmp_path / "home"))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "processes"), [(BASE, 2), ("train_large_absolute.sh", 2), (LARGE, 8)])
def test_a_published_command_runs_again_offline_with_the_same_scores(recipe, processes, tmp_path, hub):
    home = tmp_path / "home"
    printed = run_published_command(recipe, processes, tmp_path / "online", hub.environment(home))
    hub.stop()
    try:
        environment = hub.environment(home, HF_HUB_OFFLINE="1")
        assert run_published_command(recipe, processes, tmp_path / "offline", environment) == printed
    finally:
        hub.start()


@pytest.mark.slow
def test_a_published_command_runs_with_a_cache_that_older_versions_of_datasets_have_filled(tmp_path, hub):
    splits = {}
    for split, questions in (("train", TRAIN_QUESTIONS), ("validation", VALIDATION_QUESTIONS)):
        file = tiny_questions(tmp_path / f"{split}.json", paragraphs=questions // 2)
        splits[split] = read_squad_file(file, cache_dir=str(tmp_path / "cache"))
    cache_dataset(tmp_path / "home", "squad", "plain_text", splits)
    model = Path(tiny_bert(tmp_path / "made", "relative_key_query", max_positions=512))
    cache_model(tmp_path / "home", RELATIVE_BASE, model)
    run_published_command(BASE, 2, tmp_path / "run", hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1"))


def write_contracts(file: Path, contracts: int) -> str:
    """CUAD's shape: a long text, questions that all contracts share, answers that are clauses, many without one."""
    questions = ["where does anna live ?", "who lives in rome ?", "does the baker live in paris or berlin ?"]
    data = []
    for c in range(contracts):
        words = [(PEOPLE + TOWNS + WORDS)[(c + i * i) % 40] for i in range(1500)]
        context, qas = " ".join(words), []
        for q, question in enumerate(questions):
            first = 100 + 300 * q
            answer = " ".join(words[first : first + (5, 300)[q % 2]])
            gold = {"text": answer, "answer_start": len(" ".join(words[:first])) + 1}
            impossible = (c + q) % 3 == 2
            answers = {"answers": [] if impossible else [gold], "is_impossible": impossible}
            qas.append({"id": f"{file.stem} {c} {q}", "question": question, **answers})
        data.append({"title": f"contract {c}", "paragraphs": [{"context": context, "qas": qas}]})
    file.write_text(json.dumps({"version": "aok_v1.0", "data": data}))
    return str(file)


def test_the_recipe_for_contracts_runs(tmp_path, capsys):
    _, processes, _, *flags = told_arguments(tmp_path, ROOT / "scripts" / "train_contracts.sh", "--seed", "7")
    assert processes == "--nproc_per_node=8" and flags[-2:] == ["--seed", "7"]
    flags += ["--model_name_or_path", tiny_bert(tmp_path / "bert", max_positions=512)]
    flags += ["--train_file", write_contracts(tmp_path / "train_separate_questions.json", 3)]
    flags += ["--validation_file", write_contracts(tmp_path / "test.json", 2), "--output_dir", str(tmp_path / "out")]
    main([*flags, "--num_train_epochs", "1", "--negative_windows", "0.5"])
    out, err = capsys.readouterr()
    printed = json.loads(out[out.rindex("{") :])
    assert (printed["total"], printed["HasAns_total"], printed["NoAns_total"]) == (6, 4, 2)
    assert "best_f1" in printed and "Train: 9 questions, " in err
    assert re.search(r"Train: 2 of 6 \(33.3%\) answers are longer than --max_answer_length 250 ", err)
    assert "Validation: 6 of 6 (100.0%) questions have a context longer than one window." in err
    hold, others, kept = map(int, re.search(r"(\d+) hold an answer; of the (\d+) others (\d+) are", err).groups())
    assert hold > 0 and kept == round(others / 2)
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_samples"] == hold + kept


@pytest.mark.slow
def test_the_recipe_that_makes_a_model_relative_runs_on_two_processes(tmp_path, hub):
    environment = hub.environment(tmp_path / "home", NPROC_PER_NODE="2")
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [ROOT / "scripts" / "train_made_relative.sh", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"made_relative{end}/eval_results.json").read_text()) for end in ("", "_squad")]
    assert "eval_layer_1" in results[0] and results[1]["eval_total"] == VALIDATION_QUESTIONS
    config = json.loads((tmp_path / "made_relative_squad" / "config.json").read_text())
    assert config["position_embedding_type"] == "relative_key_query"
