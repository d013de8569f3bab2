"""Early stopping: where a run ends, the same wherever it is killed in between, and what is refused."""

import json
import signal
from pathlib import Path

import launch
import pytest
import torch
from launch import At
from tiny import tiny_bert, tiny_questions

import run_squad
from qa.run_folder import whole_checkpoints
from trainer_qa import QuestionAnsweringTrainer

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
# 48 windows of 16 questions make 12 steps an epoch on one process; an evaluation has four prediction steps.
FLAGS = """
    --do_train --do_eval --max_seq_length 20 --doc_stride 5 --num_train_epochs 4 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --learning_rate 1e-2 --logging_steps 3 --eval_strategy steps --eval_steps 3
    --save_steps 3 --load_best_model_at_end --metric_for_best_model loss
""".split()
# What each evaluation says, in its turn; the best is that of step 9, and with a patience of 3 the last is that of 18.
LOSSES = {3: 5.0, 6: 6.0, 9: 3.0, 12: 4.0, 15: 3.0, 18: 3.5, 21: 7.0, 24: 1.0, 27: 2.0}
LAST = 18


def read(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


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
            finish([*command, *flags], out, processes)
            results[flags, processes] = outcome(out)
        return results[flags, processes]

    return get


PATIENCE = ("--early_stopping_patience", "3")


def finish(command, out, processes=1):
    done = launch.run(*command, "--output_dir", out, processes=processes, **SCRIPTED)
    assert done.exit_codes == [0] * processes, done.err[0][-2000:]
    return done


def outcome(out: Path) -> dict:
    """Where the run ended, and with what."""
    state = read(out, "trainer_state.json")
    return {
        "step": state["global_step"],
        "losses": [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry],
        "train losses": [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry],
        "train loss": read(out, "train_results.json")["train_loss"],
        "best": (state["best_metric"], state["best_global_step"]),
        "checkpoints": [Path(folder).name for folder in whole_checkpoints(out)],
        "model": (out / "model.safetensors").read_bytes(),
        "best model": (out / f"checkpoint-{state['best_global_step']}" / "model.safetensors").read_bytes(),
        "eval_loss": read(out, "eval_results.json")["eval_loss"],
    }


def test_it_stops_after_as_many_evaluations_without_improvement(never_killed):
    done = never_killed(*PATIENCE)
    assert done["step"] == LAST and done["losses"] == [item for item in LOSSES.items() if item[0] <= LAST]
    assert done["best"] == (3.0, 9) and done["model"] == done["best model"]
    assert done["checkpoints"] == [f"checkpoint-{step}" for step in range(3, LAST + 1, 3)]
    assert never_killed()["step"] == 48 and never_killed()["best"] == (1.0, 24)
    assert never_killed("--early_stopping_patience", "1")["step"] == 6
    assert never_killed(*PATIENCE, "--eval_on_start")["step"] == LAST
    # A loss that is lower by no more than the threshold is the best, but no improvement.
    threshold = never_killed("--early_stopping_patience", "2", "--early_stopping_threshold", "2")
    assert threshold["step"] == 9 and threshold["best"] == (3.0, 9)


MOMENTS = {
    "before the first checkpoint": At(f"{TRAINER}.training_step", 5),
    "between evaluations, none without improvement": At(f"{TRAINER}.training_step", 20),
    "between evaluations, one without improvement": At(f"{TRAINER}.training_step", 26),
    "between evaluations, two without improvement": At(f"{TRAINER}.training_step", 33),
    "evaluating for the last time": At(f"{TRAINER}.prediction_step", 22),
    "evaluated, not saved": At(f"{TRAINER}._save_checkpoint", 6),
    "saved, not stopped": At(f"{TRAINER}._save_checkpoint", 6, after=True),
    "stopped, before the model": At(f"{TRAINER}.save_model", 7),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_stops_at_the_same_step(moment, command, never_killed, tmp_path):
    command = [*command, *PATIENCE]
    killed = launch.run(*command, "--output_dir", tmp_path, at=MOMENTS[moment], **SCRIPTED)
    assert killed.exit_codes == [-signal.SIGKILL], killed.err[0][-2000:]
    finish(command, tmp_path)
    assert outcome(tmp_path) == never_killed(*PATIENCE)


def test_the_trainers_own_way_of_restoring_callbacks_changes_nothing(command, never_killed, tmp_path):
    command = [*command, *PATIENCE, "--restore_callback_states_from_checkpoint"]
    for moment in ("between evaluations, two without improvement", "saved, not stopped"):
        out = tmp_path / moment
        launch.run(*command, "--output_dir", out, at=MOMENTS[moment], **SCRIPTED)
        finish(command, out)
        assert outcome(out) == never_killed(*PATIENCE)


def test_killed_again_and_again_with_two_processes(command, never_killed, tmp_path):
    command = [*command, *PATIENCE]
    for at in (
        At(f"{TRAINER}.training_step", 21, rank=1),
        At(f"{TRAINER}.prediction_step", 3, rank=1),
        At(f"{TRAINER}._save_checkpoint", 2, rank=1, after=True),
    ):
        killed = launch.run(*command, "--output_dir", tmp_path, processes=2, at=at, **SCRIPTED)
        assert killed.exit_codes[at.rank] == -signal.SIGKILL, killed.err[0][-2000:]
    finish(command, tmp_path, processes=2)
    assert outcome(tmp_path) == never_killed(*PATIENCE, processes=2)
    assert outcome(tmp_path)["step"] == LAST


@pytest.mark.parametrize(
    "at",
    [
        At(f"{TRAINER}.training_step", 36, signal=signal.SIGTERM),  # put off before the evaluation that stops the run,
        At(f"{TRAINER}.prediction_step", 22, signal=signal.SIGTERM),  # within it,
        At(f"{TRAINER}.training_step", 24, signal=signal.SIGTERM),  # and before an earlier one, at an epoch's end
        At(f"{TRAINER}._save_checkpoint", 6, signal=signal.SIGTERM),  # when it is done
    ],
)
def test_an_evaluation_that_a_signal_put_off_counts(at, command, never_killed, tmp_path):
    command = [*command, *PATIENCE]
    stopped = launch.run(*command, "--output_dir", tmp_path, at=at, **SCRIPTED)
    assert stopped.exit_codes == [128 + signal.SIGTERM], stopped.err[0][-2000:]
    finish(command, tmp_path)
    assert outcome(tmp_path) == never_killed(*PATIENCE)


def test_what_was_evaluated_at_the_start_counts_once(command, never_killed, tmp_path):
    flags = (*PATIENCE, "--eval_on_start")
    killed = launch.run(*command, *flags, "--output_dir", tmp_path, at=At(f"{TRAINER}.training_step", 26), **SCRIPTED)
    assert killed.exit_codes == [-signal.SIGKILL]
    finish([*command, *flags], tmp_path)
    assert outcome(tmp_path) == never_killed(*flags)


def test_the_patience_may_change_when_a_run_goes_on(command, never_killed, tmp_path):
    """As --save_steps may: the run then is one that had it from the start."""
    for first, then in ((PATIENCE, ("--early_stopping_patience", "5")), ((), PATIENCE), (PATIENCE, ())):
        out = tmp_path / f"{len(first)}-{len(then)}-{then[-1:]}"
        at = MOMENTS["saved, not stopped" if then and first else "between evaluations, none without improvement"]
        launch.run(*command, *first, "--output_dir", out, at=at, **SCRIPTED)
        finish([*command, *then], out)
        assert outcome(out) == never_killed(*then)
    assert never_killed("--early_stopping_patience", "5")["step"] > LAST


def test_epochs_and_f1_will_do(command, tmp_path):
    """Of a model that learns nothing the first score is the best."""
    command = [flag for flag in command if flag not in ("--metric_for_best_model", "loss", "--load_best_model_at_end")]
    command += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--learning_rate", "1e-12"]
    done = finish([*command, "--early_stopping_patience", "2"], tmp_path)
    assert read(tmp_path, "trainer_state.json")["global_step"] == 36
    assert read(tmp_path, "run_state.json")["settings"]["metric_for_best_model"] == "f1"
    assert done.err[0].count("without --load_best_model_at_end: the model will be that of the last step") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--early_stopping_patience 0", "--early_stopping_patience is 0, must be at least 1"),
        ("--early_stopping_patience 2 --eval_strategy no", "--early_stopping_patience needs evaluations: give --eval_"),
        ("--early_stopping_threshold 0.1", "--early_stopping_threshold has no effect without --early_stopping_pat"),
        ("--early_stopping_patience 2 --early_stopping_threshold -1", "--early_stopping_threshold is -1.0, must be 0"),
        ("--early_stopping_patience 2 --early_stopping_threshold nan", "--early_stopping_threshold is nan, must be 0"),
        ("--early_stopping_patience 2 --metric_for_best_model los", "--metric_for_best_model is 'los', must be one of"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(flags, says, tmp_path, capsys):
    argv = "--model_name_or_path x --do_train --do_eval --train_file x --validation_file x --use_cpu".split()
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main([*argv, "--eval_strategy", "epoch", "--output_dir", str(tmp_path / "out"), *flags.split()])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.startswith(f"run_squad.py: error: {says}")
    assert not (tmp_path / "out").exists()


# ---- The loss decides ----


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_the_best_model_is_that_of_the_lowest_loss(name, command, tmp_path):
    flags = ["--metric_for_best_model", name, "--learning_rate", "1e-1", "--max_steps", "18"]
    done = launch.run(*command, *flags, "--lr_scheduler_type", "constant", "--output_dir", tmp_path)
    assert done.exit_codes == [0], done.err[0][-2000:]
    result = outcome(tmp_path)
    best = min(result["losses"], key=lambda item: item[1])
    assert len(result["losses"]) == 6 and best[0] not in (3, 18)
    assert result["best"] == best[::-1] and result["model"] == result["best model"]
    assert result["eval_loss"] == pytest.approx(best[1], abs=1e-6)


@pytest.mark.parametrize("metric, mode", [("loss", "min"), ("f1", "max")])
def test_a_plateau_is_of_no_fall_in_loss_and_of_no_rise_in_f1(metric, mode, command, tmp_path):
    """Else the learning rate would sink while f1 rises."""
    command = [flag for flag in command if flag != "--load_best_model_at_end"]
    command += ["--lr_scheduler_type", "reduce_lr_on_plateau", "--metric_for_best_model", metric, "--max_steps", "3"]
    finish(command, tmp_path)
    scheduler = torch.load(tmp_path / "checkpoint-3" / "scheduler.pt", weights_only=True)
    assert scheduler["mode"] == mode and scheduler["last_epoch"] == 1
    if metric == "loss":
        assert scheduler["best"] == LOSSES[3]
        return
    # A run that an earlier version began, which did not choose the mode, goes on.
    for file in (tmp_path / "run_state.json", *(tmp_path / "checkpoint-3").glob("*.json")):
        settings = json.loads(file.read_text())
        if "settings" in settings:
            assert settings["settings"]["lr_scheduler_kwargs"] == {"mode": "max"}
            settings["settings"]["lr_scheduler_kwargs"] = None
            file.write_text(json.dumps(settings | ({"status": "training"} if "status" in settings else {})))
    assert "Going on from" in finish(command, tmp_path).err[0]
