"""Checkpoints, which of them to resume, and what must not be overwritten in an output_dir.

A checkpoint is complete once checkpoint_complete.json exists: written last, deleted first. So a kill at any moment
leaves either a complete checkpoint or an incomplete one, which is named and not loaded.
"""

import dataclasses
import json
import logging
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa.files import QAError, read_json, write_json
from qa.windows import features_fingerprint
from utils_qa import AnswerSettings

logger = logging.getLogger(__name__)

MARKER = "checkpoint_complete.json"  # what a checkpoint holds beside the Trainer's files: see `mark_complete`
RUN_STATE = "run_state.json"  # whether the run in an output_dir is "training" or "trained", and its settings
QA_SETTINGS = "qa_settings.json"  # so that report.py need not be told again
REPAIRED_ANSWERS = "repaired_answers.json"  # the training answers that did not stand at their answer_start
ALL_RESULTS = "all_results.json"  # the metrics of training, evaluation and prediction
MODEL_FILES = (  # what training leaves in output_dir, and an evaluation does not
    *("README.md", "config.json", "*.safetensors", "tokenizer*.json", "checkpoint-*"),
    *("modeling_relative_bert.py", "question_answering_pipeline.py"),
    *("train_results.json", "trainer_state.json", "training_args.bin", REPAIRED_ANSWERS),
)
# A checkpoint can be resumed with other values of these flags; all others must be equal. The questions are compared by
# their features' fingerprint, wherever they come from.
MAY_DIFFER = """
    cache_dir token trust_remote_code dataset_name dataset_config_name *_file validation_split_percentage
    misplaced_answers max_*_samples preprocessing_num_workers overwrite_cache output_dir overwrite_output_dir
    resume_from_checkpoint do_* local_rank use_cpu log* disable_tqdm report_to run_name project trackio_*
    include_num_input_tokens_seen skip_memory_metrics debug eval_* per_device_eval_batch_size prediction_loss_only
    save_* push_to_hub hub_* restore_callback_states_from_checkpoint gradient_checkpointing* activation_checkpointing*
    torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context ddp_*
""".split()


# ---- Checkpoints ----


def checkpoint_folder(output_dir: str, step: int) -> str:
    return os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def complete_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of the complete checkpoints in `output_dir`, by step, the newest last."""
    return [folder for folder in _checkpoints(output_dir) if _is_complete(folder)]


def incomplete_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of checkpoints in `output_dir` that were never finished, or partly removed, by step."""
    return [folder for folder in _checkpoints(output_dir) if not _is_complete(folder)]


def _checkpoints(output_dir) -> list[str]:
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and folder.is_dir():
            steps[int(step)] = os.path.normpath(folder)
    return [steps[step] for step in sorted(steps)]


def _is_complete(checkpoint: str) -> bool:
    return os.path.exists(os.path.join(checkpoint, MARKER))


def mark_complete(checkpoint: str, settings: dict, resumable: bool, loss_sums: list[float]) -> None:
    """Flushes the files of the checkpoint to the disk, where they survive a loss of power, and writes its marker.

    settings: of the run; resumable: whether it holds more than weights; loss_sums: by rank, since the last log entry.
    """
    for file in Path(checkpoint).rglob("*"):
        if file.is_file():
            with open(file, "r+b") as opened:  # Windows flushes only what is open for writing
                os.fsync(opened.fileno())
    marker = {"settings": settings, "resumable": resumable, "loss_sums": loss_sums}
    write_json(os.path.join(checkpoint, MARKER), marker)


def read_marker(checkpoint: str) -> dict:
    return read_json(Path(checkpoint, MARKER))


def remove_checkpoint(folder: str) -> None:
    """Removes a checkpoint, its marker first."""
    Path(folder, MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate_checkpoints(output_dir: str, limit: int | None, kept: set[str]) -> None:
    """Removes the oldest complete checkpoints but `limit`, never those whose folders have the names in `kept`."""
    if not limit or limit < 0:
        return
    checkpoints = complete_checkpoints(output_dir)
    excess = max(len(checkpoints) - max(limit, len(kept)), 0)
    for folder in [folder for folder in checkpoints if os.path.basename(folder) not in kept][:excess]:
        try:
            remove_checkpoint(folder)
        except OSError as error:
            logger.warning("Cannot remove the old checkpoint %s: %s.", folder, error)


# ---- Settings ----


def run_settings(model_args, data_args, training_args, position_embedding_type: str, features: dict) -> dict:
    """The flags that must be equal for two commands to train the same model: a flat dict that JSON can hold."""
    flags = {**vars(model_args), **vars(data_args), **training_args.to_dict()}
    settings = {name: value for name, value in flags.items() if not any(fnmatchcase(name, p) for p in MAY_DIFFER)}
    settings["position_embedding_type"] = position_embedding_type
    settings["number of processes"] = training_args.world_size
    if "train" in features:
        settings["training data"] = features_fingerprint(features["train"])
    if training_args.metric_for_best_model is not None and "validation" in features:  # the score decides on the model
        settings["validation data"] = features_fingerprint(features["validation"])
    else:
        for field in dataclasses.fields(AnswerSettings):
            settings.pop(field.name, None)
    return json.loads(json.dumps(settings, default=str))


def check_settings(earlier: dict, settings: dict, folder: str | os.PathLike, otherwise: str) -> None:
    """Raises QAError that names what differs between the settings of the run in `folder` and those of this one.

    otherwise: what can be done but to give the same flags.
    """
    changed = [
        f"{name} is {settings.get(name)!r}, was {value!r}"
        for name, value in earlier.items()
        if settings.get(name) != value
    ]
    if changed:
        raise QAError(
            f"cannot go on with {folder}, which belongs to another run: {'; '.join(changed)}. Use the same flags, "
            f"{otherwise}"
        )


def same_command(training_args) -> str:
    """How to say "the same command" where it is to go on with what is in output_dir."""
    flags = [f"--{name}" for name in ("overwrite_output_dir", "resume_from_checkpoint") if getattr(training_args, name)]
    return f"the same command, without {' and '.join(flags)}," if flags else "the same command"


def write_qa_settings(training_args, model_args, data_args) -> None:
    """Writes the flags that windows, answers and the questions of an evaluation depend on.

    A prediction alone leaves those of an evaluation that are there.
    """
    file = Path(training_args.output_dir, QA_SETTINGS)
    if file.exists() and not (training_args.do_train or training_args.do_eval):
        return
    settings = {
        **vars(data_args),
        "tokenizer_name": model_args.tokenizer_name or model_args.model_name_or_path,
        "cache_dir": model_args.cache_dir,
        "seed": training_args.seed,  # by which --validation_split_percentage chooses
    }
    write_json(file, settings)


# ---- The run in an output_dir ----


def plan_run(training_args, settings: dict, restarted: bool) -> tuple[bool, str | None]:
    """What is left to do: (whether the model in output_dir is trained already, the checkpoint to resume or None).

    restarted: by torchrun or SLURM: resume even with --overwrite_output_dir. Raises QAError where training would
    overwrite something else or mix two runs.
    """
    folder = Path(training_args.output_dir)
    read_json(folder / ALL_RESULTS)  # raises where it is not one of metrics
    if not training_args.do_train:
        return False, None
    file = folder / RUN_STATE
    checkpoint = named = training_args.resume_from_checkpoint
    if not file.exists():
        _check_is_free(folder, named)
    elif restarted or not training_args.overwrite_output_dir:
        state = read_json(file)
        otherwise = (
            "another --output_dir (with --model_name_or_path CHECKPOINT to train on from its weights), or "
            "--overwrite_output_dir to start anew"
        )
        check_settings(state["settings"], settings, folder, otherwise)
        if state["status"] == "trained":
            return True, None
        newest = _newest_to_resume(folder)
        checkpoint = newest or named if restarted else named or newest
    elif named is None:
        _check_start_stays(folder, settings)
    if checkpoint is not None:
        _check_resumable(checkpoint, settings)
    return False, checkpoint


def begin_run(training_args, settings: dict, checkpoint: str | None, answer_changes: list[dict]) -> None:
    """Takes output_dir for this run, now that nothing can refuse it any more, and lists its repaired answers there."""
    if checkpoint is None and training_args.overwrite_output_dir:
        for folder in _checkpoints(training_args.output_dir):
            remove_checkpoint(folder)
    write_run_state(training_args.output_dir, "training", settings)
    file = Path(training_args.output_dir, REPAIRED_ANSWERS)
    file.unlink(missing_ok=True)
    if answer_changes:
        write_json(file, answer_changes)
        logger.info("%d answers that were repaired or left out are listed in %s.", len(answer_changes), file)


def write_run_state(output_dir: str, status: str, settings: dict) -> None:
    """status: "training", or "trained" once the model is saved."""
    write_json(os.path.join(output_dir, RUN_STATE), {"status": status, "settings": settings})


def _check_start_stays(folder: Path, settings: dict) -> None:
    for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
        if settings[flag] and _is_checkpoint_in(folder, settings[flag]):
            raise QAError(f"--overwrite_output_dir would remove --{flag} {settings[flag]}: name another --output_dir")


def _check_is_free(folder: Path, named: str | None) -> None:
    """Raises QAError where the folder, in which no run has begun, holds a file such as training writes."""
    names = MODEL_FILES if (folder / QA_SETTINGS).exists() else (*MODEL_FILES, "*_results.json")  # of an answering
    held = [path.name for name in names for path in sorted(folder.glob(name))]
    if held and not (named and _is_checkpoint_in(folder, named)):
        raise QAError(
            f"--output_dir {folder} holds {held[0]} of something else, which training could overwrite: name another "
            "folder, or move it away"
        )


def _is_checkpoint_in(folder: Path, name: str) -> bool:
    return os.path.realpath(name) in map(os.path.realpath, _checkpoints(folder))


def _newest_to_resume(output_dir: Path) -> str | None:
    incomplete = incomplete_checkpoints(output_dir)
    if incomplete:
        logger.warning("Incomplete, so not loaded: %s.", ", ".join(incomplete))
    resumable = [folder for folder in complete_checkpoints(output_dir) if read_marker(folder)["resumable"]]
    return resumable[-1] if resumable else None


def _check_resumable(checkpoint: str, settings: dict) -> None:
    if not os.path.isdir(checkpoint):
        raise QAError(f"--resume_from_checkpoint {checkpoint}: there is no such folder")
    if not _is_complete(checkpoint):
        raise QAError(f"the checkpoint {checkpoint} is incomplete: it has no {MARKER}; name another one or start anew")
    marker = read_marker(checkpoint)
    if not marker["resumable"]:
        raise QAError(f"the checkpoint {checkpoint} holds weights alone (--save_only_model): it cannot be resumed")
    otherwise = (
        f"or train on from its weights: --model_name_or_path {checkpoint} and a new --output_dir, without "
        "--resume_from_checkpoint"
    )
    check_settings(marker["settings"], settings, checkpoint, otherwise)
