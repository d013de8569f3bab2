"""A run killed at any moment, given the same command again, ends bit for bit as one that was never killed."""

import shutil
import signal
from pathlib import Path

import launch
import pytest
from launch import At, finish
from safetensors.torch import load_file, save_file
from tiny import read, tiny_bert, tiny_questions, with_google_names, without_times

from qa.checkpoints import complete_checkpoints, incomplete_checkpoints

TRAINER = "trainer_qa.QuestionAnsweringTrainer"
TOKENIZER_SAVED = "transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained"  # after the weights
# 48 windows of 16 questions make 12 steps an epoch on one process, 30 steps the run; every step draws random numbers
# for dropout. Checkpoints at 6, 12 (an epoch's end, and the best), 18, 24 and 30.
FLAGS = """
    --do_train --do_eval --max_seq_length 20 --doc_stride 5 --num_train_epochs 2.5 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --learning_rate 1e-1 --warmup_steps 3 --logging_steps 4
    --eval_strategy steps --eval_steps 6 --save_steps 6 --save_total_limit 1 --load_best_model_at_end
    --metric_for_best_model loss --seed 7
""".split()

# Calls are counted from the start of the process: two training steps a step, four prediction steps an evaluation.
MOMENTS = {
    "training, in the last epoch": At(f"{TRAINER}.training_step", 53),
    "evaluated, not saved": At("run_squad.write_predictions", 2, after=True),
    "saving, before the marker": At("qa.checkpoints.mark_complete", 2),
    "rotating, the marker removed": At("pathlib.Path.unlink", 2, after=True),  # the first is of begin_run
    "trained, before the model": At(f"{TRAINER}.save_model", 6),
    "trained": At("qa.checkpoints.write_run_state", 2, after=True),
}
MORE_MOMENTS = {
    "before the first step": At(f"{TRAINER}.training_step", 1),
    "before the first checkpoint": At(f"{TRAINER}.training_step", 7),
    "training, in the first epoch": At(f"{TRAINER}.training_step", 19),
    "evaluating": At(f"{TRAINER}.prediction_step", 7),
    "saving, before the optimizer": At(TOKENIZER_SAVED, 2, after=True),
    "saving, before the random state": At(f"{TRAINER}._save_rng_state", 3),
    "saved, before the rotation": At("qa.checkpoints.rotate_checkpoints", 3),
    "rotating, half of the files removed": At("os.unlink", 6, after=True),
    "trained, half of the model saved": At(TOKENIZER_SAVED, 6),
    "trained, before that is noted": At("qa.checkpoints.write_run_state", 2),
    "evaluating the trained model": At("run_squad.write_predictions", 6),
}
ALL_MOMENTS = {**MOMENTS, **MORE_MOMENTS}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """From a checkpoint whose LayerNorms are named as Google's; what is saved and loaded again has today's names."""
    folder = tmp_path_factory.mktemp("inputs")
    return [
        *("--model_name_or_path", with_google_names(tiny_bert(folder / "google"))),
        *("--train_file", tiny_questions(folder / "train.json", paragraphs=8)),
        *("--validation_file", tiny_questions(folder / "dev.json", paragraphs=5)),
        *FLAGS,
    ]


@pytest.fixture(scope="module")
def never_killed(command, tmp_path_factory):
    """What a run that was never killed comes to, by number of processes."""
    results = {}

    def get(processes=1):
        if processes not in results:
            out = tmp_path_factory.mktemp("never_killed") / "out"
            finish(command, out, processes)
            results[processes] = outcome(out)
        return results[processes]

    return get


@pytest.fixture
def killed(command, tmp_path_factory):
    """The output_dir of a run that was killed after the checkpoint at step 24."""
    out = tmp_path_factory.mktemp("killed") / "out"
    launch.run(*command, "--output_dir", out, at=MOMENTS["training, in the last epoch"])
    return out


def outcome(out: Path) -> dict:
    """All that must be equal: weights, answers, scores, the whole history, the checkpoints."""
    state = read(out, "trainer_state.json")
    files = ("model.safetensors", "config.json", "eval_predictions.json", "eval_nbest_predictions.json")
    return {
        **{name: (out / name).read_bytes() for name in files},
        "eval": without_times(read(out, "eval_results.json")),
        "train_loss": read(out, "train_results.json")["train_loss"],
        "history": [without_times(entry) for entry in state["log_history"]],
        "best": (state["best_metric"], state["best_global_step"], Path(state["best_model_checkpoint"]).name),
        "best model": (out / Path(state["best_model_checkpoint"]).name / "model.safetensors").read_bytes(),
        "checkpoints": [Path(folder).name for folder in complete_checkpoints(out)],
    }


def test_reference_run_exercises_what_it_should(never_killed):
    done = never_killed()
    losses = {entry["step"]: entry["eval_loss"] for entry in done["history"] if "eval_loss" in entry}
    assert list(losses) == [6, 12, 18, 24, 30] and done["best"] == (losses[12], 12, "checkpoint-12")
    assert done["checkpoints"] == ["checkpoint-12", "checkpoint-30"]
    assert done["model.safetensors"] == done["best model"]
    assert not any(name in done["model.safetensors"] for name in (b"gamma", b"beta"))


@pytest.mark.parametrize(
    "moment", [*MOMENTS, *(pytest.param(moment, marks=pytest.mark.slow) for moment in MORE_MOMENTS)]
)
def test_killed_once(moment, command, never_killed, tmp_path):
    killed = launch.run(*command, "--output_dir", tmp_path, at=ALL_MOMENTS[moment])
    assert killed.exit_codes == [-signal.SIGKILL], killed.err[0][-2000:]
    assert bool(incomplete_checkpoints(tmp_path)) == moment.startswith(("saving", "rotating"))
    finish(command, tmp_path)
    assert outcome(tmp_path) == never_killed()


@pytest.mark.parametrize(
    "moments",
    [
        [At(f"{TRAINER}._save_rng_state", 2, rank=1)],
        pytest.param(
            [
                At(f"{TRAINER}.training_step", 5, rank=1),
                At("qa.checkpoints.mark_complete", 1),
                At("pathlib.Path.unlink", 2, after=True),
                At(f"{TRAINER}.prediction_step", 3, rank=1),
                At("qa.checkpoints.rotate_checkpoints", 1),
                At("qa.checkpoints.write_run_state", 2),
                At("qa.checkpoints.write_run_state", 2, after=True),
                At("run_squad.write_predictions", 1),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["once", "again and again"],
)
def test_killed_with_two_processes(moments, command, never_killed, tmp_path):
    for moment in moments:
        killed = launch.run(*command, "--output_dir", tmp_path, processes=2, at=moment)
        assert killed.exit_codes[moment.rank] == -signal.SIGKILL, (moment, killed.err[0][-2000:])
    finish(command, tmp_path, processes=2)
    assert outcome(tmp_path) == never_killed(2)


def test_evaluation_at_an_epochs_end_comes_before_the_checkpoint_of_its_last_step(command, tmp_path):
    """Else a run killed in between would go on without it."""
    command = [flag for flag in command if flag != "--load_best_model_at_end"] + ["--eval_strategy", "epoch"]
    killed = launch.run(*command, "--output_dir", tmp_path, at=At("run_squad.write_predictions", 1))
    assert killed.exit_codes == [-signal.SIGKILL]
    assert [Path(folder).name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-6"]
    finish(command, tmp_path)
    history = read(tmp_path, "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "eval_f1" in entry] == [12, 24, 30]


def test_an_output_dir_that_was_moved_keeps_its_best_model(command, never_killed, tmp_path):
    """Checkpoints name the best one by its path."""
    launch.run(*command, "--output_dir", tmp_path / "out", at=MOMENTS["trained, before the model"])
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    finish(command, moved)
    assert outcome(moved)["model.safetensors"] == never_killed()["best model"]


@pytest.mark.parametrize("checkpoint", ["checkpoint-24", "checkpoint-12"], ids=["resumed", "best"])
def test_a_weight_that_is_missing_or_left_over_stops_the_run(checkpoint, killed, command):
    file = killed / checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["qa_outputs.offset"] = weights.pop("qa_outputs.bias")
    save_file(weights, file, metadata={"format": "pt"})
    stopped = launch.run(*command, "--output_dir", killed)
    assert stopped.exit_codes == [2]
    assert stopped.err[0].splitlines()[-1] == (
        f"run_squad.py: error: the weights in {killed / checkpoint} are not those of this model. "
        "missing: qa_outputs.bias; left over: qa_outputs.offset"
    )
