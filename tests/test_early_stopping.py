"""Early stopping: where a run ends, the same wherever it is killed in between."""

import signal
from pathlib import Path

import launch
import pytest
import torch
from launch import At, fail, finish
from tiny import read, tiny_bert, tiny_questions, weights

from qa.checkpoints import complete_checkpoints
from trainer_qa import QuestionAnsweringTrainer

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
# 48 windows of 16 questions make 12 steps an epoch on one process; an evaluation has four prediction steps.
FLAGS = """
    --do_train --do_eval --max_seq_length 20 --doc_stride 5 --num_train_epochs 4 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --learning_rate 1e-2 --logging_steps 3 --eval_strategy steps --eval_steps 3
    --save_steps 3 --load_best_model_at_end --metric_for_best_model loss
""".split()
PATIENCE = ("--early_stopping_patience", "3")
# What each evaluation says, in its turn; the best is that of step 9, and with a patience of 3 the last is that of 18.
LOSSES = {3: 5.0, 6: 6.0, 9: 3.0, 12: 4.0, 15: 3.0, 18: 3.5, 21: 7.0, 24: 1.0, 27: 2.0}


def say_losses():
    """Evaluations in training say what LOSSES has for their step, and 9 before the first one."""
    score = QuestionAnsweringTrainer._loss

    def scripted(self, search, prefix):
        said = {"loss": LOSSES.get(self.state.global_step, 9.0)}
        return said if self.is_in_train else score(self, search, prefix)

    QuestionAnsweringTrainer._loss = scripted


SCRIPTED = {"patch": "test_early_stopping.say_losses"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return [
        *("--model_name_or_path", tiny_bert(folder / "model")),
        *("--train_file", tiny_questions(folder / "train.json", paragraphs=8)),
        *("--validation_file", tiny_questions(folder / "dev.json", paragraphs=5)),
        *FLAGS,
    ]


@pytest.fixture(scope="module")
def never_killed(command, tmp_path_factory):
    results = {}

    def get(*flags, processes=1):
        if (flags, processes) not in results:
            out = tmp_path_factory.mktemp("never_killed") / "out"
            finish([*command, *flags], out, processes, **SCRIPTED)
            results[flags, processes] = outcome(out)
        return results[flags, processes]

    return get


def outcome(out: Path) -> dict:
    """Where the run ended, and with what."""
    state = read(out, "trainer_state.json")
    return {
        "step": state["global_step"],
        "losses": [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry],
        "train losses": [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry],
        "train loss": read(out, "train_results.json")["train_loss"],
        "best": (state["best_metric"], state["best_global_step"]),
        "checkpoints": [Path(folder).name for folder in complete_checkpoints(out)],
        "model": weights(out),
        "best model": weights(out / f"checkpoint-{state['best_global_step']}"),
        "eval_loss": read(out, "eval_results.json")["eval_loss"],
    }


def test_it_stops_after_as_many_evaluations_without_improvement(never_killed):
    done = never_killed(*PATIENCE)
    assert done["step"] == 18 and done["losses"] == [item for item in LOSSES.items() if item[0] <= 18]
    assert done["best"] == (3.0, 9) and done["model"] == done["best model"]
    assert done["checkpoints"] == [f"checkpoint-{step}" for step in range(3, 19, 3)]
    # A loss that is lower by no more than the threshold is the best, but no improvement.
    threshold = never_killed("--early_stopping_patience", "2", "--early_stopping_threshold", "2")
    assert threshold["step"] == 9 and threshold["best"] == (3.0, 9)


@pytest.mark.parametrize(
    "at, processes",
    [
        (At(f"{TRAINER}.training_step", 33), 1),  # after two evaluations without improvement
        (At(f"{TRAINER}._save_checkpoint", 6, after=True), 1),  # saved, not stopped
        (At(f"{TRAINER}.prediction_step", 22, signal=signal.SIGTERM), 1),  # within the evaluation that stops the run
        pytest.param(At(f"{TRAINER}._save_checkpoint", 6), 1, marks=pytest.mark.slow),
        pytest.param(At(f"{TRAINER}.save_model", 7), 1, marks=pytest.mark.slow),  # stopped, before the model
        pytest.param(At(f"{TRAINER}.prediction_step", 9, rank=1), 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_given_again_ends_at_the_same_step(at, processes, command, never_killed, tmp_path):
    command = [*command, *PATIENCE, "--eval_on_start"]  # which must not be repeated, and counted
    stopped = launch.run(*command, "--output_dir", tmp_path, processes=processes, at=at, **SCRIPTED)
    expected = -at.signal if at.signal == signal.SIGKILL else 128 + at.signal
    assert stopped.exit_codes[at.rank] == expected, stopped.err[0][-2000:]
    assert "early_stopping_patience is 5, was 3" in fail([*command, "--early_stopping_patience", "5"], tmp_path)
    finish(command, tmp_path, processes, **SCRIPTED)
    assert outcome(tmp_path) == never_killed(*PATIENCE, "--eval_on_start", processes=processes)


@pytest.mark.parametrize("metric, mode", [("loss", "min"), ("f1", "max")])
def test_the_metric_decides_on_the_best_model_and_the_learning_rate(metric, mode, command, tmp_path):
    """A plateau is of no fall in loss, and of no rise in f1: else the learning rate would sink while f1 rises."""
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--metric_for_best_model", metric, "--max_steps", "9"]
    finish([*command, *flags, "--learning_rate", "1e-1"], tmp_path)
    scores = {
        entry["step"]: entry[f"eval_{metric}"]
        for entry in read(tmp_path, "trainer_state.json")["log_history"]
        if f"eval_{metric}" in entry
    }
    assert outcome(tmp_path)["best"][0] == (min if mode == "min" else max)(scores.values())
    assert outcome(tmp_path)["model"] == outcome(tmp_path)["best model"]
    scheduler = torch.load(tmp_path / "checkpoint-9" / "scheduler.pt", weights_only=True)
    assert scheduler["mode"] == mode and scheduler["last_epoch"] == 3
