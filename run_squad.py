#!/usr/bin/env python
"""Fine-tunes BERT, with absolute or relative position embeddings, for extractive question answering on SQuAD.

    python run_squad.py --model_name_or_path google-bert/bert-base-uncased --dataset_name squad --do_train --do_eval \
        --output_dir squad_model
    torchrun --nproc_per_node=8 run_squad.py ...
    python run_squad.py arguments.json [--learning_rate 1e-4 ...]
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import TrainerState

from qa import checkpoints
from qa.distributed import (
    meet_after_restart,
    on_main_process,
    run_and_exit,
    set_up_logging,
    was_launched,
    was_restarted,
)
from qa.files import QAError, one_line, require_at_least_1, write_text
from qa.legacy_flags import parse_flags
from qa.load_model import (
    POSITION_EMBEDDING_TYPES,
    add_pipeline,
    check_length,
    fit_token_types,
    load_config,
    load_model,
    load_tokenizer,
    load_trained_model,
    position_type_of,
    resize_position_embeddings,
)
from qa.model_card import model_card
from qa.train_questions import MISPLACED_ANSWERS, read_examples
from qa.windows import QADataCollator, WindowSettings, data_limits, keep_negative_windows, make_features
from trainer_qa import QuestionAnsweringTrainer, TrainingStopped
from utils_qa import METRIC_NAMES, AnswerSettings, squad_scores, write_predictions

logger = logging.getLogger("run_squad")

OUT_OF_MEMORY = (
    "Halve --per_device_train_batch_size and double --gradient_accumulation_steps (in evaluation halve "
    "--per_device_eval_batch_size), or try --gradient_checkpointing, --bf16 or a smaller --max_seq_length"
)


@dataclass
class ModelArguments:
    """Which model, and from where."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A folder or the name of a model on the hub."})
    config_name: str | None = field(default=None, metadata={"help": "Another configuration than the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's own."})
    do_lower_case: bool | None = field(
        default=None, metadata={"help": "Whether a tokenizer lower-cases text whose folder does not say it."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where models, datasets and features are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the hub, instead of `hf auth login`'s."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code kept with the model to run here."})
    position_embedding_type: str | None = field(
        default=None,
        metadata={
            "help": "Position embeddings of BERT; by default the checkpoint's own. Relative ones of an absolute "
            "checkpoint start untrained.",
            "choices": list(POSITION_EMBEDDING_TYPES),
        },
    )

    @property
    def source(self) -> dict:
        """Where all that is loaded by a name comes from, as the functions of `qa.load_model` take it."""
        names = ("token", "cache_dir", "trust_remote_code")
        return {"revision": self.model_revision, **{name: getattr(self, name) for name in names}}


@dataclass
class DataTrainingArguments(AnswerSettings, WindowSettings):
    """Which questions, and how they become windows and answers."""

    _argument_group_name = "questions and answers"

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub, such as squad, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "File to train on, in one of SQuAD's layouts; or a folder of them, or 'data/*'."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "File to predict on; its questions need no answers."})
    validation_split_percentage: int | None = field(
        default=None,
        metadata={
            "help": "Without validation questions: evaluate on all questions of N%% of the training contexts, drawn "
            "by the seed, and train on the others."
        },
    )
    misplaced_answers: str = field(
        default="repair",
        metadata={
            "help": "A training answer that does not stand at its answer_start: repair (look for it in its context, "
            "and leave the question out where it is not there), drop (leave the question out) or refuse.",
            "choices": list(MISPLACED_ANSWERS),
        },
    )
    negative_windows: float = field(
        default=1.0,
        metadata={
            "help": "Train on this share of the windows that hold no answer, drawn by the seed; of a contract nearly "
            "all are such."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N questions only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N questions only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N questions only."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every window to max_seq_length (for TPUs)."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that make the features."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Make the features anew."})

    def __post_init__(self):
        AnswerSettings.__post_init__(self)
        WindowSettings.__post_init__(self)
        require_at_least_1(
            self, "max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"
        )
        percentage = self.validation_split_percentage
        if percentage is not None and not 1 <= percentage <= 99:
            raise QAError(f"--validation_split_percentage is {percentage}, must be from 1 to 99")
        if not 0 <= self.negative_windows <= 1:
            raise QAError(f"--negative_windows is {self.negative_windows}, must be a share from 0 to 1")


@dataclass
class QATrainingArguments(TrainingArguments):
    """transformers' own, with what question answering needs."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Order of the training windows; group_by_length makes batches that need little padding."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew where output_dir holds a run already, removing its checkpoints."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after N evaluations in a row in which --metric_for_best_model has not improved."},
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "By how much it must have improved."})

    def __post_init__(self):
        if self.output_dir is None:
            raise QAError("--output_dir is missing: name the folder that the model and the results go to")
        require_at_least_1(
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "early_stopping_patience",
        )
        if self.label_smoothing_factor:
            raise QAError("--label_smoothing_factor has no effect on start and end positions: leave it out")
        stops_early = self.early_stopping_patience is not None
        if stops_early and self.eval_strategy == "no":
            raise QAError("--early_stopping_patience needs evaluations: give --eval_strategy epoch or steps as well")
        if not 0 <= self.early_stopping_threshold < math.inf:
            raise QAError(f"--early_stopping_threshold is {self.early_stopping_threshold}, must be 0 or more")
        scheduled_by_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        needs_metric = self.load_best_model_at_end or self.save_strategy == "best" or scheduled_by_metric or stops_early
        if self.metric_for_best_model is None and needs_metric:
            self.metric_for_best_model = "f1"
        best = self.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in (*METRIC_NAMES, "loss"):
            raise QAError(f"--metric_for_best_model is {best!r}, must be one of {', '.join(METRIC_NAMES)}, loss")
        if not torch.accelerator.is_available():
            # Unset, every process under torchrun would be a world of its own and train alone into the same folder.
            self.use_cpu = True
            if self.fsdp:
                raise QAError("--fsdp needs GPUs, and there is none here: leave it out")
        if not was_launched():
            self.ddp_backend = None  # which a single process could not start
        if self.run_name is None:  # a tracker's name for the run, under which its parts come together
            self.run_name = os.path.basename(os.path.normpath(self.output_dir))
        if self.use_cpu or torch.cuda.is_available():
            meet_after_restart(self.ddp_backend or ("gloo" if self.use_cpu else "nccl"), self.ddp_timeout)
        if self.disable_tqdm is None:  # else it goes by what transformers logs, which an earlier run here has set
            self.disable_tqdm = self.log_level in ("warning", "error", "critical")
        super().__post_init__()
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise QAError(f"ACCELERATE_MIXED_PRECISION is {self.mixed_precision!r}, must be no, fp16 or bf16")
        # accelerate's launcher may have decided on it.
        self.fp16, self.bf16 = (self.mixed_precision == name for name in ("fp16", "bf16"))
        if self.greater_is_better and scheduled_by_metric:
            # Both wait for a number that falls, unless they are told.
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.world_size == 1 and self._n_gpu > 1:
            logger.warning(f"Using one of {self._n_gpu} GPUs. To use all: torchrun --nproc_per_node={self._n_gpu} ...")
            self._n_gpu = 1  # else the Trainer would make it DataParallel

    def __getstate__(self):
        # training_args.bin goes to the hub with the model.
        return {**self.__dict__, "hub_token": None}


ARGUMENT_GROUPS = (ModelArguments, DataTrainingArguments, QATrainingArguments)


def main(argv: list[str] | None = None) -> None:
    run_as("run_squad.py", lambda: run(*parse_arguments(sys.argv[1:] if argv is None else argv)))


def run_as(prog: str, program: Callable[[], None]) -> None:
    """Runs a program; what ends it early is told in one line, and by the exit status."""

    def end(message: str, status: int, any_process: bool = False) -> NoReturn:
        rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))  # one line on each machine
        if any_process or int(rank) == 0:
            print(f"{prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(status)

    try:
        program()
    except TrainingStopped as stopped:
        end(f"{stopped}.", stopped.exit_status)
    except KeyboardInterrupt:
        end("interrupted", 130)
    except QAError as error:
        end(f"error: {one_line(error)}", 2)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        end(f"error: {one_line(error)}. {OUT_OF_MEMORY}", 2, any_process=True)


def run(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: QATrainingArguments) -> None:
    transformers.set_seed(training_args.seed)
    name, source = model_args.model_name_or_path, model_args.source
    config = load_config(name, model_args.position_embedding_type, config_name=model_args.config_name, **source)
    add_pipeline(config, data_args)
    tokenizer = load_tokenizer(model_args.tokenizer_name or name, model_args.do_lower_case, **source)
    examples, answer_changes = read_examples(model_args, data_args, training_args)
    features = make_windows(examples, tokenizer, data_args, training_args)

    settings = checkpoints.run_settings(model_args, data_args, training_args, position_type_of(config), features)
    restarted = was_restarted()
    trained, checkpoint = on_main_process(lambda: checkpoints.plan_run(training_args, settings, restarted))
    if trained:
        model = load_trained_model(training_args.output_dir, model_args.trust_remote_code)
    else:
        model = load_model(name, config, complete=not training_args.do_train, **source)
    resize_position_embeddings(model, tokenizer, data_args.max_seq_length)
    fit_token_types(model, tokenizer)
    check_length(data_args.max_seq_length, model, tokenizer)
    trainer = make_trainer(model, tokenizer, examples, features, settings, data_args, training_args)
    log_summary(model, data_args, training_args)
    if trainer.is_world_process_zero():
        checkpoints.write_qa_settings(training_args, model_args, data_args)

    if trained:
        logger.info("Training was finished before; going on with the model in %s.", training_args.output_dir)
        trainer.state = TrainerState.load_from_json(os.path.join(training_args.output_dir, "trainer_state.json"))
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
    elif training_args.do_train:
        train(trainer, settings, checkpoint, answer_changes)
    scores = save_answered(trainer, "eval", trainer.evaluate(), features["validation"]) if training_args.do_eval else {}
    if training_args.do_predict:
        metrics = trainer.predict(features["test"], examples["test"])
        save_answered(trainer, "predict", metrics, features["test"])

    if trainer.is_world_process_zero() and training_args.do_train:
        card = model_card(model_args, data_args, training_args, position_type_of(config), scores, trainer.hub_model_id)
        write_text(os.path.join(training_args.output_dir, "README.md"), [card])
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        if scores:
            print(json.dumps(scores, indent=2), flush=True)
        log_where(training_args)
    trainer.accelerator.end_training()  # of the trackers


# ---- Arguments ----


def parse_arguments(argv: list[str], groups=ARGUMENT_GROUPS, **settings: str):
    """The three groups of arguments from flags, and from the JSON file that may stand before them.

    `groups`, `settings`: of a program that takes these with more, and what argparse says of it. Raises QAError for a
    flag that is unknown or refused, and for a value that cannot be.
    """
    usage = "%(prog)s --model_name_or_path MODEL --output_dir FOLDER [--do_train] [--do_eval] [--do_predict] ..."
    settings = {"prog": "run_squad.py", "usage": usage, "description": __doc__.split("\n")[0], **settings}
    (model_args, data_args, training_args), notices = parse_flags(groups, argv, **settings)
    level = logging.INFO if training_args.log_level == "passive" else training_args.get_process_log_level()
    set_up_logging(level if training_args.process_index == 0 else logging.ERROR)
    for notice in notices:
        logger.info(notice)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise QAError("nothing to do: give --do_train, --do_eval or --do_predict")
    best = (training_args.metric_for_best_model or "").removeprefix("eval_")
    if best.startswith(("best_", "NoAns_")) and not data_args.version_2_with_negative:
        raise QAError(f"--metric_for_best_model {best} is there with --version_2_with_negative only")
    if training_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        logger.warning("Without --load_best_model_at_end the model will be that of the last step, not the best one.")
    for tracker in training_args.report_to:
        if tracker not in get_available_reporting_integrations():
            raise QAError(f"--report_to {tracker}: no such tracker is installed; pip install it or leave the flag out")
    return model_args, data_args, training_args


def log_summary(model, data_args, training_args: QATrainingArguments) -> None:
    """What is trained or evaluated, and how; `make_windows` has said on what."""
    logger.info("Model: %s, %s positions.", type(model).__name__, position_type_of(model.config))
    logger.info(
        f"Windows: at most {data_args.max_seq_length} tokens; the next one starts {data_args.doc_stride} context "
        "tokens later (run_qa.py took --doc_stride as the overlap instead)."
    )
    precision = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    logger.info("Device: %s, %d process(es), %s.", training_args.device, training_args.world_size, precision)


# ---- Windows ----


def make_windows(examples: dict, tokenizer, data_args, training_args) -> dict:
    """The features of each split, as `examples`; of the training windows those that are trained on."""
    with training_args.main_process_first(desc="making the features"):
        features = {
            split: make_features(
                questions,
                tokenizer,
                data_args,
                num_proc=data_args.preprocessing_num_workers,
                overwrite_cache=data_args.overwrite_cache and training_args.local_process_index == 0,
                desc=f"{split} features",
            )
            for split, questions in examples.items()
        }
    for split, questions in examples.items():
        logger.info("%s: %d questions, %d windows.", split.capitalize(), len(questions), len(features[split]))
        for line in data_limits(features[split], data_args.max_answer_length, data_args.max_query_length):
            logger.info("%s: %s.", split.capitalize(), line)
    if "train" in features:
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        features["train"] = keep_negative_windows(features["train"], data_args.negative_windows, seed)
        batch = training_args.train_batch_size * training_args.world_size
        if training_args.dataloader_drop_last and len(features["train"]) < batch:
            raise QAError(
                f"--dataloader_drop_last leaves nothing of {len(features['train'])} windows in batches of {batch}"
            )
    return features


# ---- Training and answers ----


def make_trainer(model, tokenizer, examples, features, settings, data_args, training_args) -> QuestionAnsweringTrainer:
    if model.config.model_type == "bert" and training_args.ddp_find_unused_parameters is None:
        # Every trainable parameter of BERT takes part in the loss, so DDP need not look for those that do not.
        training_args.ddp_find_unused_parameters = False

    def post_process(examples, predictions, prefix):
        write_predictions(predictions, training_args.output_dir, prefix)
        if "answers" not in examples.column_names:
            return {}
        return squad_scores(examples, predictions, data_args.null_score_diff_threshold)

    callbacks = []
    if training_args.early_stopping_patience is not None:
        patience = training_args.early_stopping_patience, training_args.early_stopping_threshold
        callbacks.append(EarlyStoppingCallback(*patience))
    half_precision = training_args.fp16 or training_args.bf16
    return QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        eval_examples=examples.get("validation"),
        processing_class=tokenizer,
        data_collator=QADataCollator(
            tokenizer,
            pad_to_max_length=data_args.max_seq_length if data_args.pad_to_max_length else None,
            # For half precision's kernels, where that cannot lead beyond the model's positions.
            pad_to_multiple_of=8 if half_precision and data_args.max_seq_length % 8 == 0 else None,
        ),
        answer_settings=data_args,
        post_process_function=post_process,
        run_settings=settings,
        callbacks=callbacks,
    )


def train(trainer: QuestionAnsweringTrainer, settings: dict, checkpoint: str | None, answer_changes: list) -> None:
    """Trains from `checkpoint` or anew, and saves the model, its tokenizer, the metrics and the state."""
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    on_main_process(lambda: checkpoints.begin_run(trainer.args, settings, checkpoint, answer_changes))
    with trainer.signals_noted():
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics["train_samples"] = len(trainer.train_dataset)
        trainer.save_model()
        logger.info("Trained for %.0f s; mean loss %.4g.", metrics["train_runtime"], metrics["train_loss"])
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        on_main_process(lambda: checkpoints.write_run_state(trainer.args.output_dir, "trained", settings))
    trainer.stop_if_asked()


def save_answered(trainer: QuestionAnsweringTrainer, split: str, metrics: dict[str, float], features) -> dict:
    """Logs and saves the metrics of an evaluation ("eval") or prediction ("predict"); returns the scores alone."""
    metrics[f"{split}_samples"] = len(features)
    trainer.save_metrics(split, metrics)
    scores = {name: metrics[f"{split}_{name}"] for name in METRIC_NAMES if f"{split}_{name}" in metrics}
    said = "".join(f", {name} {scores[name]:.2f}" for name in ("exact", "f1") if name in scores)
    logger.info(f"Answered ({split}): {len(features)} windows in {metrics[f'{split}_runtime']:.1f} s{said}.")
    return scores


def log_where(training_args: QATrainingArguments) -> None:
    """The last lines of a run: where everything is, and what to do with it."""
    folder = training_args.output_dir
    logger.info("Everything is in %s.", folder)
    if training_args.do_train:
        logger.info("To ask the model: python scripts/ask.py %s --context_file FILE", folder)
    if training_args.do_eval:
        logger.info("To see where it fails: python scripts/report.py %s", folder)


if __name__ == "__main__":
    run_and_exit(main)
