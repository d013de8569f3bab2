"""Every command of the README runs as it stands there, and every flag and file it names exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, published

import run_squad
from scripts import make_relative

ROOT = Path(run_squad.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOLS = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
# Commands within a sentence -> the flags and variables that make them small; a new one needs its line here.
SENTENCES = {
    "bash scripts/compare_positions.sh": (
        "--max_steps 4 --eval_steps 2 --max_train_samples 64 --max_eval_samples 10",
        {"SEEDS": "0", "TRAIN_PARAGRAPHS": "20", "TIMES": "1 2"},
    ),
    "python scripts/benchmark.py attention": ("--sizes base --lengths 32x1 --passes train --repeats 1", {}),
    "python scripts/benchmark.py data": ("--questions 500 --repeats 1", {}),
    "python scripts/benchmark.py training": ("--size mini --questions 200 --batches 1 --repeats 1", {}),
    "python scripts/benchmark.py scale": ("--contracts 1", {}),
    "python scripts/check_versions.py": ("--help", {}),  # without it environments are made and packages installed
    "python run_squad.py --help": ("", {}),
    "python run_squad.py arguments.json": ("", {}),
}
RUN_ELSEWHERE = {"bash scripts/quickstart.sh", "bash scripts/test.sh"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def hub(tmp_path):
    """Holds every name that the README's commands and the recipes take from there."""
    (tmp_path / "made").mkdir()
    hub = Hub(published(tmp_path / "made", train=8, validation=8))
    recipes = "".join(path.read_text() for path in (ROOT / "scripts").glob("train_*.sh"))
    for name in set(re.findall(r"--model_name_or_path (\w[\w.-]*/[\w.-]+)", README + recipes)):
        assert ("models", name) in hub.repositories
    yield hub
    hub.stop()


@pytest.fixture
def workplace(tmp_path, hub) -> Path:
    """A folder with the repository's files and the README's own files."""
    for name in ("run_squad.py", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (own_file,) = blocks("json")
    (tmp_path / "my_questions.json").write_text(own_file)
    question = json.loads(own_file)["data"][0]["paragraphs"][0]
    for qa in question["qas"]:
        del qa["answers"]
    (tmp_path / "new_questions.json").write_text(json.dumps({"data": [{"paragraphs": [question]}]}))

    arguments = {"model_name_or_path": "squad_model", "dataset_name": "squad", "do_eval": True, "output_dir": "again"}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    return tmp_path


def run(command: str, workplace: Path, environment: dict[str, str]) -> None:
    environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", command], cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, command + done.stderr[-3000:]
    assert "HTTP Request" not in done.stderr


@pytest.mark.slow
def test_every_command_runs_in_order(workplace, hub):
    """With nothing but a hub; and those that load from there again, with nothing but the cache."""
    commands = [(command.replace("--nproc_per_node=8", "--nproc_per_node=2"), {}) for command in blocks("bash")]
    assert len(commands) >= 5
    text = re.sub(r"^```.*?^```$", "", README + TOOLS, flags=re.MULTILINE | re.DOTALL)
    found = {" ".join(command.split()) for command in re.findall(r"`((?:python|bash)\s[^`]+)`", text)}
    assert found == SENTENCES.keys() | RUN_ELSEWHERE
    commands += [(f"{command} {flags}", variables) for command, (flags, variables) in SENTENCES.items()]
    for command, variables in commands:
        run(command, workplace, hub.environment(workplace / "home", **variables))
    assert json.loads((workplace / "my_answers" / "predict_predictions.json").read_text()).keys() == {"curie-1"}
    for code in blocks("python"):
        subprocess.run([sys.executable, "-c", code], cwd=workplace, check=True, capture_output=True)

    hub.stop()
    from_hub = [command.strip() for command, _ in commands if "--dataset_name" in command]
    assert len(from_hub) >= 2
    offline = hub.environment(workplace / "home", HF_HUB_OFFLINE="1")
    for command in from_hub:
        run(f"{command} --overwrite_output_dir", workplace, offline)
    hub.start()


def recipe_commands() -> list[str]:
    """The commands that the table of published results names, each with an output_dir of its own."""
    commands, recipe = [], None
    for named, with_ in re.findall(r"^\| (?:`(scripts/\S+)`|the same with `([^`]+)`) \|", TOOLS, flags=re.MULTILINE):
        recipe = named or recipe
        variable, flags = (with_, "") if with_.startswith("NPROC_PER_NODE") else ("NPROC_PER_NODE=2", with_)
        commands.append(f"{variable} {recipe} {flags} --output_dir recipe_{len(commands)}")
    return commands


@pytest.mark.slow
def test_every_recipe_of_the_table_runs(workplace, hub):
    commands = recipe_commands()
    assert len(commands) == len(re.findall(r"^\| .*(?:exact|f1) \d+\.\d+.* \| no \|$", TOOLS, flags=re.MULTILINE)) == 6
    for command in commands:
        run(command, workplace, hub.environment(workplace / "home"))
    hub.stop()
    (other_model,) = [command for command in commands if "--model_name_or_path" in command]
    offline = hub.environment(workplace / "home", HF_HUB_OFFLINE="1")
    run(f"{other_model} --overwrite_output_dir", workplace, offline)
    hub.start()


def test_every_flag_and_file_exists():
    groups = (*run_squad.ARGUMENT_GROUPS, make_relative.DistillationDataArguments)
    ours = {f"--{name}" for group in groups for name in group.__dataclass_fields__}
    elsewhere = {f"--{name}" for name in "nproc_per_node question context_file help warmup_ratio size".split()}
    for page, folder in ((README, ROOT), (TOOLS, ROOT / "scripts")):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]*\b", page)) - elsewhere <= ours
        for file in re.findall(r"\b(?:(?:scripts|qa)/)?\w+\.(?:py|sh)\b", page):
            assert (ROOT / file).exists() or (folder / file).exists() or file == "run_qa.py", file
