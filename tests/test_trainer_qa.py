"""The order of the windows, stopping and going on, full disks, losses that are not finite, and what is refused."""

import json
import os
import resource
import shutil
import signal
import weakref
from pathlib import Path

import launch
import pytest
import transformers
from launch import At, fail, finish
from tiny import read, tiny_bert, tiny_questions, weights, without_times
from transformers import Trainer

from qa.checkpoints import complete_checkpoints, incomplete_checkpoints
from trainer_qa import QuestionAnsweringTrainer

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
WINDOWS = "--max_seq_length 20 --doc_stride 5".split()
# 48 windows of 16 questions, 12 steps an epoch on one process.
FLAGS = """
    --do_train --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2
    --learning_rate 1e-1 --logging_steps 5 --save_strategy steps --save_steps 5
""".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": tiny_bert(folder / "model"),
        "train": tiny_questions(folder / "train.json", paragraphs=8),
        "dev": tiny_questions(folder / "dev.json", paragraphs=5),
    }


@pytest.fixture(scope="module")
def command(inputs):
    return ["--model_name_or_path", inputs["model"], "--train_file", inputs["train"], *WINDOWS, *FLAGS]


@pytest.fixture(scope="module")
def evaluating(inputs, command):
    flags = "--do_eval --eval_strategy steps --eval_steps 5 --load_best_model_at_end".split()
    return [*command, *flags, "--validation_file", inputs["dev"]]


@pytest.fixture
def evaluate_only(inputs):
    flags = ["--do_eval", *WINDOWS, "--per_device_eval_batch_size", "3"]
    return [*flags, "--model_name_or_path", inputs["model"], "--validation_file", inputs["dev"]]


@pytest.fixture(scope="module")
def never_stopped(command, evaluating, tmp_path_factory):
    """The output_dir of a run that nothing has disturbed, evaluating or not, by number of processes."""
    runs = {}

    def get(processes, evaluates=False):
        if (processes, evaluates) not in runs:
            runs[processes, evaluates] = tmp_path_factory.mktemp("never_stopped") / "out"
            finish(evaluating if evaluates else command, runs[processes, evaluates], processes)
        return runs[processes, evaluates]

    return get


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """The output_dir of a run that was killed between the checkpoints at step 10 and 15."""
    out = tmp_path_factory.mktemp("killed") / "out"
    launch.run(*command, "--output_dir", out, at=At(f"{TRAINER}.training_step", 27))
    assert steps(complete_checkpoints(out)) == [5, 10]
    return out


def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def steps(checkpoints) -> list[int]:
    return [int(folder.rsplit("-", 1)[1]) for folder in checkpoints]


def history(folder) -> list[dict]:
    return [without_times(entry) for entry in read(folder, "trainer_state.json")["log_history"]]


def patched(function):
    """The dotted name of a function of this file, for `launch.run(patch=...)`."""
    return f"test_trainer_qa.{function.__name__}"


def wrap(name, before):
    """Calls `before(trainer, *args)` in front of a method of the trainer."""
    original = getattr(QuestionAnsweringTrainer, name)

    def wrapper(self, *args, **kwargs):
        before(self, *args)
        return original(self, *args, **kwargs)

    setattr(QuestionAnsweringTrainer, name, wrapper)


# ---- Order of the windows ----


def record_order():
    def record(trainer, model, inputs, *_):
        with open(os.environ["ORDER"] + os.environ.get("RANK", "0"), "a") as file:
            file.write(json.dumps([trainer.state.global_step, inputs["input_ids"].tolist()]) + "\n")

    wrap("training_step", record)


def order_of(command, out, order, processes=1, **how) -> list[list]:
    """[[step, input ids], ...] of the micro-batches of each rank."""
    launch.run(*command, "--output_dir", out, processes=processes, patch=patched(record_order), ORDER=order, **how)
    ranks = [[json.loads(line) for line in open(f"{order}{rank}")] for rank in range(processes)]
    for rank in range(processes):
        os.remove(f"{order}{rank}")
    return ranks


@pytest.mark.parametrize(
    "sampling, processes",
    [
        ("group_by_length", 1),
        ("random", 2),
        pytest.param("group_by_length", 2, marks=pytest.mark.slow),
        pytest.param("batch_rebalance", 2, marks=pytest.mark.slow),
    ],
)
def test_order_is_by_seed_and_epoch_and_survives_a_resume(sampling, processes, command, tmp_path):
    command = [*command, "--train_sampling_strategy", sampling]
    order = str(tmp_path / "order")
    alone = order_of(command, tmp_path / "alone", order, processes)
    steps_per_epoch = 12 // processes
    by_epoch = [
        [(rank, ids) for rank, batches in enumerate(alone) for step, ids in batches if step // steps_per_epoch == epoch]
        for epoch in (0, 1)
    ]
    assert by_epoch[0] != by_epoch[1]
    first, second = (
        sorted([token for token in window if token != 0] for _, ids in batches for window in ids)  # without padding
        for batches in by_epoch
    )
    assert len(first) == 48 and first == second, "each window once an epoch"

    saved = 20 // processes // 5 * 5  # within the second epoch
    at = At(f"{TRAINER}.training_step", 2 * saved + 4)
    first = order_of(command, tmp_path / "killed", order, processes, at=at)
    second = order_of(command, tmp_path / "killed", order, processes)
    assert [rank[0][0] for rank in second] == [saved] * processes
    for rank in range(processes):
        assert [entry for entry in first[rank] if entry[0] < saved] + second[rank] == alone[rank]
    if processes == 1:
        assert order_of([*command, "--seed", "7"], tmp_path / "other", order) != alone


def test_evaluating_does_not_move_the_training(never_stopped):
    last = "checkpoint-24"  # the model itself is the best one where there are evaluations
    assert weights(never_stopped(1) / last) == weights(never_stopped(1, evaluates=True) / last)


@pytest.mark.parametrize("processes", [1, 2])
def test_train_loss_is_the_mean_over_all_steps_and_processes(processes, command, never_stopped, tmp_path):
    finish([*command, "--logging_steps", "1"], tmp_path, processes)
    losses = [entry["loss"] for entry in history(tmp_path) if "loss" in entry]
    assert len(losses) == 24 // processes
    for out in (tmp_path, never_stopped(processes)):  # which logs each step, and each fifth
        assert read(out, "train_results.json")["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---- Signals ----


@pytest.mark.parametrize(
    "at, processes, step",
    [
        (At(f"{TRAINER}.training_step", 14, signal=signal.SIGTERM), 1, 7),
        (At(f"{TRAINER}.training_step", 24, signal=signal.SIGINT), 1, 12),  # an epoch's last step
        (At(f"{TRAINER}.training_step", 14, rank=1, signal=signal.SIGTERM), 2, 7),
        (At(f"{TRAINER}.prediction_step", 2, signal=signal.SIGTERM), 1, 5),  # the evaluation is finished
        (At(f"{TRAINER}.training_step", 48, signal=signal.SIGTERM), 1, 24),  # the run's last step
        pytest.param(At(f"{TRAINER}._save_rng_state", 1, signal=signal.SIGTERM), 1, 5, marks=pytest.mark.slow),
        pytest.param(At(f"{TRAINER}.prediction_step", 2, 0, 1, signal.SIGINT), 2, 5, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_same_command_goes_on(at, processes, step, evaluating, never_stopped, tmp_path):
    line = fail(evaluating, tmp_path, 128 + at.signal, processes, at=at)
    checkpoint = complete_checkpoints(tmp_path)[-1]
    assert checkpoint.endswith(f"checkpoint-{step}")
    assert f"stopped by {at.signal.name}" in line and checkpoint in line and "the same command again" in line
    assert read(tmp_path, "run_state.json")["status"] == "training"
    finish(evaluating, tmp_path, processes)
    expected = never_stopped(processes, evaluates=True)
    assert weights(tmp_path) == weights(expected) and history(tmp_path) == history(expected)


def send_signals_again():
    wrap("training_step", lambda trainer, *_: trainer.state.global_step >= 6 and os.kill(os.getpid(), signal.SIGINT))


def test_signals_may_come_often(command, tmp_path):
    """torchrun hands on Ctrl-C to processes that the terminal has told already, and SIGTERM after it."""
    at = At("qa.checkpoints.mark_complete", 2, signal=signal.SIGTERM)
    line = fail(command, tmp_path, 130, at=at, patch=patched(send_signals_again))
    assert "SIGINT" in line and steps(complete_checkpoints(tmp_path)) == [5, 7]


def test_signal_after_the_last_step_waits_for_the_model(evaluating, tmp_path):
    line = fail(evaluating, tmp_path, 143, at=At(f"{TRAINER}.save_state", signal=signal.SIGTERM))
    assert "the same command again" in line
    assert read(tmp_path, "run_state.json")["status"] == "trained"
    before = weights(tmp_path)
    assert "Going on from" not in finish(evaluating, tmp_path).err[0]
    assert weights(tmp_path) == before


@pytest.mark.parametrize("strategy, evaluation", [("no", "epoch"), ("epoch", "epoch"), ("best", "steps")])
def test_signal_at_an_epochs_end_saves_whatever_the_strategy(strategy, evaluation, evaluating, tmp_path):
    flags = [*evaluating, "--save_strategy", strategy, "--eval_strategy", evaluation, "--eval_steps", "4"]
    flags += ["--learning_rate", "1e-12"]  # so that the first score is the best
    if strategy == "no":
        flags.remove("--load_best_model_at_end")
    fail(flags, tmp_path, 143, at=At(f"{TRAINER}.training_step", 24, signal=signal.SIGTERM))
    assert steps(complete_checkpoints(tmp_path))[-1] == 12


# ---- A disk that fills up ----


def limit_file_size():
    """From the second checkpoint on, no file can grow over FILE_SIZE bytes on the rank that is to fail."""

    def limit(trainer, *_):
        if trainer.state.global_step == 10 and os.environ["FULL_RANK"] == os.environ.get("RANK", "0"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE"]), resource.RLIM_INFINITY))

    wrap("_save_checkpoint", limit)


@pytest.mark.parametrize(
    "file, processes, full_rank",
    [
        ("model.safetensors", 1, "0"),
        ("rng_state_1.pth", 2, "1"),
        pytest.param("optimizer.pt", 2, "0", marks=pytest.mark.slow),
    ],
)
def test_full_disk_leaves_what_was_complete(file, processes, full_rank, command, never_stopped, tmp_path):
    size = Path(complete_checkpoints(never_stopped(processes))[0], file).stat().st_size
    how = {"patch": patched(limit_file_size), "FILE_SIZE": str(size - 1000), "FULL_RANK": full_rank}
    line = fail([*command, "--save_total_limit", "1"], tmp_path, 2, processes, **how)
    assert f"cannot write {tmp_path}/checkpoint-10: " in line
    assert steps(complete_checkpoints(tmp_path)) == [5] and not incomplete_checkpoints(tmp_path)
    finish(command, tmp_path, processes)
    assert weights(tmp_path) == weights(never_stopped(processes))


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_that_cannot_be_written_fail_on_all_processes(processes, evaluate_only, tmp_path):
    (tmp_path / "eval_predictions.json").mkdir()
    line = fail(evaluate_only, tmp_path, 2, processes)
    assert f"cannot write {tmp_path}/eval_predictions.json: " in line


# ---- Losses and logits that are not finite ----


def spoil_loss():
    """At the third step, the loss of the second micro-batch is not a number on the last rank."""
    original = QuestionAnsweringTrainer.compute_loss
    last_rank = int(os.environ.get("WORLD_SIZE", "1")) - 1
    batches = []

    def compute_loss(self, *args, **kwargs):
        batches.append(self.state.global_step)
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if batches.count(2) == 2 and self.args.process_index == last_rank else loss

    QuestionAnsweringTrainer.compute_loss = compute_loss


def spoil_gradient():
    """At the third step the loss is finite, but a gradient is not."""

    def spoil(trainer, *_):
        if trainer.state.global_step == 2:
            next(trainer.model.parameters()).grad.view(-1)[3] = float("inf")

    wrap("on_pre_optimizer_step", spoil)


@pytest.mark.parametrize(
    "spoil, processes, flags, what",
    [
        (spoil_loss, 1, [], "loss"),
        (spoil_loss, 2, [], "loss"),
        (spoil_gradient, 1, [], "gradient"),
        (spoil_gradient, 1, ["--max_grad_norm", "0"], "gradient"),
    ],
)
def test_loss_or_gradient_that_is_not_finite_stops_the_run(spoil, processes, flags, what, command, tmp_path):
    line = fail([*command, "--save_steps", "1", *flags], tmp_path, 2, processes, patch=patched(spoil))
    assert f"the {what} at step 3 is not finite. The last complete checkpoint stays good" in line
    assert steps(complete_checkpoints(tmp_path)) == [1, 2]


def watch_logits():
    """No batch's logits outlive the next batch; where NAN_RANK says so, that rank's of the second are not numbers."""
    original, earlier = Trainer.prediction_step, []

    def prediction_step(self, *args, **kwargs):
        assert not any(logits() is not None for logits in earlier)
        loss, logits, labels = original(self, *args, **kwargs)
        if len(earlier) == 1 and os.environ.get("NAN_RANK") == os.environ.get("RANK", "0"):
            logits[1][0, 3] = float("nan")
        earlier.append(weakref.ref(logits[0]))
        return loss, logits, labels

    Trainer.prediction_step = prediction_step


def test_logits_do_not_outlive_their_batch_and_no_flag_of_the_loaders_changes_answers(evaluate_only, tmp_path):
    finish(evaluate_only, tmp_path / "plain")
    flags = ["--dataloader_drop_last", "--dataloader_num_workers", "1", "--eval_accumulation_steps", "2"]
    finish([*evaluate_only, *flags], tmp_path / "flags", patch=patched(watch_logits))
    for name in ("eval_predictions.json", "eval_nbest_predictions.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "flags" / name).read_bytes()
    assert len(read(tmp_path, "plain/eval_predictions.json")) == 10


@pytest.mark.parametrize("processes, nan_rank", [(1, 0), (2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_logits_that_are_not_finite_stop_the_evaluation(processes, nan_rank, evaluate_only, tmp_path):
    how = {"patch": patched(watch_logits), "NAN_RANK": str(nan_rank)}
    line = fail(evaluate_only, tmp_path / "out", 2, processes, **how)
    assert "the logits of 1 questions hold NaN or infinity (first ids: dev-" in line


# ---- Which runs go on, and which are refused ----


def test_changed_settings_are_refused_by_name(killed, command, inputs, tmp_path):
    other = tiny_questions(tmp_path / "other.json", paragraphs=7)
    for flags, name in [
        (["--seed", "7"], "seed is 7, was 42"),
        (["--learning_rate", "3e-5", "--adam_beta2", "0.9"], "learning_rate is 3e-05, was 0.1"),
        (["--max_seq_length", "24"], "max_seq_length is 24, was 20"),
        (["--train_file", other], "training data is "),
        (["--model_name_or_path", tiny_bert(tmp_path / "other", seed=1)], "model_name_or_path is "),
    ]:
        line = fail([*command, *flags], killed)
        assert name in line and str(killed) in line, line
    assert "number of processes is 2, was 1" in fail(command, killed, processes=2)
    assert steps(complete_checkpoints(killed)) == [5, 10]


def test_what_does_not_change_the_training_may_differ(killed, command, inputs, tmp_path):
    """The same questions in another file, read through another cache; when to save and what to log."""
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(read(inputs["train"]), indent=1))
    out = copy(killed, tmp_path)
    flags = "--save_steps 7 --logging_steps 3 --disable_tqdm True --per_device_eval_batch_size 3".split()
    done = finish([*command, *flags, "--train_file", moved, "--cache_dir", tmp_path / "cache"], out)
    assert f"Going on from {out}/checkpoint-10." in done.err[0]
    assert steps(complete_checkpoints(out)) == [5, 10, 14, 21, 24]


def test_tokens_are_not_kept(command, tmp_path):
    tokens = ["--token", "hf_first", "--hub_token", "hf_second"]
    finish([*command, *tokens, "--max_steps", "1"], tmp_path)
    kept = [file.read_bytes() for file in (tmp_path / "run_state.json", *(tmp_path / "checkpoint-1").iterdir())]
    assert len(kept) > 5 and not any(b"hf_first" in data or b"hf_second" in data for data in kept)


def test_incomplete_checkpoints_are_named_and_never_loaded(killed, command, tmp_path):
    out = copy(killed, tmp_path)
    (out / "checkpoint-10/checkpoint_complete.json").unlink()
    (out / "checkpoint-20").mkdir()
    done = finish(command, out)
    assert f"Incomplete, so not loaded: {out}/checkpoint-10, {out}/checkpoint-20." in done.err[0]
    assert f"Going on from {out}/checkpoint-5." in done.err[0]
    assert steps(complete_checkpoints(out)) == [5, 10, 15, 20, 24]


def test_named_checkpoint(killed, command, never_stopped, tmp_path):
    out = copy(killed, tmp_path)
    (out / "checkpoint-10/checkpoint_complete.json").unlink()
    named = [*command, "--resume_from_checkpoint"]
    new = tmp_path / "new"
    assert f"the checkpoint {out}/checkpoint-10 is incomplete" in fail([*named, out / "checkpoint-10"], new)
    assert f"{out}/checkpoint-7: there is no such folder" in fail([*named, out / "checkpoint-7"], new)
    assert "seed is 1, was 42" in fail([*named, out / "checkpoint-5", "--seed", "1"], new)
    finish([*named, out / "checkpoint-5"], new)
    assert weights(new) == weights(never_stopped(1))


def test_overwriting_starts_anew_unless_a_launcher_restarts_it(killed, command, tmp_path):
    out = copy(killed, tmp_path)
    stop = At(f"{TRAINER}.training_step", 15)
    command = [*command, "--overwrite_output_dir"]
    done = launch.run(*command, "--output_dir", out, at=stop, TORCHELASTIC_RESTART_COUNT="1")
    assert f"Going on from {out}/checkpoint-10." in done.err[0]
    done = launch.run(*command, "--output_dir", out, at=stop, SLURM_RESTART_COUNT="1")
    assert f"Going on from {out}/checkpoint-15." in done.err[0]
    refused = fail([*command, "--model_name_or_path", out / "checkpoint-5"], out)
    assert f"--overwrite_output_dir would remove --model_name_or_path {out}/checkpoint-5" in refused
    done = launch.run(*command, "--output_dir", out, at=stop, TORCHELASTIC_RESTART_COUNT="0")
    assert "Going on from" not in done.err[0]
    assert steps(complete_checkpoints(out)) == [5]


def test_a_trained_run_is_evaluated_again_and_never_overwritten_unasked(evaluating, never_stopped, tmp_path):
    out = copy(never_stopped(1, evaluates=True), tmp_path)
    for checkpoint in complete_checkpoints(out):
        shutil.rmtree(checkpoint)
    before = weights(out)
    assert "seed is 1, was 42" in fail([*evaluating, "--seed", "1"], out)
    assert "Training was finished before" in finish(evaluating, out).err[0]
    done = finish([*evaluating, "--overwrite_output_dir"], out, TORCHELASTIC_RESTART_COUNT="1")
    assert "Training was finished before" in done.err[0]
    assert weights(out) == before


def test_checkpoints_of_weights_alone_are_not_resumed(command, tmp_path):
    command = [*command, "--save_only_model"]
    launch.run(*command, "--output_dir", tmp_path, at=At(f"{TRAINER}.training_step", 27))
    assert "--save_only_model" in fail([*command, "--resume_from_checkpoint", tmp_path / "checkpoint-10"], tmp_path)
    assert "seed is 1, was 42" in fail([*command, "--seed", "1"], tmp_path)
    assert "Going on from" not in finish(command, tmp_path).err[0]


def test_complete_checkpoints_by_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint-3-old", "run-4"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-20":
            (tmp_path / name / "checkpoint_complete.json").write_text("{}")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert steps(complete_checkpoints(tmp_path)) == [9, 100]
    assert steps(incomplete_checkpoints(tmp_path)) == [20]
    assert complete_checkpoints(tmp_path / "missing") == []


# ---- Other versions of transformers ----


def without_a_part():
    del Trainer._save_checkpoint


def test_a_trainer_that_lacks_a_part_is_refused_by_name_before_training(command, tmp_path):
    line = fail(command, tmp_path / "out", patch=patched(without_a_part))
    assert f"the Trainer of transformers {transformers.__version__} has no _save_checkpoint, which" in line
    assert not (tmp_path / "out").exists()
