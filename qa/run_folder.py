"""The run in an output_dir: how far it is, its checkpoints, what to resume, and what must not be overwritten.

A checkpoint counts when its folder holds the mark that is written last, and goes with its mark first, so that a kill at
any moment leaves either a whole checkpoint or one that is named and not loaded.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa.files import QAError, write_json

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"  # how far the run has come (training, trained or finished), and its settings
QA_SETTINGS = "qa_settings.json"  # so that ask.py and report.py need not be told again
REPAIRED_ANSWERS = "repaired_answers.json"  # the training answers that did not stand at their answer_start
WHOLE_CHECKPOINT = "checkpoint_complete.json"  # written into a checkpoint when everything else of it stands there
# The flags of transformers' own that make another run of it, so that a checkpoint of one is no start for the other.
TRAINING_SETTINGS = """
    seed data_seed per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor bf16 fp16 tf32 auto_find_batch_size
    accelerator_config neftune_noise_alpha train_sampling_strategy dataloader_drop_last metric_for_best_model
    greater_is_better
""".split()
WINDOW_SETTINGS = "max_seq_length doc_stride max_query_length".split()
ANSWER_SETTINGS = "n_best_size max_answer_length version_2_with_negative null_score_diff_threshold".split()


# ---- Settings ----


def run_settings(model_args, data_args, training_args, position_embedding_type: str, features) -> dict:
    """What must be equal for two commands to train the same model, by flag: a flat dict that JSON can hold."""
    settings = {
        "model_name_or_path": model_args.model_name_or_path,
        "model_revision": model_args.model_revision,
        "tokenizer_name": model_args.tokenizer_name,
        "config_name": model_args.config_name,
        "position_embedding_type": position_embedding_type,
        "training data": _hash_of(features["train"]) if "train" in features else None,
        "number of processes": training_args.world_size,
    }
    settings |= {name: getattr(data_args, name) for name in (*WINDOW_SETTINGS, "pad_to_max_length", "negative_windows")}
    settings |= {name: getattr(training_args, name) for name in TRAINING_SETTINGS}
    if training_args.metric_for_best_model is not None and "validation" in features:  # the score decides on the model
        settings["validation data"] = _hash_of(features["validation"])
        settings |= {name: getattr(data_args, name) for name in ANSWER_SETTINGS}
    return json.loads(json.dumps(settings, default=str))


def _hash_of(features) -> str:
    # The name of the features' file begins with a hash of all that is trained on; what follows is how it is stored.
    return re.match(r"cache-[a-z]+-features-[0-9a-f]+", Path(features.cache_files[0]["filename"]).name)[0]


def write_qa_settings(training_args, model_args, data_args) -> None:
    """Writes the flags that answers depend on, and those that the evaluation's questions come from."""
    folder = training_args.output_dir
    names = [*WINDOW_SETTINGS, *ANSWER_SETTINGS, "dataset_name", "dataset_config_name", "validation_file"]
    settings = {}
    if data_args.validation_split_percentage is not None:  # they are a part of the training data, chosen by the seed
        names += ["train_file", "validation_split_percentage"]
        settings["seed"] = training_args.seed
    settings |= {name: getattr(data_args, name) for name in names}
    settings["tokenizer_name"] = model_args.tokenizer_name or model_args.model_name_or_path
    settings["cache_dir"] = model_args.cache_dir
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, QA_SETTINGS), settings)


def check_settings(earlier: dict, settings: dict, folder: str | os.PathLike) -> None:
    """Raises ValueError that names what differs between the settings of the run in `folder` and those of this one."""
    earlier = {"negative_windows": 1.0, **earlier}  # which earlier versions of this program did not have
    rises = {"mode": "max"}  # nor this, for a metric that rises; the scheduler in the checkpoint stays what it is
    if settings.get("lr_scheduler_kwargs") == rises and earlier.get("lr_scheduler_kwargs", rises) is None:
        earlier["lr_scheduler_kwargs"] = rises
    changed = [
        f"{name} is {settings.get(name)!r}, was {value!r}"
        for name, value in earlier.items()
        if settings.get(name) != value
    ]
    if changed:
        raise QAError(
            f"cannot go on with {folder}, which belongs to another run: {'; '.join(changed)}. Use the same flags, "
            "another --output_dir, or --overwrite_output_dir to start anew"
        )


def same_command(training_args) -> str:
    """How to say "the same command" where it is to go on with what stands in output_dir."""
    given = {
        "--overwrite_output_dir": training_args.overwrite_output_dir,
        "--resume_from_checkpoint": training_args.resume_from_checkpoint,
    }
    without = " and ".join(flag for flag, value in given.items() if value)
    return f"the same command, without {without}," if without else "the same command"


# ---- The run ----


def plan_training(training_args, settings: dict, restarted: bool) -> tuple[str, str | None]:
    """What is left of the training in output_dir: ("training", checkpoint to go on from or None) or ("trained", None).

    `restarted`: a launcher has given the command again, and so wants to go on whatever it says. Raises ValueError where
    going on would overwrite a finished run or mix two runs.
    """
    folder = Path(training_args.output_dir)
    named = training_args.resume_from_checkpoint
    state = _read_run_state(folder)
    restarted = restarted and state is not None
    if named is not None and not restarted:
        _check_same_run(named, settings)
    if training_args.overwrite_output_dir and not restarted:
        for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
            if named is None and settings[flag] and _is_checkpoint_in(folder, settings[flag]):
                raise QAError(
                    f"--overwrite_output_dir would remove --{flag} {settings[flag]}: name another --output_dir"
                )
        return "training", named
    if state is None:
        held = [name for name in ("config.json", "train_results.json", REPAIRED_ANSWERS) if (folder / name).exists()]
        held += sorted(path.name for path in folder.glob("checkpoint-*"))
        if held and not (named and _is_checkpoint_in(folder, named)):
            raise QAError(
                f"--output_dir {folder} holds {held[0]} of something else: name another folder, or give "
                "--overwrite_output_dir"
            )
        return "training", named
    if state["status"] == "finished" and not restarted:
        raise QAError(
            f"--output_dir {folder} holds a finished run: to use it give --model_name_or_path {folder} and leave "
            "--do_train out; to train, name another folder, or give --overwrite_output_dir to train anew"
        )
    if state["status"] != "training":
        check_settings(state["settings"], settings, folder)
        return "trained", None
    newest = _checkpoint_to_resume(folder, settings)
    return "training", named if named and not restarted else newest or named


def begin_run(training_args, settings: dict, checkpoint: str | None, answer_changes: list[dict]) -> None:
    """Takes output_dir for this run, now that nothing can refuse it any more, and lists its repaired answers there."""
    if checkpoint is None and training_args.overwrite_output_dir:
        for folder in _checkpoints(training_args.output_dir):
            remove_checkpoint(folder)
    write_run_state(training_args.output_dir, "training", settings)
    file = os.path.join(training_args.output_dir, REPAIRED_ANSWERS)
    if answer_changes:
        write_json(file, answer_changes)
        logger.info("%d answers that were repaired or left out are listed in %s.", len(answer_changes), file)
    elif os.path.exists(file):  # that of a run which --overwrite_output_dir has given up
        os.remove(file)


def write_run_state(output_dir: str, status: str, settings: dict) -> None:
    os.makedirs(output_dir, exist_ok=True)
    write_json(os.path.join(output_dir, RUN_STATE), {"status": status, "settings": settings})


def _read_run_state(folder: Path) -> dict | None:
    file = folder / RUN_STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _is_checkpoint_in(folder: Path, name: str) -> bool:
    path = Path(name).resolve()
    return path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and path.parent == folder.resolve()


def _checkpoint_to_resume(output_dir: str | os.PathLike, settings: dict) -> str | None:
    """The newest whole checkpoint of this run, or None.

    Raises ValueError where it belongs to a run with other settings, naming them.
    """
    broken = broken_checkpoints(output_dir)
    if broken:
        logger.warning("Not whole, so not loaded: %s.", ", ".join(broken))
    whole = whole_checkpoints(output_dir)
    if whole:
        check_settings(_mark(whole[-1])["settings"], settings, whole[-1])
    resumable = [folder for folder in whole if _mark(folder)["resumable"]]
    return resumable[-1] if resumable else None


def _check_same_run(checkpoint: str, settings: dict) -> None:
    """Raises ValueError where `checkpoint` is not whole or was written by a run with other settings, naming them."""
    if not os.path.isdir(checkpoint):
        raise QAError(f"--resume_from_checkpoint {checkpoint}: there is no such folder")
    if not _is_whole(checkpoint):
        raise QAError(
            f"the checkpoint {checkpoint} is not whole: it has no {WHOLE_CHECKPOINT}; name another one or start anew"
        )
    mark = _mark(checkpoint)
    if not mark["resumable"]:
        raise QAError(f"the checkpoint {checkpoint} holds weights alone (--save_only_model): it cannot be resumed")
    check_settings(mark["settings"], settings, checkpoint)


# ---- Checkpoints ----


def checkpoint_folder(output_dir: str, step: int) -> str:
    return os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def whole_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of the whole checkpoints in `output_dir`, by step, the newest last."""
    return [folder for folder in _checkpoints(output_dir) if _is_whole(folder)]


def broken_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of checkpoints in `output_dir` that were never finished, or partly removed, by step."""
    return [folder for folder in _checkpoints(output_dir) if not _is_whole(folder)]


def _checkpoints(output_dir) -> list[str]:
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and folder.is_dir():
            steps[int(step)] = os.path.normpath(folder)
    return [steps[step] for step in sorted(steps)]


def _is_whole(checkpoint: str) -> bool:
    return os.path.exists(os.path.join(checkpoint, WHOLE_CHECKPOINT))


def _mark(checkpoint: str) -> dict:
    return json.loads(Path(checkpoint, WHOLE_CHECKPOINT).read_text(encoding="utf-8"))


def mark_whole(checkpoint: str, step: int, resumable: bool, settings: dict) -> None:
    """Says that all of the checkpoint stands on the disk, where it survives a loss of power too."""
    _flush_to_disk(checkpoint)
    mark = {"global_step": step, "resumable": resumable, "settings": settings}
    write_json(os.path.join(checkpoint, WHOLE_CHECKPOINT), mark)


def _flush_to_disk(folder: str) -> None:
    for file in os.scandir(folder):
        if file.is_file():
            descriptor = os.open(file.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def rotate_checkpoints(output_dir: str, limit: int | None, kept: set[str]) -> None:
    """Removes the oldest whole checkpoints but `limit`, never those whose folders have the names in `kept`."""
    if not limit or limit < 0:
        return
    checkpoints = whole_checkpoints(output_dir)
    excess = max(len(checkpoints) - max(limit, len(kept)), 0)
    for folder in [folder for folder in checkpoints if os.path.basename(folder) not in kept][:excess]:
        try:
            remove_checkpoint(folder)
        except OSError as error:
            logger.warning("Cannot remove the old checkpoint %s: %s.", folder, error)


def remove_checkpoint(folder: str) -> None:
    """Removes a checkpoint, its mark of being whole first, so that a kill in between leaves no half that counts."""
    Path(folder, WHOLE_CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(folder)
