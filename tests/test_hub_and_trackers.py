"""What leaves the machine: --push_to_hub through a hub on disk, --report_to with the real trackers."""

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import Hub, Repository
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from test_run_squad import refusal
from tiny import tiny_bert, tiny_questions
from transformers import AutoTokenizer
from transformers.integrations import TrackioCallback

import run_squad
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering

ROOT = Path(run_squad.__file__).parent
TOKEN = "hf_a-secret-of-the-user"


@pytest.fixture
def command(tmp_path):
    questions = tiny_questions(tmp_path / "questions.json")
    argv = ["--model_name_or_path", tiny_bert(tmp_path / "bert", "relative_key"), "--do_train", "--do_eval"]
    argv += ["--train_file", questions, "--validation_file", questions, "--output_dir", str(tmp_path / "out")]
    argv += "--max_seq_length 48 --doc_stride 16 --num_train_epochs 1 --logging_steps 1 --use_cpu".split()
    return argv


# ---- The hub ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Takes the place of the hub's two calls; `files` is what it was sent, `commits` the messages."""
    hub = SimpleNamespace(files=tmp_path / "sent", commits=[], error=None)

    def create_repo(api, repo_id, token=None, **kwargs):
        if token != TOKEN:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")

    def upload_folder(api, repo_id, folder_path, commit_message, token, ignore_patterns, run_as_future=False, **kwargs):
        assert (repo_id, token) == ("somebody/my-squad", TOKEN)
        future = Future()
        if hub.error is not None:
            future.set_exception(hub.error)
            return future if run_as_future else future.result()
        hub.commits.append(commit_message)
        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            (hub.files / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, path), hub.files / path)
        future.set_result(None)
        return future

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    for function in (create_repo, upload_folder):  # by which earlier versions of transformers call them
        bound = functools.partial(function, huggingface_hub.HfApi())
        monkeypatch.setattr(transformers.trainer, function.__name__, bound, raising=False)
    return hub


PUSH = ["--push_to_hub", "--hub_model_id", "my-squad"]


def test_the_hub_gets_all_that_loads_the_model_and_no_secret(command, hub, tmp_path):
    run_squad.main([*command, *PUSH, "--hub_token", TOKEN, "--n_best_size", "3"])
    assert hub.commits == ["Training in progress, step 1", "End of training"]
    assert not list(hub.files.glob("checkpoint-*"))
    assert json.loads((hub.files / "qa_settings.json").read_text())["n_best_size"] == 3  # which ask.py reads
    assert [path for path in hub.files.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
    card = ModelCard.load(hub.files / "README.md")
    assert card.data.model_name == "somebody/my-squad"
    assert {result.metric_type for result in card.data.eval_results} >= {"exact", "f1"}
    assert card.content == (tmp_path / "out" / "README.md").read_text()

    # The card's own code, in a process that knows nothing of this repository, and the model by its name alone.
    asking, loading = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
    code = f"""{asking}{loading}
inputs = tokenizer("who lives ?", "anna lives in rome .", return_tensors="pt")
print(model(**inputs).start_logits.tolist())
"""
    files = {path.name: path.read_bytes() for path in hub.files.iterdir()}
    server = Hub({("models", "somebody/my-squad"): Repository(files)})
    environment = server.environment(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    server.stop()
    assert done.returncode == 0, done.stderr[-2000:]
    model = RelativeBertForQuestionAnswering.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(**tokenizer("who lives ?", "anna lives in rome .", return_tensors="pt")).start_logits
    answer, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == logits.tolist()
    assert list(ast.literal_eval(answer)) == ["score", "start", "end", "answer"]


def test_a_hub_that_does_not_let_us_is_said_before_training(command, hub, tmp_path, capsys):
    line = refusal(capsys, [*command, *PUSH])
    assert "error: --push_to_hub: cannot make my-squad on the hub (`hf auth login`" in line and "Token is" in line
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_push_that_fails_is_made_up_for_by_the_same_command(command, hub, tmp_path, capsys):
    hub.error = ConnectionError("no route\nto the hub")
    line = refusal(capsys, [*command, *PUSH, "--hub_token", TOKEN])
    assert "error: cannot push to the hub (all of it " in line and line.endswith(": no route to the hub")
    assert str(tmp_path / "out") in line and "the same command" in line
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    hub.error = None
    run_squad.main([*command, *PUSH, "--hub_token", TOKEN])
    assert hub.commits == ["End of training"]
    assert (hub.files / "model.safetensors").read_bytes() == weights
    assert "f1" in (hub.files / "README.md").read_text()


# ---- Trackers ----


LOGS = {"tensorboard": "out/runs/**/events.*", "trackio": "trackio/*.db*", "wandb": "wandb/offline-run-*/run-*.wandb"}


def test_each_tracker_gets_loss_and_metrics_of_one_run(command, tmp_path):
    installed = [name for name in LOGS if importlib.util.find_spec(name)]
    if not installed:
        pytest.skip("no tracker is installed")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}
    argv = [sys.executable, ROOT / "run_squad.py", *command, "--report_to", *installed]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in installed:
        content = b"".join(file.read_bytes() for file in tmp_path.glob(LOGS[name]))
        assert b"train/loss" in content and b"eval/f1" in content, name
    for file in tmp_path.glob("trackio/*.db"):
        with sqlite3.connect(file) as database:
            assert database.execute("SELECT DISTINCT run_name FROM metrics").fetchall() == [("out",)]  # its folder


def test_a_tracker_that_does_not_let_us_in_is_one_line_before_training(command, tmp_path, capsys, monkeypatch):
    def setup(*args, **kwargs):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setattr(TrackioCallback, "__init__", lambda self: None)
    monkeypatch.setattr(TrackioCallback, "setup", setup)
    monkeypatch.setattr(TrackioCallback, "_initialized", False, raising=False)
    monkeypatch.setattr(run_squad, "get_available_reporting_integrations", lambda: ["trackio"])
    line = refusal(capsys, [*command, "--report_to", "trackio"])
    assert line.endswith("run_squad.py: error: --report_to trackio: No API key configured")
    assert not (tmp_path / "out" / "model.safetensors").exists()
