"""The Trainer for extractive question answering: evaluation by questions, and runs that survive a kill.

What transformers' Trainer does not do, and this one does:

- it evaluates windows sorted by length, and keeps of their logits no more than the best answers of each question;
- the order of the training windows depends on the seed and the epoch alone, so ranks agree and a resume repeats it;
- checkpoints are complete or not loaded, older ones go only after that, and a resumed run equals one never stopped;
- SIGTERM and SIGINT finish the step, save and stop; a loss that is not finite stops the run before the optimizer steps.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy, speed_metrics

from qa import checkpoints
from qa.columns import column
from qa.distributed import fail_together, gather, on_main_process, writing
from qa.files import QAError, read_json, told_in_one_line, write_json
from qa.load_model import load_weights, rename_extra_special_tokens
from qa.question_answering_pipeline import save_code
from utils_qa import AnswerSearch, AnswerSettings

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The columns of features that a model takes in an evaluation, and what training needs beside them.
INPUTS = ("input_ids", "token_type_ids")
TRAINING_COLUMNS = (*INPUTS, "start_positions", "end_positions", "length")

# What is overridden here of the Trainer beside its public methods, and the newest transformers it was tested with.
PRIVATE_METHODS = ("_get_train_sampler", "_load_best_model", "_load_from_checkpoint", "_save_checkpoint")
NEWEST_TESTED = "5.24.0"

# Before 5.18, transformers resumes several processes on CPUs with the optimizer on "cpu:0", which torch does not know.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class TrainingStopped(Exception):
    """Training was asked to stop by a signal; the run so far is saved in `folder`."""

    def __init__(self, signal_number: int, folder: str, training_args):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; the run so far stands in {folder}. Give "
            f"{checkpoints.same_command(training_args)} again to go on"
        )
        self.exit_status = 128 + signal_number


class QuestionAnsweringTrainer(Trainer, TrainerCallback):
    """Is its own callback: the methods `on_...` are called in the training loop.

    Args:
        train_dataset, eval_dataset: features as `make_features` makes them; of the former with labels.
        eval_examples: the questions (`datasets.Dataset` with `id`) whose windows are `eval_dataset`.
        answer_settings: how answers are picked.
        post_process_function: `(examples, predictions, prefix) -> metrics`, called on the main process alone with
            `QAPredictions`; writes them and returns a flat dict of numbers, empty where there are no gold answers.
        run_settings: what must be equal for a resumed run to be the same run, as a flat JSON-able dict; written
            into every checkpoint.
    """

    def __init__(
        self,
        *args,
        eval_examples=None,
        answer_settings: AnswerSettings | None = None,
        post_process_function: Callable | None = None,
        run_settings: dict | None = None,
        **kwargs,
    ):
        check_private_parts()
        training_args = kwargs["args"]
        # With its own generator the sampler is reseeded here at each epoch, accelerate's seedable one would not be.
        training_args.accelerator_config.use_seedable_sampler = False
        # Rotation waits until the new checkpoint is complete, which `Trainer._save_checkpoint` cannot know.
        self.save_total_limit, training_args.save_total_limit = training_args.save_total_limit, None
        training_args.remove_unused_columns = False  # by the names that a model takes, which `window` is not
        training_args.logging_nan_inf_filter = False  # it waits for the device at each batch; we do at each step
        training_args.restore_callback_states_from_checkpoint = True  # so that early stopping counts on
        super().__init__(*args, **kwargs)
        if self.train_dataset is not None:
            self.train_dataset = _select(self.train_dataset, TRAINING_COLUMNS)
        self.eval_examples = eval_examples
        self.answer_settings = answer_settings or AnswerSettings()
        self.post_process_function = post_process_function
        self.run_settings = run_settings or {}
        self.signal_received = 0  # by this process
        self.stop_signal = 0  # by any process, as they all know since the last step
        self._order = torch.Generator()
        self._search: AnswerSearch | None = None  # of the evaluation in progress
        self._loss_sum = torch.zeros((), device=training_args.device)  # of this process, since the last log entry
        self._resumed_from: str | None = None
        self.add_callback(self)
        for tracker, callback_class in INTEGRATION_TO_CALLBACK.items():
            for callback in self.callback_handler.callbacks:
                if type(callback) is callback_class and hasattr(callback, "setup"):
                    callback.setup = told_in_one_line(f"--report_to {tracker}")(callback.setup)

    # ---- Order of the training windows ----

    def _get_train_sampler(self, train_dataset=None):
        self._train_sampler = super()._get_train_sampler(train_dataset)
        if hasattr(self._train_sampler, "generator"):
            self._train_sampler.generator = self._order
        return self._train_sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Makes the order of this epoch's training windows depend on the seed and the epoch alone."""
        epoch = int(state.epoch or 0)
        seed = args.data_seed if args.data_seed is not None else args.seed
        self._order.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))
        if hasattr(self._train_sampler, "set_epoch"):
            # batch_rebalance shuffles by its own seed, and is out of the Trainer's reach in a resumed epoch.
            self._train_sampler.seed = seed
            self._train_sampler.set_epoch(epoch)

    # ---- Evaluation and prediction ----

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers the evaluation questions and returns the metrics, their names prefixed (`eval_f1`)."""
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        metrics = self._answer(features, examples, metric_key_prefix)
        self.log(metrics)
        # A copy, since a notebook's progress callback takes out what it does not show.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(metrics))
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="predict"):
        """Answers `predict_examples` and returns the metrics: those of speed alone where there are no gold answers."""
        metrics = self._answer(predict_dataset, predict_examples, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, dict(metrics))
        return metrics

    def _answer(self, features, examples, prefix: str) -> dict[str, float]:
        def score():
            scores = self.post_process_function(examples, search.predictions(), prefix)
            return {**scores, **self._loss(search, prefix)}

        with self._closing_bars():
            search, metrics = self.find_answers(features, examples, prefix)
            scores = on_main_process(score)
        return {**{f"{prefix}_{name}": value for name, value in scores.items()}, **metrics}

    def find_answers(self, features, examples, prefix: str) -> tuple[AnswerSearch, dict[str, float]]:
        """Runs the model over `features`, the windows of `examples`.

        Returns (a search that has kept all windows, on every process; speed metrics). Logits that are not finite are
        refused when the search is asked for answers or the loss.
        """
        start_time = time.time()
        self._search = AnswerSearch(examples, features, self.answer_settings, self.args.device)
        # Windows of like length share a batch; the longest come first, so that running out of memory shows at once.
        order = np.argsort(-column(features, "length").to_numpy(), kind="stable")
        rows = _select(features, INPUTS).add_column("window", np.arange(len(features), dtype=np.int32)).select(order)
        loader = DataLoader(
            rows,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # Evaluating must not move the random state that training goes on with.
        with torch.random.fork_rng(devices=[]):
            self.evaluation_loop(self.accelerator.prepare(loader), "Evaluation", prediction_loss_only=False)
        return self._search, speed_metrics(prefix, start_time, num_samples=len(features))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`, but keeps best spans and losses, and no logits for the Trainer to keep."""
        window = inputs.pop("window").to(self.args.device)
        _, logits, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        found = self._search.find(window, *logits[:2])
        self._search.keep(self.accelerator.gather_for_metrics(found))
        return None, None, None

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

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As `Trainer.train`; raises `TrainingStopped` after a signal and `QAError` where it cannot go on."""
        self._resumed_from = resume_from_checkpoint
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # that has been, and would count a second time for the patience
        with self._closing_bars():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores what the Trainer does not restore from a checkpoint."""
        self._loss_sum.zero_()  # of a step that was given up, with --auto_find_batch_size
        if self._resumed_from is None:
            return
        self._loss_sum += checkpoints.read_marker(self._resumed_from)["loss_sums"][args.process_index]
        state.compute_steps(args, state.max_steps)  # else other --save_steps would have no effect
        best = checkpoints.checkpoint_folder(args.output_dir, state.best_global_step)
        if os.path.isdir(best):  # also where output_dir was moved
            state.best_model_checkpoint = best
        # The checkpoint may be that of the last step, by --max_steps or early stopping.
        control.should_training_stop = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer.get_batch_samples`, but none where training has ended: resumed there, it makes no step more."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_sum += loss
        return loss

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Raises QAError for a loss or gradient that is not finite, on any process; asks for signals as well.

        That waits for the device once a step, and nothing else here does.
        """
        bad_loss = ~torch.isfinite(self._loss_sum)
        bad_gradient = torch.zeros_like(bad_loss)
        if self.accelerator.scaler is None:  # float16's looks for itself
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's are in shards
            bad_gradient = ~torch.isfinite(norm).to(bad_loss.device)  # the norm of no gradients is on the CPU
        received = torch.tensor(self.signal_received, device=bad_loss.device)
        flags = self._maximum(torch.stack([bad_loss, bad_gradient, received]))
        bad_loss, bad_gradient, self.stop_signal = flags.tolist()
        if bad_loss or bad_gradient:
            raise QAError(
                f"the {'loss' if bad_loss else 'gradient'} at step {state.global_step + 1} is not finite. The last "
                "complete checkpoint stays good; a lower --learning_rate may help"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the losses of a run never stopped: the Trainer counts from the resume on."""
        if "loss" in logs or "train_loss" in logs:
            loss_sum = float(np.mean(gather(self._loss_sum.item())))
            logged = [entry for entry in self.state.log_history if "loss" in entry]
            steps = [0, *(entry["step"] for entry in logged)]
            if "loss" in logs:
                logs["loss"] = loss_sum / (self.state.global_step - steps[-1])
                self._loss_sum.zero_()
            else:
                loss_sum += float(np.dot([entry["loss"] for entry in logged], np.diff(steps)))
                logs["train_loss"] = loss_sum / max(self.state.global_step, 1)
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _closing_bars(self):
        """Where the run ends by an error, ends the lines of the progress bars, so that it has a line of its own."""
        try:
            yield
        except Exception:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    for bar in filter(None, (callback.prediction_bar, callback.training_bar)):
                        bar.close()
            raise

    # ---- Signals ----

    @contextlib.contextmanager
    def signals_noted(self):
        """SIGTERM and SIGINT are only noted, however often they come (torchrun sends Ctrl-C twice).

        In a thread beside the main one, as a web app's, signals are the main thread's: they are left to it.
        """

        def remember(signal_number, frame):
            if not self.signal_received:
                self.signal_received = signal_number
                if self.is_world_process_zero():
                    # Python's own streams cannot be written to while the signal interrupts their writing.
                    os.write(2, f"\n{signal.Signals(signal_number).name}: finishing this step, then saving.\n".encode())

        in_main_thread = threading.current_thread() is threading.main_thread()
        earlier = {number: signal.signal(number, remember) for number in STOP_SIGNALS if in_main_thread}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _maximum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over all processes."""
        if self.args.world_size > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers

    def stop_if_asked(self, folder: str | None = None) -> None:
        """Raises `TrainingStopped` where any process has received a signal; every process must call this.

        folder: what holds the run so far, by default output_dir.
        """
        stop_signal = int(self._maximum(torch.tensor(self.signal_received, device=self.args.device)))
        if stop_signal:
            raise TrainingStopped(stop_signal, folder or self.args.output_dir, self.args)

    # ---- Checkpoints ----

    def on_step_end(self, args, state, control, **kwargs):
        """What is due at the end of an epoch comes at its last step, since it belongs into the checkpoint of that."""
        if control.should_training_stop or state.epoch == int(state.epoch):
            DefaultFlowCallback().on_epoch_end(args, state, control)
        if self.stop_signal:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # else the Trainer saves only where that is the best
                args.save_strategy = SaveStrategy.STEPS

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = control.should_evaluate = control.should_save = False

    def _save_checkpoint(self, model, trial):
        """Saves all that a resumed run needs, then the marker that it is complete, and only then removes older ones.

        Raises `TrainingStopped` when that was asked for, and `QAError`, on every process, when writing fails.
        """
        folder = checkpoints.checkpoint_folder(self.args.output_dir, self.state.global_step)
        loss_sums = gather(self._loss_sum.item())
        try:
            with writing(folder):
                if self.args.should_save and os.path.exists(folder):
                    checkpoints.remove_checkpoint(folder)
            with writing(folder):
                super()._save_checkpoint(model, trial)
            with writing(folder):
                if self.args.should_save:
                    resumable = not self.args.save_only_model
                    checkpoints.mark_complete(folder, self.run_settings, resumable, loss_sums)
        except QAError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            # There may be later steps than this one, of a run that was left behind.
            kept = {os.path.basename(path) for path in (self.state.best_model_checkpoint, folder) if path}
            checkpoints.rotate_checkpoints(self.args.output_dir, self.save_total_limit, kept)
        self.stop_if_asked(folder)

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

    # ---- Files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, but never pushes to the hub: that comes once, with the metrics."""
        folder = output_dir or self.args.output_dir
        with writing(folder):
            super().save_model(folder, _internal_call=True)
            if self.args.should_save:
                rename_extra_special_tokens(folder)
                save_code(folder)

    def save_state(self) -> None:
        with writing(self.args.output_dir):
            super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As `Trainer.save_metrics`; a kill leaves no half of a file, which the same command given again would read."""

        def write():
            write_json(os.path.join(self.args.output_dir, f"{split}_results.json"), dict(sorted(metrics.items())))
            if combined:
                file = os.path.join(self.args.output_dir, checkpoints.ALL_RESULTS)
                write_json(file, dict(sorted({**read_json(file), **metrics}.items())))

        on_main_process(write)

    def create_model_card(self, **kwargs) -> None:
        """Nothing: the Trainer would put a draft of its own in the place of run_squad.py's card."""

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As `Trainer.init_hf_repo`, which comes before training. Raises QAError where the hub does not let us."""
        name = self.args.hub_model_id or self.args.output_dir
        who = "`hf auth login` or --hub_token says who you are"
        with fail_together(), told_in_one_line(f"--push_to_hub: cannot make {name} on the hub ({who})"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, **kwargs):
        """As `Trainer.push_to_hub`: sends output_dir, checkpoints aside. Raises QAError where that fails."""
        again = f"all of it stands in {self.args.output_dir}; {checkpoints.same_command(self.args)} tries again"
        with fail_together(), told_in_one_line(f"cannot push to the hub ({again})"):
            return super().push_to_hub(**kwargs)


def _select(features, columns: tuple[str, ...]):
    return features.select_columns([name for name in columns if name in features.column_names])


def check_private_parts() -> None:
    """Raises QAError where the Trainer lacks a method that is overridden here: the override would never be called."""
    missing = [name for name in PRIVATE_METHODS if not hasattr(Trainer, name)]
    if missing:
        raise QAError(
            f"the Trainer of transformers {transformers.__version__} has no {', '.join(missing)}, which this program "
            f"needs: pip install transformers=={NEWEST_TESTED}"
        )
