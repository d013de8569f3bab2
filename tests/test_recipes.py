"""The three published commands, as published, against a hub that holds small models and a small squad."""

import json
import os
import re
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
from hub_cache import cache_dataset, cache_model
from hub_server import Hub, published
from tiny import PEOPLE, TOWNS, WORDS, tiny_bert, tiny_questions

from qa.read_squad import read_squad_file

ROOT = Path(__file__).parent.parent
TRAIN_QUESTIONS, VALIDATION_QUESTIONS = 24, 6

# recipe -> (position type, train batch, accumulation steps, output_dir, the published text)
PUBLISHED = {
    "train_base_relative_key_query.sh": (
        "relative_key_query",
        6,
        1,
        "relative_squad",
        r"""export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
torchrun --nproc_per_node=8 ./examples/question-answering/run_squad.py \
    --model_name_or_path zhiheng-huang/bert-base-uncased-embedding-relative-key-query \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 512 \
    --doc_stride 128 \
    --output_dir relative_squad \
    --per_device_eval_batch_size=60 \
    --per_device_train_batch_size=6
""",
    ),
    "train_large_relative_key_query.sh": (
        "relative_key_query",
        2,
        3,
        "relative_squad",
        r"""export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
torchrun --nproc_per_node=8 ./examples/question-answering/run_squad.py \
    --model_name_or_path zhiheng-huang/bert-large-uncased-whole-word-masking-embedding-relative-key-query \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 512 \
    --doc_stride 128 \
    --output_dir relative_squad \
    --per_gpu_eval_batch_size=6 \
    --per_gpu_train_batch_size=2 \
    --gradient_accumulation_steps 3
""",
    ),
    "train_large_absolute.sh": (
        "absolute",
        3,
        1,
        "examples/models/wwm_uncased_finetuned_squad",
        r"""torchrun --nproc_per_node=8 ./examples/question-answering/run_squad.py \
    --model_name_or_path google-bert/bert-large-uncased-whole-word-masking \
    --dataset_name squad \
    --do_train \
    --do_eval \
    --learning_rate 3e-5 \
    --num_train_epochs 2 \
    --max_seq_length 384 \
    --doc_stride 128 \
    --output_dir ./examples/models/wwm_uncased_finetuned_squad/ \
    --per_device_eval_batch_size=3   \
    --per_device_train_batch_size=3   \
""",
    ),
}


# What may stand on the screen: the program's own lines and progress bars.
OUR_LINE = re.compile(
    r"\d\d:\d\d:\d\d INFO (?!HTTP Request)"
    r"|((Training|Answering|(train|validation) features \(\w+\)|Generating \w+ split): )? *\d+%\|.*\| \d+/\d+ \["
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(published(tmp_path_factory.mktemp("hub"), TRAIN_QUESTIONS, VALIDATION_QUESTIONS))
    yield hub
    hub.stop()


def run_in_bash(text: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    script = folder / "command.sh"
    script.write_text(text)
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", str(script)], cwd=folder, env=environment, capture_output=True, text=True)


def check_published_command(recipe: str, processes: int, folder: Path, environment: dict[str, str]) -> dict:
    position_type, batch, accumulation_steps, output_dir, text = PUBLISHED[recipe]
    text = text.replace("./examples/question-answering/run_squad.py", str(ROOT / "run_squad.py"))
    text = text.replace("--nproc_per_node=8", f"--nproc_per_node={processes}")
    result = run_in_bash(text, folder, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    strangers = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not OUR_LINE.match(line)]
    assert strangers == []

    printed = json.loads(result.stdout[result.stdout.rindex("{") :])
    assert list(printed) == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert printed["total"] == printed["HasAns_total"] == VALIDATION_QUESTIONS
    assert 0 <= printed["exact"] <= printed["f1"] <= 100
    assert result.stdout.count('"f1"') == 1  # one process prints

    saved = folder / output_dir
    assert json.loads((saved / "eval_results.json").read_text())["eval_f1"] == printed["f1"]
    config = json.loads((saved / "config.json").read_text())
    assert config.get("position_embedding_type", "absolute") == position_type
    # One question is one window here; all processes together make a batch.
    steps_per_epoch = ceil(ceil(TRAIN_QUESTIONS / (processes * batch)) / accumulation_steps)
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 2 * steps_per_epoch
    assert json.loads((saved / "train_results.json").read_text())["train_samples"] == TRAIN_QUESTIONS
    return printed


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_command(recipe, tmp_path, hub):
    """With nothing but a hub, and then with nothing but what the first run has left in the cache."""
    home = tmp_path / "home"
    printed = check_published_command(recipe, 2, tmp_path / "online", hub.environment(home))
    hub.stop()
    try:
        environment = hub.environment(home, HF_HUB_OFFLINE="1")
        assert check_published_command(recipe, 2, tmp_path / "offline", environment) == printed
    finally:
        hub.start()


@pytest.mark.slow
def test_published_command_with_all_processes(tmp_path, hub):
    check_published_command("train_large_relative_key_query.sh", 8, tmp_path, hub.environment(tmp_path / "home"))


def test_published_command_with_an_older_cache(tmp_path, hub):
    """A cache that older versions of datasets have filled under the name squad."""
    recipe, home = "train_base_relative_key_query.sh", tmp_path / "home"
    splits = {}
    for split, paragraphs in (("train", TRAIN_QUESTIONS // 2), ("validation", VALIDATION_QUESTIONS // 2)):
        file = tiny_questions(tmp_path / f"{split}.json", paragraphs=paragraphs)
        splits[split] = read_squad_file(file, cache_dir=str(tmp_path / "cache"))
    cache_dataset(home, "squad", "plain_text", splits)
    name = "zhiheng-huang/bert-base-uncased-embedding-relative-key-query"
    cache_model(home, name, Path(tiny_bert(tmp_path / "made", "relative_key_query", max_positions=512)))
    check_published_command(recipe, 2, tmp_path / "run", hub.environment(home, HF_HUB_OFFLINE="1"))


TORCHRUN_THAT_TELLS = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), *sys.argv[1:]]))
"""


def told_arguments(command: list[str], folder: Path, **variables) -> list[str]:
    """CUDA_VISIBLE_DEVICES and the arguments that `command` gives to torchrun."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(TORCHRUN_THAT_TELLS)
    (folder / "bin" / "torchrun").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE")}
    environment = {**inherited, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    return json.loads(subprocess.check_output(command, cwd=folder, env=environment, text=True))


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe_is_the_published_command(recipe, tmp_path):
    (tmp_path / "command.sh").write_text(PUBLISHED[recipe][-1])
    devices, processes, script, *flags = told_arguments(["bash", "command.sh"], tmp_path)
    executable = str(ROOT / "scripts" / recipe)
    ours = told_arguments([executable, "--seed", "7", "--run_name", "two words"], tmp_path)
    assert ours[:2] == [devices, processes]
    assert os.path.samefile(tmp_path / ours[2], ROOT / "run_squad.py")
    assert ours[3:] == [*flags, "--seed", "7", "--run_name", "two words"]


def test_recipe_on_a_machine_with_fewer_gpus(tmp_path):
    recipe = str(ROOT / "scripts" / "train_base_relative_key_query.sh")
    assert told_arguments([recipe], tmp_path, NPROC_PER_NODE="2")[:2] == ["0,1", "--nproc_per_node=2"]
    # What a scheduler has given stays.
    given = told_arguments([recipe], tmp_path, NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="5,6")
    assert given[:2] == ["5,6", "--nproc_per_node=2"]


def write_contracts(file: Path, contracts: int) -> None:
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


def test_contracts(tmp_path, hub):
    write_contracts(tmp_path / "train_separate_questions.json", 3)
    write_contracts(tmp_path / "test.json", 2)
    recipe = f"{ROOT / 'scripts' / 'train_contracts.sh'} --num_train_epochs 1 --negative_windows 0.5"
    result = run_in_bash(recipe, tmp_path, hub.environment(tmp_path / "home", NPROC_PER_NODE="2"))
    assert result.returncode == 0, result.stderr[-3000:]
    printed = json.loads(result.stdout[result.stdout.rindex("{") :])
    assert (printed["total"], printed["HasAns_total"], printed["NoAns_total"]) == (6, 4, 2)
    assert "best_f1" in printed
    assert "Train: 9 questions, " in result.stderr
    assert re.search(r"Train: 2 of 6 \(33.3%\) answers are longer than --max_answer_length 250 ", result.stderr)
    assert "Validation: 2 of 2 (100.0%) contexts are longer than one window." in result.stderr
    hold, others, kept = re.search(r"(\d+) hold an answer; of the (\d+) others (\d+) are", result.stderr).groups()
    assert int(hold) > 0 and int(kept) == round(int(others) / 2)
    results = json.loads((tmp_path / "contracts" / "train_results.json").read_text())
    assert results["train_samples"] == int(hold) + int(kept)
    ours = told_arguments([str(ROOT / "scripts" / "train_contracts.sh"), "--seed", "7"], tmp_path)
    assert ours[1] == "--nproc_per_node=8" and ours[-2:] == ["--seed", "7"]


def test_all_recipes_are_here():
    recipes = {path.name for path in (ROOT / "scripts").glob("train_*.sh")}
    assert recipes == {*PUBLISHED, "train_contracts.sh"}
    for recipe in recipes:
        assert os.access(ROOT / "scripts" / recipe, os.X_OK)
        assert re.match(r"#!/usr/bin/env bash\n# BERT", (ROOT / "scripts" / recipe).read_text())
