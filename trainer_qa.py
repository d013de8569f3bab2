"""The Trainer for extractive question answering: evaluation by questions, and runs that survive a kill.

What transformers' Trainer does not do, and this one does:

- it evaluates windows sorted by length, and keeps of their logits no more than the best answers of each question;
- the order of the training windows depends on the seed and the epoch alone, so ranks agree and a resume repeats it;
- a checkpoint counts only when it is whole, older ones go only after that, and a resumed run equals one never stopped;
- SIGTERM and SIGINT finish the step, save and stop; a loss that is not finite stops the run before the optimizer steps.
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import speed_metrics

from qa.files import QAError, one_line, write_json
from qa.load_model import load_weights, rename_extra_special_tokens
from qa.processes import gather, on_main_process
from qa.run_folder import checkpoint_folder, mark_whole, remove_checkpoint, rotate_checkpoints, same_command
from utils_qa import AnswerSearch, AnswerSettings

logger = logging.getLogger(__name__)

LOSS_STATE = "loss_state_{rank}.json"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# What is used here of the Trainer beside its public methods, and the versions of transformers that it was tested with.
PRIVATE_METHODS = """
    _determine_best_metric _evaluate _get_eval_sampler _get_grad_norm _get_train_sampler _load_best_model
    _load_from_checkpoint _maybe_log_save_evaluate _run_epoch _save _save_checkpoint _set_signature_columns_if_needed
""".split()
PRIVATE_ATTRIBUTES = "_globalstep_last_logged _signature_columns _total_loss_scalar _tr_loss".split()
TESTED_VERSIONS = ("5.18.0", "5.24.0")


class TrainingStopped(Exception):
    """Training was asked to stop by a signal; what it came to stands whole in `folder`."""

    def __init__(self, signal_number: int, folder: str, training_args):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; the run so far stands in {folder}. Give "
            f"{same_command(training_args)} again to go on"
        )
        self.exit_status = 128 + signal_number


class EvaluationAbandoned(Exception):
    """A signal came during an evaluation within training, which is made up for when the run goes on."""


class QuestionAnsweringTrainer(Trainer):
    """
    Args:
        eval_examples: the questions (`datasets.Dataset` with `id`) whose windows are `eval_dataset`.
        answer_settings: how answers are picked.
        post_process_function: `(examples, predictions, prefix) -> metrics`, called on the main process alone with
            `QAPredictions`; writes them and returns a flat dict of numbers, empty where there are no gold answers.
        run_settings: what must be equal for a resumed run to be the same run, as a flat JSON-able dict; written
            into every checkpoint.
        train_ids: the question ids that `example_index` of the training features points to.
        max_nonfinite_steps: how many optimizer steps with a loss that is not finite are skipped before the run stops.
    """

    def __init__(
        self,
        *args,
        eval_examples=None,
        answer_settings: AnswerSettings | None = None,
        post_process_function: Callable | None = None,
        run_settings: dict | None = None,
        train_ids: list[str] | None = None,
        max_nonfinite_steps: int = 0,
        **kwargs,
    ):
        check_private_parts(Trainer)
        training_args = kwargs["args"]
        # With its own generator the sampler is reseeded here at each epoch, accelerate's seedable one would not be.
        training_args.accelerator_config.use_seedable_sampler = False
        # Rotation waits until the new checkpoint is whole, which `Trainer._save_checkpoint` cannot know.
        self.save_total_limit, training_args.save_total_limit = training_args.save_total_limit, None
        training_args.include_for_metrics = []  # the Trainer would keep them all, and nothing here reads them
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.answer_settings = answer_settings or AnswerSettings()
        self.post_process_function = post_process_function
        self.run_settings = run_settings or {}
        self.train_ids = train_ids
        self.max_nonfinite_steps = max_nonfinite_steps
        self.nonfinite_steps = 0
        self.signal_received = 0  # by this process
        self.stop_signal = 0  # agreed on by all processes
        self._order = torch.Generator()
        self._search: AnswerSearch | None = None  # of the evaluation in progress
        self.first_step = 0  # that this process has trained from
        self.evaluation_due = False  # at the step of the last checkpoint, but not made
        self._step_losses: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # (loss, example_index) a micro-batch
        self._grad_norm: torch.Tensor | float | None = None
        self._resumed_from: str | None = None
        self.add_callback(RunGuard(self))
        for tracker, callback_class in INTEGRATION_TO_CALLBACK.items():
            for callback in self.callback_handler.callbacks:
                if type(callback) is callback_class and hasattr(callback, "setup"):
                    callback.setup = functools.partial(_set_up_tracker, tracker, callback.setup)
        if self.pop_callback(ProgressCallback):  # there is none with --disable_tqdm
            self.add_callback(NamedProgress)

    # ---- Order of the windows ----

    def get_train_dataloader(self):
        with self._collating("example_index"):
            return super().get_train_dataloader()

    @contextlib.contextmanager
    def _collating(self, column: str):
        """Data loaders made meanwhile give this column of numbers as well."""
        collate = self.data_collator
        self.data_collator = functools.partial(_collate_with, column, collate)
        try:
            yield
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset=None):
        self._train_sampler = super()._get_train_sampler(train_dataset)
        if hasattr(self._train_sampler, "generator"):
            self._train_sampler.generator = self._order
        return self._train_sampler

    def seed_order(self, epoch: int) -> None:
        """Makes the order of this epoch's training windows depend on the seed and the epoch alone."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._order.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))
        if hasattr(self._train_sampler, "set_epoch"):
            # batch_rebalance shuffles by its own seed, and is out of the Trainer's reach in a resumed epoch.
            self._train_sampler.seed = seed
            self._train_sampler.set_epoch(epoch)

    def _get_eval_sampler(self, eval_dataset):
        # `find_answers` has sorted the windows; the Trainer would shuffle them where training is grouped.
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for name in ("example_index", "window"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    # ---- Evaluation and prediction ----

    def find_answers(self, features, examples, prefix: str) -> tuple[AnswerSearch, dict[str, float]]:
        """Runs the model over `features`, the windows of `examples`.

        Returns (a search that has kept all windows, on every process; speed metrics). Raises ValueError, on every
        process, for logits that are not finite, as `AnswerSearch.keep` does.
        """
        self._search = search = AnswerSearch(examples, features, self.answer_settings, self.args.device)
        # Windows of like length share a batch; the longest come first, so that running out of memory shows at once.
        order = np.argsort(-search.lengths, kind="stable")
        start_time = time.time()
        numbered = features.add_column("window", np.arange(len(features), dtype=np.int32))
        try:
            # Evaluating must not move the random state that training goes on with.
            with torch.random.fork_rng(devices=[]):
                self.evaluation_loop(
                    self._loader_of_all(numbered.select(order)),
                    description="Evaluation",
                    prediction_loss_only=False,
                    metric_key_prefix=prefix,
                )
            search.merge()  # where all processes notice what is not finite
        finally:
            self._search = None
            if not self.is_in_train:
                self._close_bars()
        return search, speed_metrics(prefix, start_time, num_samples=len(features))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`, but keeps best spans and losses, and no logits for the Trainer to keep."""
        window = inputs.pop("window")
        loss, logits, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        found = self._search.find(window.to(self.args.device), *logits[:2])
        self._search.keep(self.accelerator.gather_for_metrics(found))
        return loss, None, None

    def _loader_of_all(self, features) -> torch.utils.data.DataLoader:
        """`get_eval_dataloader` without --dataloader_drop_last, and without the one kept from other features."""
        self.__dict__.pop("_eval_dataloaders", None)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with self._collating("window"):
                return self.get_eval_dataloader(features)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _answer(self, features, examples, prefix: str) -> dict[str, float]:
        search, metrics = self.find_answers(features, examples, prefix)

        def score():
            scores = self.post_process_function(examples, search.predictions(), prefix)
            return {**scores, **self._loss(search, prefix)}

        scores = on_main_process(score)
        return {**{f"{prefix}_{name}": value for name, value in scores.items()}, **metrics}

    def _loss(self, search: AnswerSearch, prefix: str) -> dict[str, float]:
        """The loss as a metric, where there are labels and it is finite. Raises QAError where it must be."""
        loss = search.loss()
        if loss is None:
            return {}
        if math.isfinite(loss):
            return {"loss": loss}
        ids = search.unlikely_ids()
        message = (
            f"there is no {prefix}_loss: the model rules out the gold answers to {len(ids)} questions, or that windows "
            f"hold none (first ids: {', '.join(ids[:5])}; a logit is -inf)"
        )
        if self.is_in_train and (self.args.metric_for_best_model or "").removeprefix("eval_") == "loss":
            raise QAError(f"{message}; choose another --metric_for_best_model, and another --output_dir")
        logger.warning("%s.", message)
        return {}

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

    def _close_bars(self) -> None:
        """Ends the lines of the progress bars, so that what is printed next has a line of its own."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                for bar in (callback.prediction_bar, callback.training_bar):
                    if bar is not None:
                        bar.close()

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As `Trainer.train`; raises `TrainingStopped` after a signal and `QAError` where it cannot go on."""
        self._resumed_from = resume_from_checkpoint
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except EvaluationAbandoned:  # before the first step
            raise self._stopped(resume_from_checkpoint or self.args.output_dir) from None
        finally:
            self._close_bars()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _run_epoch(self, **kwargs):
        # A run may end within an epoch; the Trainer would make one step more when it resumes from that end.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self._resumed_from is not None:
            return {}  # --eval_on_start, which has been and would count a second time for the patience
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def training_step(self, model, inputs, num_items_in_batch=None):
        example_index = inputs.pop("example_index", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append((loss, example_index))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def check_step(self, model) -> None:
        """Before the optimizer steps: are loss and gradient finite on all ranks, and was any of them asked to stop?"""
        losses, self._step_losses = self._step_losses, []
        device = losses[0][0].device
        bad_loss = ~torch.isfinite(torch.stack([loss.float() for loss, _ in losses])).all()
        bad_gradient = torch.zeros_like(bad_loss)
        if self._grad_norm is not None and self.accelerator.scaler is None:  # float16's scaler looks for itself
            norm = self._grad_norm.full_tensor() if hasattr(self._grad_norm, "full_tensor") else self._grad_norm
            bad_gradient = ~torch.isfinite(torch.as_tensor(norm, device=device))
        flags = torch.stack([bad_loss.long(), bad_gradient.long(), torch.tensor(self.signal_received, device=device)])
        bad_loss, bad_gradient, self.stop_signal = self._maximum(flags).tolist()
        if not (bad_loss or bad_gradient):
            return
        ids = [
            self.train_ids[i]
            for loss, example_index in losses
            if example_index is not None and not (bad_loss and torch.isfinite(loss))
            for i in example_index.tolist()
        ]
        ids = [question_id for rank_ids in gather(ids) for question_id in rank_ids]
        self.nonfinite_steps += 1
        message = (
            f"the {'loss' if bad_loss else 'gradient'} at step {self.state.global_step + 1} is not finite; "
            f"questions in the batch: {', '.join(ids)}"
        )
        if self.nonfinite_steps > self.max_nonfinite_steps:
            raise QAError(f"{message}. The last whole checkpoint stays good; a lower --learning_rate may help")
        if self.is_world_process_zero():
            logger.warning("%s; skipped (%d of %d).", message, self.nonfinite_steps, self.max_nonfinite_steps)
        model.zero_grad(set_to_none=True)  # an optimizer leaves parameters without a gradient as they are

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # The Trainer takes the sum of this process alone, by the steps since the resume, and counts padded windows.
            total_loss = np.mean(gather(self._total_loss_scalar))
            logs["train_loss"] = float(total_loss) / max(self.state.global_step, 1)
            windows = self._windows_trained(self.state.global_step) - self._windows_trained(self.first_step)
            logs["train_samples_per_second"] = round(windows / max(logs["train_runtime"], 1e-4), 3)
        super().log(logs, start_time)

    def _windows_trained(self, steps: int) -> int:
        """How many windows the first `steps` steps see, those aside that fill the last batch of an epoch."""
        batches = len(self.callback_handler.train_dataloader)
        windows_per_epoch = len(self.train_dataset)
        if self.args.dataloader_drop_last:
            windows_per_epoch = min(windows_per_epoch, batches * self.state.train_batch_size * self.args.world_size)
        epochs, rest = divmod(steps, max(math.ceil(batches / self.args.gradient_accumulation_steps), 1))
        return epochs * windows_per_epoch + rest * self.get_total_train_batch_size(self.args)

    # ---- Signals ----

    @contextlib.contextmanager
    def signals_noted(self):
        """SIGTERM and SIGINT are only noted, however often they come (torchrun sends Ctrl-C twice)."""

        def remember(signal_number, frame):
            if not self.signal_received:
                self.signal_received = signal_number
                if self.is_world_process_zero():
                    # Python's own streams cannot be written to while the signal interrupts their writing.
                    os.write(2, f"\n{signal.Signals(signal_number).name}: finishing this step, then saving.\n".encode())

        earlier = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def agree_on_signal(self) -> int:
        """The signal that any process was asked to stop by, or 0; every process must call this."""
        self.stop_signal = int(self._maximum(torch.tensor(self.signal_received, device=self.args.device)))
        return self.stop_signal

    def stop_if_asked(self) -> None:
        """Raises `TrainingStopped` for a signal that came after the last step, once the model is saved."""
        if self.agree_on_signal():
            raise self._stopped(self.args.output_dir)

    def _stopped(self, folder: str) -> TrainingStopped:
        return TrainingStopped(self.stop_signal, folder, self.args)

    # ---- Checkpoints ----

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationAbandoned:
            self.evaluation_due = True
            self._save_checkpoint(model, trial)

    def _save_checkpoint(self, model, trial):
        """Saves all that a resumed run needs, then the mark that it is whole, and only then removes older ones.

        Raises `TrainingStopped` when that was asked for, and `QAError`, on every process, when writing fails.
        """
        folder = self._checkpoint_folder()
        loss_state = {
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "nonfinite_steps": self.nonfinite_steps,
            "evaluation_due": self.evaluation_due,
        }
        if self.args.should_save and os.path.exists(folder):
            remove_checkpoint(folder)
        self._barrier()
        try:
            with self._fail_together(folder):
                super()._save_checkpoint(model, trial)
                write_json(os.path.join(folder, LOSS_STATE.format(rank=self.args.process_index)), loss_state)
            with self._fail_together(folder):
                if self.args.should_save:
                    mark_whole(folder, self.state.global_step, not self.args.save_only_model, self.run_settings)
        except QAError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            self._rotate_checkpoints()
        if self.agree_on_signal():
            raise self._stopped(folder)

    def _checkpoint_folder(self) -> str:
        return checkpoint_folder(self.args.output_dir, self.state.global_step)

    def _rotate_checkpoints(self) -> None:
        newest = self._checkpoint_folder()  # there may be later steps of a run that this one has left behind
        kept = {os.path.basename(folder) for folder in (self.state.best_model_checkpoint, newest) if folder}
        rotate_checkpoints(self.args.output_dir, self.save_total_limit, kept)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # The Trainer would look for the model's own names alone, and only warn where a weight is not there.
        if self.is_fsdp_enabled:  # in a format of its own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

    def resume(self) -> None:
        """Goes on with what the checkpoint holds beside the Trainer's own.

        That is the sums of the loss, the evaluations without improvement, and one that was put off.
        """
        self.first_step = self.state.global_step
        self._step_losses.clear()  # of a step that was given up, with --auto_find_batch_size
        if self._resumed_from is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # else other --save_steps would have no effect
        if self.state.best_global_step:
            best = checkpoint_folder(self.args.output_dir, self.state.best_global_step)
            if os.path.isdir(best):  # also where output_dir was moved
                self.state.best_model_checkpoint = best
        file = Path(self._resumed_from, LOSS_STATE.format(rank=self.args.process_index))
        loss_state = json.loads(file.read_text(encoding="utf-8"))
        self._tr_loss += loss_state["tr_loss"]
        self._total_loss_scalar = loss_state["total_loss"]
        self._globalstep_last_logged = loss_state["last_logged"]
        self.nonfinite_steps = loss_state["nonfinite_steps"]
        self._resume_early_stopping()
        if loss_state["evaluation_due"]:
            folder = self._checkpoint_folder()
            if self._determine_best_metric(self._evaluate(None, None), None) and os.path.isdir(folder):
                self.state.best_model_checkpoint = folder

    def _resume_early_stopping(self) -> None:
        """Counts on from the checkpoint, by the patience of this command, which may be another.

        (The Trainer has put the checkpoint's in its place with --restore_callback_states_from_checkpoint.)
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                # A run without early stopping has left nothing, which the next save would miss.
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
                if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
                    self.control.should_training_stop = True  # the run was killed on its way out

    # ---- Processes ----

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    def _maximum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over all processes."""
        if self.args.world_size > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers

    @contextlib.contextmanager
    def _fail_together(self, place: str):
        """Raises `QAError` on every process where one cannot write, so that none waits for one that is gone."""
        failure = None
        try:
            yield
        except (QAError, TrainingStopped):  # on every process
            raise
        except Exception as error:
            # A full disk comes as OSError, RuntimeError or safetensors' own error, depending on the file.
            failure = error
        reasons = [reason for reason in gather(failure and one_line(failure)) if reason]
        if reasons:
            raise QAError(f"cannot write {place}: {reasons[0]}. What was whole before still is") from failure

    # ---- Files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, but never pushes to the hub: that comes once, with the metrics."""
        with self._fail_together(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(output_dir, state_dict=state_dict)
        beside = os.path.join(output_dir, ".saving")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            super()._save(beside, state_dict=state_dict)
            rename_extra_special_tokens(beside)
            for file in sorted(os.listdir(beside)):
                os.replace(os.path.join(beside, file), os.path.join(output_dir, file))
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def create_model_card(self, **kwargs) -> None:
        """Nothing: the Trainer would put a draft of its own in the place of run_squad.py's card."""

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As `Trainer.init_hf_repo`, which comes before training. Raises ValueError where the hub does not let us."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of any library between here and the hub
            raise QAError(
                f"--push_to_hub: cannot make {self.args.hub_model_id or self.args.output_dir} on the hub: "
                f"{one_line(error)}. `hf auth login` or --hub_token says who you are"
            ) from error

    def save_state(self) -> None:
        file = os.path.join(self.args.output_dir, "trainer_state.json")

        def write():
            self.state.save_to_json(f"{file}.partial")
            os.replace(f"{file}.partial", file)

        on_main_process(write)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Writes `{split}_results.json` and adds the metrics to `all_results.json`."""

        def write():
            write_json(os.path.join(self.args.output_dir, f"{split}_results.json"), dict(sorted(metrics.items())))
            if combined:
                file = Path(self.args.output_dir, "all_results.json")
                earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                write_json(file, dict(sorted({**earlier, **metrics}.items())))

        on_main_process(write)


class RunGuard(TrainerCallback):
    """Where the training loop calls back into `QuestionAnsweringTrainer`."""

    def __init__(self, trainer: QuestionAnsweringTrainer):
        self.trainer = trainer
        self.save_at_epoch_end = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.resume()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.seed_order(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.evaluation_due = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trainer.check_step(model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop_signal:
            control.should_save = control.should_training_stop = True
            self.put_off_evaluation(control)
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            # What is due at the end of the epoch comes after this step, and belongs into its checkpoint.
            control.should_save, self.save_at_epoch_end = False, True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.is_in_train and self.trainer.agree_on_signal():
            raise EvaluationAbandoned

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stop_signal:
            if state.epoch != int(state.epoch) and state.global_step < state.max_steps:
                control.should_log = control.should_evaluate = False  # stopped within the epoch
            self.put_off_evaluation(control)
        if self.save_at_epoch_end:
            control.should_save, self.save_at_epoch_end = True, False

    def put_off_evaluation(self, control) -> None:
        if control.should_evaluate:
            control.should_evaluate, self.trainer.evaluation_due = False, True


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
        if self.training_bar is None or "train_runtime" in logs:  # run_squad.py says the sums of the run
            return
        shown = {
            name: value
            for name, value in logs.items()
            if isinstance(value, float)
            and name not in ("epoch", "total_flos")
            and (not name.startswith("eval_") or name in ("eval_exact", "eval_f1", "eval_loss"))
        }
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  {numbers}")


def _set_up_tracker(tracker: str, setup: Callable, *args, **kwargs) -> None:
    """Raises ValueError in one line where the tracker does not let us in, such as without a login."""
    try:
        setup(*args, **kwargs)
    except Exception as error:  # of a library of its own
        raise QAError(f"--report_to {tracker}: {one_line(error)}") from error


def check_private_parts(trainer_class: type) -> None:
    """Raises ImportError where the Trainer lacks a part that is used here, naming it and both versions."""
    methods = vars(trainer_class)
    attributes = set().union(*(value.__code__.co_names for value in methods.values() if inspect.isfunction(value)))
    missing = [name for name in PRIVATE_METHODS if name not in methods]
    missing += [name for name in PRIVATE_ATTRIBUTES if name not in attributes]
    if missing:
        raise ImportError(
            f"the Trainer of transformers {transformers.__version__} has no {', '.join(missing)}, which this program "
            f"needs; it was tested with {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[1]}: "
            f"pip install transformers=={TESTED_VERSIONS[1]}"
        )


def _collate_with(column: str, collate: Callable, rows: list[dict]) -> dict[str, torch.Tensor]:
    """The batch with a column that tells which questions or windows it holds."""
    return {**collate(rows), column: torch.tensor([row[column] for row in rows])}
