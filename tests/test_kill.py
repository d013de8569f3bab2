"""A run killed at any moment, given the same command again, ends bit for bit as one that was never killed."""

import json
import shutil
import signal
from pathlib import Path

import launch
import pytest
from launch import At
from safetensors.torch import load_file, save_file
from tiny import tiny_bert, tiny_questions, with_google_names

from qa.run_folder import WHOLE_CHECKPOINT, broken_checkpoints, whole_checkpoints
from trainer_qa import QuestionAnsweringTrainer

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
# 48 windows of 16 questions make 12 steps an epoch on one process, 29 steps the run; every step draws random numbers
# for dropout. Checkpoints at 6, 12 (an epoch's end), 18 (the best), 24 and 29.
FLAGS = """
    --do_train --do_eval --max_seq_length 20 --doc_stride 5 --num_train_epochs 2.4 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --learning_rate 1e-1 --warmup_steps 3 --logging_steps 2
    --eval_strategy steps --eval_steps 6 --save_steps 6 --save_total_limit 1 --load_best_model_at_end
""".split()

# Calls are counted from the start of the process: two training steps a step, four prediction steps an evaluation.
MOMENTS = {
    "before the first step": At(f"{TRAINER}.training_step", 1),
    "before the first checkpoint": At(f"{TRAINER}.training_step", 7),
    "training, in the first epoch": At(f"{TRAINER}.training_step", 19),
    "training, in the last epoch": At(f"{TRAINER}.training_step", 53),
    "evaluating": At(f"{TRAINER}.prediction_step", 7),
    "evaluated, not saved": At("run_squad.write_predictions", 2, after=True),
    "saving, before the optimizer": At(f"{TRAINER}._save", 2, after=True),
    "saving, before the random state": At(f"{TRAINER}._save_rng_state", 3),
    "saving, before the mark": At("qa.run_folder._flush_to_disk", 2, after=True),
    "saved, before the rotation": At(f"{TRAINER}._rotate_checkpoints", 3),
    "rotating, the mark removed": At("pathlib.Path.unlink", 1, after=True),
    "rotating, half of the files removed": At("os.unlink", 6, after=True),
    "trained, before the model": At(f"{TRAINER}.save_model", 6),
    "trained, half of the model saved": "test_kill.kill_amid_the_last_save",
    "trained, before that is noted": At("qa.run_folder.write_run_state", 2),
    "trained": At("qa.run_folder.write_run_state", 2, after=True),
    "evaluating the trained model": At("run_squad.write_predictions", 6),
    "before the end is noted": At("qa.run_folder.write_run_state", 3),
}


def kill_amid_the_last_save():
    """When the third file of the model that training came to is about to take its place."""
    save = QuestionAnsweringTrainer._save

    def watched(self, output_dir=None, state_dict=None):
        if output_dir in (None, self.args.output_dir):
            launch.signal_at(At("os.replace", 3))
        save(self, output_dir, state_dict)

    QuestionAnsweringTrainer._save = watched


# The names of the LayerNorms in the checkpoint that the run starts from: ours, or those of Google's checkpoints.
@pytest.fixture(scope="module", params=["weight and bias", "gamma and beta"])
def command(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_bert(folder / "model")
    return [
        *("--model_name_or_path", with_google_names(model) if request.param == "gamma and beta" else model),
        *("--train_file", tiny_questions(folder / "train.json", paragraphs=8)),
        *("--validation_file", tiny_questions(folder / "dev.json", paragraphs=5)),
        *FLAGS,
    ]


@pytest.fixture(scope="module")
def never_killed(command, tmp_path_factory):
    """What a run that was never killed comes to, by number of processes."""

    results = {}

    def get(processes):
        if processes not in results:
            out = tmp_path_factory.mktemp("never_killed") / str(processes)
            finish(command, out, processes)
            results[processes] = outcome(out)
        return results[processes]

    return get


def finish(command, out, processes=1):
    done = launch.run(*command, "--output_dir", out, processes=processes)
    assert done.exit_codes == [0] * processes, done.err[0][-2000:]
    return done


def outcome(out: Path) -> dict:
    """All that must be equal: weights, answers, scores, the whole history, the checkpoints."""

    def without_times(metrics):
        return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}

    state = json.loads((out / "trainer_state.json").read_text())
    files = ("model.safetensors", "config.json", "eval_predictions.json", "eval_nbest_predictions.json")
    return {
        **{name: (out / name).read_bytes() for name in files},
        "eval": without_times(json.loads((out / "eval_results.json").read_text())),
        "train_loss": json.loads((out / "train_results.json").read_text())["train_loss"],
        "history": [without_times(entry) for entry in state["log_history"]],
        "best": (state["best_metric"], state["best_global_step"], Path(state["best_model_checkpoint"]).name),
        "best model": (out / Path(state["best_model_checkpoint"]).name / "model.safetensors").read_bytes(),
        "checkpoints": [Path(folder).name for folder in whole_checkpoints(out)],
        "status": json.loads((out / "run_state.json").read_text())["status"],
    }


def test_reference_run_exercises_what_it_should(never_killed):
    done = never_killed(1)
    scores = [entry["eval_f1"] for entry in done["history"] if "eval_f1" in entry]
    assert len(scores) == 5 and len(set(scores)) > 1
    assert done["best"][1] not in (0, 29), "the best model should not be the last one"
    assert done["checkpoints"] == [done["best"][2], "checkpoint-29"]
    assert done["model.safetensors"] == done["best model"]
    assert not any(name in done["model.safetensors"] for name in (b"gamma", b"beta"))
    assert done["status"] == "finished"


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_once(moment, command, never_killed, tmp_path):
    at = MOMENTS[moment]
    killed = launch.run(*command, "--output_dir", tmp_path, **({"patch": at} if isinstance(at, str) else {"at": at}))
    assert killed.exit_codes == [-signal.SIGKILL], killed.err[0][-2000:]
    if moment.startswith(("saving", "rotating")):
        assert broken_checkpoints(tmp_path)
    finish(command, tmp_path)
    assert outcome(tmp_path) == never_killed(1)


def test_killed_again_and_again_with_two_processes(command, never_killed, tmp_path):
    moments = [
        At(f"{TRAINER}.training_step", 5, rank=1),
        At("qa.run_folder._flush_to_disk", 1, after=True),
        At(f"{TRAINER}._save_rng_state", 2, rank=1),
        At("pathlib.Path.unlink", 1, after=True),
        At(f"{TRAINER}.prediction_step", 3, rank=1),
        At(f"{TRAINER}._rotate_checkpoints", 1),
        At("qa.run_folder.write_run_state", 2),
        At("qa.run_folder.write_run_state", 2, after=True),
        At("run_squad.write_predictions", 1),
    ]
    for moment in moments:
        killed = launch.run(*command, "--output_dir", tmp_path, processes=2, at=moment)
        assert killed.exit_codes[moment.rank] == -signal.SIGKILL, (moment, killed.err[0][-2000:])
    finish(command, tmp_path, processes=2)
    assert outcome(tmp_path) == never_killed(2)


@pytest.mark.parametrize("strategy, sampling", [("no", "sequential"), ("epoch", "random"), ("best", "batch_rebalance")])
def test_killed_twice_with_other_flags(strategy, sampling, command, tmp_path):
    command = command + ["--save_strategy", strategy, "--train_sampling_strategy", sampling]
    if strategy == "no":
        command.remove("--load_best_model_at_end")
    if strategy == "epoch":
        command += ["--eval_strategy", "epoch"]
    finish(command, tmp_path / "never_killed")
    out = tmp_path / "killed"
    killed = launch.run(*command, "--output_dir", out, at=At(f"{TRAINER}.training_step", 37))
    assert killed.exit_codes == [-signal.SIGKILL]
    killed = launch.run(*command, "--output_dir", out, at=At("qa.run_folder.write_run_state", 2))
    assert killed.exit_codes == [-signal.SIGKILL]
    finish(command, out)
    for name in ("model.safetensors", "eval_predictions.json"):
        assert (out / name).read_bytes() == (tmp_path / "never_killed" / name).read_bytes()
    losses = [json.loads((folder / "train_results.json").read_text())["train_loss"] for folder in tmp_path.iterdir()]
    assert losses[0] == losses[1]


def test_evaluation_at_an_epochs_end_comes_before_the_checkpoint_of_its_last_step(command, tmp_path):
    """Else a run killed in between would go on without it."""
    command = [flag for flag in command if flag != "--load_best_model_at_end"] + ["--eval_strategy", "epoch"]
    killed = launch.run(*command, "--output_dir", tmp_path, at=At("run_squad.write_predictions", 1))
    assert killed.exit_codes == [-signal.SIGKILL]
    assert [Path(folder).name for folder in whole_checkpoints(tmp_path)] == ["checkpoint-6"]
    finish(command, tmp_path)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_f1" in entry] == [12, 24, 29]


def test_a_copied_output_dir_keeps_its_best_model(command, never_killed, tmp_path):
    """Checkpoints name the best one by its path; a run goes on from a copy that lies elsewhere."""
    launch.run(*command, "--output_dir", tmp_path / "first", at=At(f"{TRAINER}.training_step", 53))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    finish(command, tmp_path / "second")
    done = outcome(tmp_path / "second")
    assert done["best"] == never_killed(1)["best"]
    assert done["model.safetensors"] == never_killed(1)["model.safetensors"]


@pytest.mark.parametrize("google_names", [False, True])
def test_a_checkpoint_by_the_names_of_the_first_file_is_resumed(google_names, command, never_killed, tmp_path):
    """As earlier versions of this program saved them for Google's checkpoints."""
    launch.run(*command, "--output_dir", tmp_path, at=At(f"{TRAINER}.training_step", 19))
    if google_names:
        with_google_names(str(tmp_path / "checkpoint-6"))
    finish(command, tmp_path)
    assert outcome(tmp_path) == never_killed(1)


@pytest.mark.parametrize("moment", ["resuming", "loading the best model"])
def test_a_weight_that_is_missing_or_left_over_stops_the_run(moment, command, tmp_path):
    launch.run(*command, "--output_dir", tmp_path, at=At(f"{TRAINER}.training_step", 53))
    folder = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if moment == "loading the best model":
        folder = tmp_path / "checkpoint-18"
    weights = load_file(folder / "model.safetensors")
    weights["qa_outputs.offset"] = weights.pop("qa_outputs.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stopped = launch.run(*command, "--output_dir", tmp_path)
    assert stopped.exit_codes == [1]
    assert stopped.err[0].splitlines()[-1] == (
        f"run_squad.py: error: the weights in {folder} are not those of this model. missing: qa_outputs.bias; "
        "left over: qa_outputs.offset"
    )


def test_mark_is_the_last_file_of_a_checkpoint(command, tmp_path):
    launch.run(*command, "--output_dir", tmp_path, at=At(f"{TRAINER}._rotate_checkpoints", 1))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    times = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert max(times, key=times.get) == WHOLE_CHECKPOINT
