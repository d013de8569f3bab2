"""The order of the windows, stopping and going on, full disks, losses that are not finite, and what is refused."""

import json
import os
import pickle
import resource
import shutil
import signal
import weakref
from pathlib import Path

import launch
import pytest
import torch
import transformers
from launch import At
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_questions
from transformers import Trainer

from qa.run_folder import broken_checkpoints, whole_checkpoints
from run_squad import parse_arguments
from trainer_qa import QuestionAnsweringTrainer, check_private_parts

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
# 48 windows of 16 questions, 12 steps an epoch on one process.
FLAGS = """
    --do_train --max_seq_length 20 --doc_stride 5 --num_train_epochs 2 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --learning_rate 1e-1 --logging_steps 5 --save_strategy steps --save_steps 5
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
    return ["--model_name_or_path", inputs["model"], "--train_file", inputs["train"], *FLAGS]


@pytest.fixture(scope="module")
def evaluating(inputs, command):
    flags = "--do_eval --eval_strategy steps --eval_steps 5 --load_best_model_at_end".split()
    return [*command, *flags, "--validation_file", inputs["dev"]]


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


def finish(command, out, processes=1, **how):
    done = launch.run(*command, "--output_dir", out, processes=processes, **how)
    assert done.exit_codes == [0] * processes, done.err[0][-2000:]
    return done


def fails(command, out, status, processes=1, **how):
    """Runs a command that must fail on all processes alike; returns its last line of errors."""
    done = launch.run(*command, "--output_dir", out, processes=processes, **how)
    assert done.exit_codes == [status] * processes, done.err[0][-2000:]
    assert "Traceback" not in "".join(done.err)
    assert not any(done.out[1:]) and not any(done.err[1:]), "only the main process speaks"
    line = done.err[0].strip().splitlines()[-1]
    assert line.startswith("run_squad.py: ")
    return line


def read(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def weights(folder) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def steps(checkpoints) -> list[int]:
    return [int(folder.rsplit("-", 1)[1]) for folder in checkpoints]


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
            step = [trainer.state.global_step, inputs["example_index"].tolist(), inputs["input_ids"].tolist()]
            file.write(json.dumps(step) + "\n")

    wrap("training_step", record)


def order_of(command, out, order, processes=1, **how) -> list[list]:
    """[[step, question numbers, input ids], ...] of the micro-batches of each rank."""
    launch.run(*command, "--output_dir", out, processes=processes, patch=patched(record_order), ORDER=order, **how)
    ranks = [[json.loads(line) for line in open(f"{order}{rank}")] for rank in range(processes)]
    for rank in range(processes):
        os.remove(f"{order}{rank}")
    return ranks


@pytest.mark.parametrize(
    "sampling, processes",
    [("group_by_length", 1), ("group_by_length", 2), ("random", 2), ("batch_rebalance", 2)],
)
def test_order_is_by_seed_and_epoch_and_survives_a_resume(sampling, processes, command, tmp_path):
    command = [*command, "--train_sampling_strategy", sampling]
    order = str(tmp_path / "order")
    whole = order_of(command, tmp_path / "whole", order, processes)
    steps_per_epoch = 12 // processes
    windows = [
        sorted(
            [token for token in window if token != 0]  # without padding
            for rank in whole
            for step, _, ids in rank
            if step // steps_per_epoch == epoch
            for window in ids
        )
        for epoch in (0, 1)
    ]
    assert len(windows[0]) == 48 and windows[0] == windows[1], "each window once an epoch"
    first_epoch = [[ids for step, ids, _ in rank if step < steps_per_epoch] for rank in whole]
    second_epoch = [[ids for step, ids, _ in rank if step >= steps_per_epoch] for rank in whole]
    assert first_epoch != second_epoch

    saved = 20 // processes // 5 * 5  # within the second epoch
    killed = At(f"{TRAINER}.training_step", 2 * saved + 4)
    first = order_of(command, tmp_path / "killed", order, processes, at=killed)
    second = order_of(command, tmp_path / "killed", order, processes)
    assert steps(whole_checkpoints(tmp_path / "killed"))[-1] == 24 // processes
    assert [rank[0][0] for rank in second] == [saved] * processes
    for rank in range(processes):
        assert [entry for entry in first[rank] if entry[0] < saved] + second[rank] == whole[rank]

    if processes == 1:
        assert order_of([*command, "--seed", "7"], tmp_path / "other", order) != whole


def test_evaluating_does_not_move_the_training(never_stopped):
    last = "checkpoint-24"  # the model itself is the best one where there are evaluations
    assert weights(never_stopped(1) / last) == weights(never_stopped(1, evaluates=True) / last)


# ---- What is reported ----


@pytest.mark.parametrize("processes", [1, 2])
def test_train_loss_and_rate_are_those_of_all_processes(processes, command, tmp_path):
    """36 windows of real data are seen in 9 of 12 steps, and 48 more would be in 3 epochs of padded batches of 5."""
    finish([*command, "--logging_steps", "1"], tmp_path / "each", processes)
    finish([*command, "--logging_steps", "1000"], tmp_path / "none", processes)
    losses = [
        entry["loss"] for entry in read(tmp_path / "each", "trainer_state.json")["log_history"] if "loss" in entry
    ]
    assert len(losses) == 24 // processes
    for name in ("each", "none"):
        metrics = read(tmp_path / name, "train_results.json")
        assert metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert metrics["train_samples"] == 48
    finish([*command, "--per_device_train_batch_size", "5", "--max_steps", "11"], tmp_path / "padded", processes)
    metrics = read(tmp_path / "padded", "train_results.json")
    # Steps of 10 windows a process: 5 an epoch on one, 3 on two, of which the last is filled up.
    seen = {1: 2 * 48 + 10, 2: 3 * 48 + 2 * 20}[processes]
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(seen, rel=1e-2)


def test_only_the_main_process_prints(evaluating, tmp_path):
    done = finish(evaluating, tmp_path, 2)
    assert done.out[1] == "" and done.err[1] == ""
    assert done.out[0].count('"f1"') == 1


# ---- Signals ----


@pytest.mark.parametrize(
    "at, processes, step",
    [
        (At(f"{TRAINER}.training_step", 14, signal=signal.SIGTERM), 1, 7),
        (At(f"{TRAINER}.training_step", 24, signal=signal.SIGINT), 1, 12),  # an epoch's last step
        (At(f"{TRAINER}.training_step", 14, rank=1, signal=signal.SIGTERM), 2, 7),
        (At(f"{TRAINER}._save_rng_state", 1, signal=signal.SIGTERM), 1, 5),
        (At("run_squad.write_predictions", 1, signal=signal.SIGTERM), 1, 5),  # the evaluation is done
        (At(f"{TRAINER}.prediction_step", 2, signal=signal.SIGTERM), 1, 5),  # the evaluation is put off
        (At(f"{TRAINER}.prediction_step", 2, rank=1, signal=signal.SIGINT), 2, 5),
        (At(f"{TRAINER}.training_step", 48, signal=signal.SIGTERM), 1, 24),  # the run's last step
    ],
)
def test_signal_saves_and_the_same_command_goes_on(at, processes, step, evaluating, never_stopped, tmp_path):
    line = fails(evaluating, tmp_path, 128 + at.signal, processes, at=at)
    checkpoint = whole_checkpoints(tmp_path)[-1]
    assert checkpoint.endswith(f"checkpoint-{step}")
    assert f"stopped by {at.signal.name}" in line and checkpoint in line and "the same command again" in line
    assert read(tmp_path, "run_state.json")["status"] == "training"
    finish(evaluating, tmp_path, processes)
    whole = never_stopped(processes, evaluates=True)
    assert weights(tmp_path) == weights(whole)
    of_stopped, of_whole = (
        [
            [(entry["step"], entry["eval_f1"]) for entry in state["log_history"] if "eval_f1" in entry],
            (state["best_metric"], state["best_global_step"]),
        ]
        for state in (read(folder, "trainer_state.json") for folder in (tmp_path, whole))
    )
    assert of_stopped == of_whole


def send_signals_again():
    wrap("training_step", lambda trainer, *_: trainer.state.global_step >= 6 and os.kill(os.getpid(), signal.SIGINT))


def test_signals_may_come_often(command, tmp_path):
    """torchrun hands on Ctrl-C to processes that the terminal has told already, and SIGTERM after it."""
    at = At(f"{TRAINER}._save", 2, signal=signal.SIGTERM)
    line = fails(command, tmp_path, 130, at=at, patch=patched(send_signals_again))
    assert "SIGINT" in line and steps(whole_checkpoints(tmp_path)) == [5, 7]


def test_signal_after_the_last_step_waits_for_the_model(evaluating, tmp_path):
    line = fails(evaluating, tmp_path, 143, at=At(f"{TRAINER}.save_state", signal=signal.SIGTERM))
    assert "the same command again" in line
    assert read(tmp_path, "run_state.json")["status"] == "trained"
    before = weights(tmp_path)
    done = finish(evaluating, tmp_path)
    assert "Going on from" not in done.err[0]
    assert weights(tmp_path) == before and read(tmp_path, "run_state.json")["status"] == "finished"


def test_signal_with_every_way_of_saving(evaluating, tmp_path):
    at = At(f"{TRAINER}.training_step", 24, signal=signal.SIGTERM)
    for strategy, evaluation in (("no", "epoch"), ("epoch", "epoch"), ("best", "epoch"), ("best", "steps")):
        out = tmp_path / f"{strategy}-{evaluation}"
        flags = [*evaluating, "--save_strategy", strategy, "--eval_strategy", evaluation]
        if strategy == "no":
            flags.remove("--load_best_model_at_end")
        fails(flags, out, 143, at=at)
        assert steps(whole_checkpoints(out))[-1] == 12


# ---- A disk that fills up ----


def limit_file_size():
    """From the second checkpoint on, no file can grow over FILE_SIZE bytes on the rank that is to fail."""

    def limit(trainer, *_):
        if trainer.state.global_step == 10 and os.environ["FULL_RANK"] == os.environ.get("RANK", "0"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE"]), resource.RLIM_INFINITY))

    wrap("_save_checkpoint", limit)


@pytest.mark.parametrize(
    "file, processes, full_rank",
    [("model.safetensors", 1, "0"), ("optimizer.pt", 2, "0"), ("rng_state_1.pth", 2, "1")],
)
def test_full_disk_leaves_what_was_whole(file, processes, full_rank, command, never_stopped, tmp_path):
    size = Path(whole_checkpoints(never_stopped(processes))[0], file).stat().st_size
    how = {"patch": patched(limit_file_size), "FILE_SIZE": str(size - 1000), "FULL_RANK": full_rank}
    line = fails([*command, "--save_total_limit", "1"], tmp_path, 1, processes, **how)
    assert "cannot write" in line and "checkpoint-10" in line
    assert steps(whole_checkpoints(tmp_path)) == [5] and not broken_checkpoints(tmp_path)
    finish(command, tmp_path, processes)
    assert weights(tmp_path) == weights(never_stopped(processes))


def limit_answers():
    import run_squad

    original = run_squad.write_predictions

    def limited(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        try:
            original(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    run_squad.write_predictions = limited


def test_full_disk_while_answers_are_written_keeps_the_earlier_ones(evaluating, never_stopped, tmp_path):
    shutil.copytree(never_stopped(1, evaluates=True), tmp_path, dirs_exist_ok=True)
    evaluate = [*"--do_eval --max_seq_length 20 --doc_stride 5 --model_name_or_path".split(), tmp_path]
    evaluate += ["--validation_file", evaluating[-1]]
    before = {file.name: file.read_bytes() for file in tmp_path.glob("eval_*.json")}
    assert len(before) == 3
    for processes in (1, 2):
        assert "cannot write" in fails(evaluate, tmp_path, 1, processes, patch=patched(limit_answers))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("eval_*.json")} == before


# ---- Losses that are not finite ----


def spoil_loss():
    """At the third step, the loss of the second micro-batch is not a number on the last rank."""
    original = QuestionAnsweringTrainer.compute_loss
    last_rank = int(os.environ.get("WORLD_SIZE", "1")) - 1

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        spoiled = self.state.global_step == 2 and self.args.process_index == last_rank and self._step_losses
        return loss * float("nan") if spoiled else loss

    QuestionAnsweringTrainer.compute_loss = compute_loss
    record_order()


def spoil_gradient():
    """At the third step the loss is finite, but a gradient is not."""

    def spoil(trainer, model, *_):
        if trainer.state.global_step == 2 and trainer.args.process_index == 0:
            next(model.parameters()).grad.view(-1)[3] = float("inf")

    wrap("_get_grad_norm", spoil)
    wrap("_clip_grad_norm", spoil)


@pytest.mark.parametrize("processes", [1, 2])
def test_loss_that_is_not_finite_stops_the_run(processes, command, inputs, never_stopped, tmp_path):
    order = str(tmp_path / "order")
    out = tmp_path / "out"
    line = fails([*command, "--save_steps", "1"], out, 1, processes, patch=patched(spoil_loss), ORDER=order)
    batch = [json.loads(line) for line in open(f"{order}{processes - 1}")][5][1]
    ids = [qa["id"] for a in read(inputs["train"])["data"] for p in a["paragraphs"] for qa in p["qas"]]
    assert f"the loss at step 3 is not finite; questions in the batch: {', '.join(ids[i] for i in batch)}." in line
    assert steps(whole_checkpoints(out)) == [1, 2]
    finish(command, out, processes)
    assert weights(out) == weights(never_stopped(processes))


def test_steps_that_are_not_finite_are_skipped_as_often_as_allowed(command, tmp_path):
    command = [*command, "--save_steps", "1"]
    how = {"patch": patched(spoil_loss), "ORDER": str(tmp_path / "order")}
    done = finish([*command, "--max_nonfinite_steps", "1"], tmp_path / "out", **how)
    assert "skipped (1 of 1)" in done.err[0]
    assert weights(tmp_path / "out/checkpoint-3") == weights(tmp_path / "out/checkpoint-2")
    assert weights(tmp_path / "out/checkpoint-4") != weights(tmp_path / "out/checkpoint-3")
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out/model.safetensors").values())


def test_gradient_that_is_not_finite_stops_the_run(command, tmp_path):
    for flags in ([], ["--max_grad_norm", "0"]):
        out = tmp_path / str(len(flags))
        line = fails([*command, "--save_steps", "1", *flags], out, 1, patch=patched(spoil_gradient))
        assert "the gradient at step 3 is not finite; questions in the batch: train-" in line
        assert steps(whole_checkpoints(out)) == [1, 2]


# ---- Logits in evaluation ----


def watch_logits():
    """No batch's logits outlive the next batch; where NAN_RANK says so, that rank's of the second are not numbers."""
    original, earlier = Trainer.prediction_step, []

    def prediction_step(self, *args, **kwargs):
        assert not any(logits() is not None for logits in earlier)
        loss, logits, labels = original(self, *args, **kwargs)
        if len(earlier) == 1 and os.environ.get("NAN_RANK") == os.environ.get("RANK", "0"):
            logits[1][0, 3] = float("nan")
        earlier.append(weakref.ref(logits[0]))
        with open(os.environ["BATCHES"] + os.environ.get("RANK", "0"), "a") as file:
            file.write("x")
        return loss, logits, labels

    Trainer.prediction_step = prediction_step


@pytest.fixture
def evaluate_only(inputs):
    flags = "--do_eval --max_seq_length 20 --doc_stride 5 --per_device_eval_batch_size 3".split()
    return [*flags, "--model_name_or_path", inputs["model"], "--validation_file", inputs["dev"]]


@pytest.mark.parametrize("processes", [1, 2])
def test_logits_do_not_outlive_their_batch(processes, evaluate_only, evaluating, tmp_path):
    """With any of the flags that have the Trainer keep more; in an evaluation within training as well."""
    finish(evaluate_only, tmp_path / "plain")
    how = {"patch": patched(watch_logits), "BATCHES": str(tmp_path / "batches")}
    keeping = "--include_for_metrics inputs loss --eval_accumulation_steps 2 --eval_use_gather_object".split()
    finish([*evaluate_only, *keeping], tmp_path / "kept", processes, **how)
    assert len((tmp_path / f"batches{processes - 1}").read_text()) == 10 // processes  # 30 windows
    answers = [read(tmp_path / out, "eval_predictions.json") for out in ("plain", "kept")]
    assert answers[0] == answers[1] and len(answers[0]) == 10
    if processes == 1:
        n_best = [(tmp_path / out / "eval_nbest_predictions.json").read_bytes() for out in ("plain", "kept")]
        assert n_best[0] == n_best[1]
        finish(evaluating, tmp_path / "training", **how)


@pytest.mark.parametrize("processes, nan_rank", [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_logits_that_are_not_finite_stop_the_evaluation_at_their_batch(processes, nan_rank, evaluate_only, tmp_path):
    how = {"patch": patched(watch_logits), "BATCHES": str(tmp_path / "batches"), "NAN_RANK": str(nan_rank)}
    line = fails(evaluate_only, tmp_path / "out", 2, processes, **how)
    assert "the logits of 1 questions hold NaN or infinity (first ids: dev-" in line
    assert [(tmp_path / f"batches{rank}").read_text() for rank in range(processes)] == ["xx"] * processes


# ---- Which runs go on, and which are refused ----


@pytest.fixture(scope="module")
def killed(command, tmp_path_factory):
    """The output_dir of a run that was killed between the checkpoints at step 10 and 15."""
    out = tmp_path_factory.mktemp("killed") / "out"
    launch.run(*command, "--output_dir", out, at=At(f"{TRAINER}.training_step", 27))
    assert steps(whole_checkpoints(out)) == [5, 10]
    return out


def test_changed_settings_are_refused_by_name(killed, command, inputs, tmp_path):
    other = tiny_questions(tmp_path / "other.json", paragraphs=7)
    for flag, value, name in [
        ("--seed", "7", "seed is 7, was 42"),
        ("--per_device_train_batch_size", "4", "per_device_train_batch_size is 4, was 2"),
        ("--learning_rate", "3e-5", "learning_rate is 3e-05, was 0.1"),
        ("--max_seq_length", "24", "max_seq_length is 24, was 20"),
        ("--train_file", other, "training data is "),
        ("--model_name_or_path", tiny_bert(tmp_path / "other", seed=1), "model_name_or_path is "),
    ]:
        line = fails([*command, flag, value], killed, 2)
        assert name in line and "checkpoint-10" in line, line
    line = fails(command, killed, 2, processes=2)
    assert "number of processes is 2, was 1" in line
    assert steps(whole_checkpoints(killed)) == [5, 10]


def test_data_are_known_by_content(killed, command, inputs, tmp_path):
    """The same questions in another file, read through another cache, are the same run."""
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(read(inputs["train"]), indent=1))
    copied = copy(killed, tmp_path)
    done = finish([*command, "--train_file", moved, "--cache_dir", tmp_path / "cache"], copied)
    assert "checkpoint-10" in done.err[0]


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_half_written_checkpoints_are_named_and_never_loaded(killed, command, tmp_path):
    out = copy(killed, tmp_path)
    (out / "checkpoint-10/checkpoint_complete.json").unlink()
    (out / "checkpoint-20").mkdir()
    done = finish(command, out)
    assert f"Not whole, so not loaded: {out}/checkpoint-10, {out}/checkpoint-20." in done.err[0]
    assert f"Going on from {out}/checkpoint-5." in done.err[0]
    assert steps(whole_checkpoints(out)) == [5, 10, 15, 20, 24]


def test_named_checkpoint(killed, command, never_stopped, tmp_path):
    out = copy(killed, tmp_path)
    (out / "checkpoint-10/checkpoint_complete.json").unlink()
    line = fails([*command, "--resume_from_checkpoint", out / "checkpoint-10"], tmp_path / "new", 2)
    assert f"the checkpoint {out}/checkpoint-10 is not whole" in line
    line = fails([*command, "--resume_from_checkpoint", out / "checkpoint-7"], tmp_path / "new", 2)
    assert f"{out}/checkpoint-7: there is no such folder" in line
    line = fails([*command, "--seed", "1", "--resume_from_checkpoint", out / "checkpoint-5"], tmp_path / "new", 2)
    assert "seed is 1, was 42" in line
    finish([*command, "--resume_from_checkpoint", out / "checkpoint-5"], tmp_path / "new")
    assert weights(tmp_path / "new") == weights(never_stopped(1))


def test_overwriting_starts_anew_unless_a_launcher_restarts_it(killed, command, tmp_path):
    out = copy(killed, tmp_path)
    stop = At(f"{TRAINER}.training_step", 15)
    command = [*command, "--overwrite_output_dir"]
    done = launch.run(*command, "--output_dir", out, at=stop, TORCHELASTIC_RESTART_COUNT="1")
    assert f"Going on from {out}/checkpoint-10." in done.err[0]
    done = launch.run(*command, "--output_dir", out, at=stop, SLURM_RESTART_COUNT="1")
    assert f"Going on from {out}/checkpoint-15." in done.err[0]
    done = launch.run(*command, "--output_dir", out, at=stop, TORCHELASTIC_RESTART_COUNT="0")
    assert "Going on from" not in done.err[0]
    assert steps(whole_checkpoints(out)) == [5]


def test_finished_and_trained_runs_are_not_overwritten(evaluating, tmp_path):
    launch.run(*evaluating, "--output_dir", tmp_path, at=At("qa.run_folder.write_run_state", 3))
    for checkpoint in whole_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    before = weights(tmp_path)
    assert "seed is 1, was 42" in fails([*evaluating, "--seed", "1"], tmp_path, 2)
    finish(evaluating, tmp_path)
    assert "holds a finished run" in fails(evaluating, tmp_path, 2)
    done = finish(evaluating, tmp_path, TORCHELASTIC_RESTART_COUNT="1")  # killed when all was done but its exit
    assert "Training was finished before" in done.err[0]
    assert weights(tmp_path) == before


def test_checkpoints_of_weights_alone_are_not_resumed(command, tmp_path):
    command = [*command, "--save_only_model"]
    launch.run(*command, "--output_dir", tmp_path, at=At(f"{TRAINER}.training_step", 27))
    line = fails([*command, "--resume_from_checkpoint", tmp_path / "checkpoint-10"], tmp_path, 2)
    assert "--save_only_model" in line
    assert "seed is 1, was 42" in fails([*command, "--seed", "1"], tmp_path, 2)
    done = finish(command, tmp_path)
    assert "Going on from" not in done.err[0]


def test_save_steps_may_change(killed, command, tmp_path):
    out = copy(killed, tmp_path)
    finish([*command, "--save_steps", "7"], out)
    assert steps(whole_checkpoints(out)) == [5, 10, 14, 21, 24]


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_checkpoints_are_data_not_code(killed, command, tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / name).mkdir()
        out = copy(killed, tmp_path / name)
        with open(out / "checkpoint-10" / name, "wb") as file:
            pickle.dump(Hostile(str(tmp_path / "pwned")), file)
        torch.save(Hostile(str(tmp_path / "pwned")), out / "training_args.bin")
        done = launch.run(*command, "--output_dir", out)
        assert (done.exit_codes == [0]) == (name == "training_args.bin"), done.err[0][-2000:]
        assert not (tmp_path / "pwned").exists()


def test_whole_checkpoints_by_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint-3-old", "run-4"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-20":
            (tmp_path / name / "checkpoint_complete.json").write_text("{}")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert steps(whole_checkpoints(tmp_path)) == [9, 100]
    assert steps(broken_checkpoints(tmp_path)) == [20]
    assert whole_checkpoints(tmp_path / "missing") == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fsdp_needs_gpus(tmp_path):
    argv = ["--model_name_or_path", "x", "--output_dir", str(tmp_path), "--do_train", "--train_file", "x"]
    with pytest.raises(ValueError, match="--fsdp needs GPUs"):
        parse_arguments([*argv, "--fsdp", "full_shard"])
    with pytest.raises(ValueError, match="--enable_jit_checkpoint"):
        parse_arguments([*argv, "--enable_jit_checkpoint"])


# ---- Other versions of transformers ----


def test_a_trainer_that_lacks_a_part_is_refused_by_name(monkeypatch):
    check_private_parts(Trainer)
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ImportError) as refused:
        check_private_parts(Trainer)
    assert str(refused.value) == (
        f"the Trainer of transformers {transformers.__version__} has no _run_epoch, which this program needs; it was "
        "tested with 5.18.0 to 5.24.0: pip install transformers==5.24.0"
    )
    monkeypatch.setattr("trainer_qa.PRIVATE_ATTRIBUTES", ["_tr_loss", "_no_such_sum"])
    with pytest.raises(ImportError, match="has no _run_epoch, _no_such_sum, which"):
        check_private_parts(Trainer)


def without_a_part():
    del Trainer._run_epoch


def test_it_is_one_line_before_training(command, tmp_path):
    stopped = launch.run(*command, "--output_dir", tmp_path / "out", patch=patched(without_a_part))
    assert stopped.exit_codes == [1]
    assert "has no _run_epoch" in stopped.err[0].splitlines()[-1]
    assert "Traceback" not in stopped.err[0]
    assert not (tmp_path / "out").exists()
