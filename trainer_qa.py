"""The Trainer for extractive question answering: evaluation by questions, and runs that survive a kill.

What transformers' Trainer does not do, and this one does:

- it evaluates windows sorted by length, undoes the order exactly, and turns logits into answers and a metric;
- the order of the training windows depends on the seed and the epoch alone, so ranks agree and a resume repeats it;
- a checkpoint counts only when it is whole, older ones go only after that, and a resumed run equals one never stopped;
- SIGTERM and SIGINT finish the step, save and stop; a loss that is not finite stops the run before the optimizer steps.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, speed_metrics

from utils_qa import write_json

logger = logging.getLogger(__name__)

# Written into a checkpoint's folder when everything else of it stands there.
WHOLE_CHECKPOINT = "checkpoint_complete.json"
LOSS_STATE = "loss_state_{rank}.json"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):
    """Training was asked to stop by a signal and stands whole in a checkpoint."""

    def __init__(self, signal_number: int, checkpoint: str):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the run so far stands in {checkpoint}")
        self.exit_status = 128 + signal_number


class TrainingError(Exception):
    """Training cannot go on; the message is one line for the user."""


class QuestionAnsweringTrainer(Trainer):
    """
    Args:
        eval_examples: the questions (`datasets.Dataset` with `id`) whose windows are `eval_dataset`.
        post_process_function: `(examples, features, (start_logits, end_logits), prefix) -> metrics`, called on the main
            process alone; writes the answers and returns a flat dict of numbers, empty where there are no gold answers.
        run_settings: what must be equal for a resumed run to be the same run, as a flat JSON-able dict; written
            into every checkpoint.
        train_ids: the question ids that `example_index` of the training features points to.
        max_nonfinite_steps: how many optimizer steps with a loss that is not finite are skipped before the run stops.
    """

    def __init__(
        self,
        *args,
        eval_examples=None,
        post_process_function: Callable | None = None,
        run_settings: dict | None = None,
        train_ids: list[str] | None = None,
        max_nonfinite_steps: int = 0,
        **kwargs,
    ):
        training_args = kwargs["args"]
        # With its own generator the sampler is reseeded here at each epoch, accelerate's seedable one would not be.
        training_args.accelerator_config.use_seedable_sampler = False
        # Rotation waits until the new checkpoint is whole, which `Trainer._save_checkpoint` cannot know.
        self.save_total_limit, training_args.save_total_limit = training_args.save_total_limit, None
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function
        self.run_settings = run_settings or {}
        self.train_ids = train_ids
        self.max_nonfinite_steps = max_nonfinite_steps
        self.nonfinite_steps = 0
        self.signal_received = 0  # by this process
        self.stop_signal = 0  # agreed on by all processes
        self._order = torch.Generator()
        self._step_losses: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._resumed_from: str | None = None
        self.add_callback(RunGuard(self))
        if self.pop_callback(ProgressCallback):  # there is none with --disable_tqdm
            self.add_callback(NamedProgress)

    # ---- Order of the windows ----

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if hasattr(sampler, "generator"):
            sampler.generator = self._order
        return sampler

    def seed_order(self, epoch: int) -> None:
        """Makes the order of this epoch's training windows depend on the seed and the epoch alone."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._order.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))

    def _get_eval_sampler(self, eval_dataset):
        # `predict_logits` has sorted the windows; the Trainer would shuffle them where training is grouped.
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "example_index" not in self._signature_columns:
            self._signature_columns.append("example_index")

    # ---- Evaluation and prediction ----

    def predict_logits(self, features, prefix: str) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
        """Runs the model over `features`.

        Returns ((start_logits, end_logits), speed metrics); the logits are float arrays of shape (windows, longest
        window) in the order of `features`, on every process, with -100 where a window is shorter.
        """
        # Windows of like length share a batch; the longest come first, so that running out of memory shows at once.
        order = np.argsort(-np.asarray(features["length"]), kind="stable")
        start_time = time.time()
        # Evaluating must not move the random state that training goes on with.
        with torch.random.fork_rng(devices=[]):
            output = self.evaluation_loop(
                self.get_eval_dataloader(features.select(order)),
                description="Evaluation",
                prediction_loss_only=False,
                metric_key_prefix=prefix,
            )
        seconds = speed_metrics(prefix, start_time, num_samples=len(features))
        logits = []
        for in_order in output.predictions[:2]:
            restored = np.empty_like(in_order)
            restored[order] = in_order
            logits.append(restored)
        return (logits[0], logits[1]), seconds

    def _answer(self, features, examples, prefix: str) -> dict[str, float]:
        logits, metrics = self.predict_logits(features, prefix)
        scores = on_main_process(lambda: self.post_process_function(examples, features, logits, prefix))
        return {**{f"{prefix}_{name}": value for name, value in scores.items()}, **metrics}

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers the evaluation questions and returns the metrics, their names prefixed (`eval_f1`)."""
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        metrics = self._answer(features, examples, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="predict"):
        """Answers `predict_examples` and returns the metrics: those of speed alone where there are no gold answers."""
        metrics = self._answer(predict_dataset, predict_examples, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As `Trainer.train`; raises `TrainingStopped` after a signal and `TrainingError` where it cannot go on."""
        self._resumed_from = resume_from_checkpoint
        with self._signals_stop_the_run():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        # The loss of the whole run, see `log`.
        return output._replace(training_loss=output.metrics["train_loss"])

    def training_step(self, model, inputs, num_items_in_batch=None):
        example_index = inputs.pop("example_index", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append((loss, example_index))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # the Trainer divides by the steps since the last resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _signals_stop_the_run(self):
        """SIGTERM and SIGINT are only noted, however often they come (torchrun sends Ctrl-C twice)."""

        def remember(signal_number, frame):
            if not self.signal_received:
                self.signal_received = signal_number
                if self.is_world_process_zero():
                    logger.warning("%s: finishing this step, then saving.", signal.Signals(signal_number).name)

        earlier = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        """Raises `TrainingStopped` for a signal that came after the last step, once the model is saved."""
        if self.signal_received:
            raise TrainingStopped(self.signal_received, self.args.output_dir)

    def check_step(self, model) -> None:
        """Before the optimizer steps: do all ranks have a finite loss, and was any of them asked to stop?"""
        losses, self._step_losses = self._step_losses, []
        nonfinite = ~torch.isfinite(torch.stack([loss.float() for loss, _ in losses])).all()
        flags = torch.stack([nonfinite.long(), torch.tensor(self.signal_received, device=nonfinite.device)])
        if self.args.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        any_nonfinite, self.stop_signal = flags.tolist()
        if not any_nonfinite:
            return
        ids = []
        for loss, example_index in losses:
            if example_index is not None and not torch.isfinite(loss):
                ids += [self.train_ids[i] for i in example_index.tolist()]
        if self.args.world_size > 1:
            gathered = [None] * self.args.world_size
            dist.all_gather_object(gathered, ids)
            ids = [question_id for rank_ids in gathered for question_id in rank_ids]
        self.nonfinite_steps += 1
        step = self.state.global_step + 1
        message = f"the loss at step {step} is not finite; questions in the batch: {', '.join(ids)}"
        if self.nonfinite_steps > self.max_nonfinite_steps:
            raise TrainingError(f"{message}. The last whole checkpoint stays good; a lower --learning_rate may help")
        if self.is_world_process_zero():
            logger.warning("%s; skipped (%d of %d).", message, self.nonfinite_steps, self.max_nonfinite_steps)
        model.zero_grad(set_to_none=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """Leaves the card alone when pushing: run_squad.py has written it (model_card.py)."""

    # ---- Checkpoints ----

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero() and os.path.exists(folder):
            remove_checkpoint(folder)
        self._barrier()
        try:
            super()._save_checkpoint(model, trial)
            write_json(
                os.path.join(folder, LOSS_STATE.format(rank=self.args.process_index)),
                {
                    "tr_loss": self._tr_loss.item(),
                    "total_loss": self._total_loss_scalar,
                    "last_logged": self._globalstep_last_logged,
                    "nonfinite_steps": self.nonfinite_steps,
                },
            )
        except Exception as error:
            # A full disk comes as OSError, RuntimeError or safetensors' own error, depending on the file.
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"cannot write the checkpoint {folder}: {_first_line(error)}. Earlier checkpoints are untouched"
            ) from error
        self._barrier()
        if self.is_world_process_zero():
            write_json(
                os.path.join(folder, WHOLE_CHECKPOINT),
                {
                    "global_step": self.state.global_step,
                    "resumable": not self.args.save_only_model,
                    "settings": self.run_settings,
                },
            )
            self._rotate_checkpoints()
        self._barrier()
        if self.stop_signal:
            raise TrainingStopped(self.stop_signal, folder)

    def _rotate_checkpoints(self) -> None:
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        checkpoints = whole_checkpoints(self.args.output_dir)
        best = self.state.best_model_checkpoint
        kept = {checkpoints[-1]} | ({os.path.normpath(best)} if best else set())
        excess = len(checkpoints) - max(self.save_total_limit, len(kept))
        for folder in [folder for folder in checkpoints if folder not in kept][: max(excess, 0)]:
            remove_checkpoint(folder)

    def restore_loss(self) -> None:
        """Goes on with the sums of the loss where the checkpoint left them."""
        if self._resumed_from is None:
            return
        file = os.path.join(self._resumed_from, LOSS_STATE.format(rank=self.args.process_index))
        if os.path.exists(file):  # a checkpoint of another program has none
            state = json.loads(Path(file).read_text(encoding="utf-8"))
            self._tr_loss += state["tr_loss"]
            self._total_loss_scalar = state["total_loss"]
            self._globalstep_last_logged = state["last_logged"]
            self.nonfinite_steps = state["nonfinite_steps"]

    # ---- Files ----

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(output_dir, state_dict=state_dict)
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as beside:
            super()._save(beside, state_dict=state_dict)
            for file in sorted(os.listdir(beside)):
                os.replace(os.path.join(beside, file), os.path.join(output_dir, file))

    def save_state(self) -> None:
        if self.is_world_process_zero():
            file = os.path.join(self.args.output_dir, "trainer_state.json")
            self.state.save_to_json(file + ".tmp")
            os.replace(file + ".tmp", file)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Writes `{split}_results.json` and adds the metrics to `all_results.json`."""
        if not self.is_world_process_zero():
            return
        write_json(os.path.join(self.args.output_dir, f"{split}_results.json"), dict(sorted(metrics.items())))
        if combined:
            file = Path(self.args.output_dir, "all_results.json")
            earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            write_json(file, dict(sorted({**earlier, **metrics}.items())))

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class RunGuard(TrainerCallback):
    """Where the training loop calls back into `QuestionAnsweringTrainer`."""

    def __init__(self, trainer: QuestionAnsweringTrainer):
        self.trainer = trainer
        self.save_at_epoch_end = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_loss()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.seed_order(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trainer.check_step(model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop_signal:
            control.should_save = control.should_training_stop = True
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            # What is due at the end of the epoch comes after this step, and belongs into its checkpoint.
            control.should_save, self.save_at_epoch_end = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stop_signal and state.epoch != int(state.epoch):
            control.should_log = control.should_evaluate = False  # stopped within the epoch
        if self.save_at_epoch_end:
            control.should_save, self.save_at_epoch_end = True, False


class NamedProgress(ProgressCallback):
    """The Trainer's progress bars with their names, and one line a log entry."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None and not self.prediction_bar.desc:
            self.prediction_bar.set_description("Answering")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "train_runtime" in logs:  # the sums of the run are printed as a table
            return
        shown = {
            name: value
            for name, value in logs.items()
            if isinstance(value, float) and name not in ("epoch", "total_flos")
        }
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  {numbers}")


def whole_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of the whole checkpoints in `output_dir`, by step, the newest last."""
    return [folder for folder in _checkpoints(output_dir) if os.path.exists(os.path.join(folder, WHOLE_CHECKPOINT))]


def broken_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """The folders of checkpoints in `output_dir` that were never finished, or partly removed, by step."""
    return [folder for folder in _checkpoints(output_dir) if not os.path.exists(os.path.join(folder, WHOLE_CHECKPOINT))]


def _checkpoints(output_dir) -> list[str]:
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and folder.is_dir():
            steps[int(step)] = os.path.normpath(folder)
    return [steps[step] for step in sorted(steps)]


def remove_checkpoint(folder: str) -> None:
    """Removes a checkpoint, its mark of being whole first, so that a kill in between leaves no half that counts."""
    Path(folder, WHOLE_CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def checkpoint_to_resume(output_dir: str | os.PathLike, settings: dict) -> str | None:
    """The newest whole checkpoint of this run, or None.

    Raises ValueError where it belongs to a run with other settings, naming them.
    """
    broken = broken_checkpoints(output_dir)
    if broken:
        logger.warning("Not whole, so not loaded: %s.", ", ".join(broken))
    resumable = [folder for folder in whole_checkpoints(output_dir) if _mark(folder)["resumable"]]
    if not resumable:
        return None
    check_same_run(resumable[-1], settings)
    return resumable[-1]


def check_same_run(checkpoint: str, settings: dict) -> None:
    """Raises ValueError where `checkpoint` is not whole or was written by a run with other settings, naming them."""
    if not os.path.isdir(checkpoint):
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: there is no such folder")
    if not os.path.exists(os.path.join(checkpoint, WHOLE_CHECKPOINT)):
        raise ValueError(
            f"the checkpoint {checkpoint} is not whole: it has no {WHOLE_CHECKPOINT}; name another one or start anew"
        )
    mark = _mark(checkpoint)
    if not mark["resumable"]:
        raise ValueError(f"the checkpoint {checkpoint} holds weights alone (--save_only_model): it cannot be resumed")
    changed = [
        f"{name} is {settings.get(name)!r}, was {earlier!r}"
        for name, earlier in mark["settings"].items()
        if settings.get(name) != earlier
    ]
    if changed:
        raise ValueError(
            f"cannot resume from {checkpoint}, which belongs to another run: {'; '.join(changed)}. Use the same "
            "flags, another --output_dir, or --overwrite_output_dir to start anew"
        )


def remove_checkpoints(output_dir: str | os.PathLike) -> None:
    for folder in _checkpoints(output_dir):
        remove_checkpoint(folder)


def on_main_process(function: Callable):
    """What `function()` returns on the main process, on every process; a ValueError of it is raised on every one."""
    if not dist.is_initialized():
        return function()
    result = None
    if dist.get_rank() == 0:
        try:
            result = function()
        except ValueError as error:
            result = error
    shared = [result]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]


def _mark(checkpoint: str) -> dict:
    return json.loads(Path(checkpoint, WHOLE_CHECKPOINT).read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
