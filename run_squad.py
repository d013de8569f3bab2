#!/usr/bin/env python
"""Fine-tunes BERT, with absolute or relative position embeddings, for extractive question answering on SQuAD.

    python run_squad.py --model_name_or_path google-bert/bert-base-uncased --dataset_name squad --do_train --do_eval \
        --output_dir squad_model
    torchrun --nproc_per_node=8 run_squad.py ...
    python run_squad.py arguments.json
"""

import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field

import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import TrainerState

from qa import checkpoints
from qa.distributed import exit_process, meet_after_restart, on_main_process, set_up_logging, was_restarted
from qa.files import QAError, one_line, write_text
from qa.legacy_flags import flags_from_json, make_parser, refuse_unknown_flags, translate_flags
from qa.load_model import (
    POSITION_EMBEDDING_TYPES,
    check_length,
    grow_positions,
    load_config,
    load_model,
    load_tokenizer,
    load_trained_model,
    position_type_of,
)
from qa.model_card import model_card
from qa.read_squad import load_examples
from qa.train_questions import MISPLACED_ANSWERS, hold_out, place_answers, warn_of_flags, warn_of_misplaced_golds
from qa.windows import (
    QADataCollator,
    WindowSettings,
    data_limits,
    keep_negative_windows,
    make_features,
    make_train_features,
)
from trainer_qa import QuestionAnsweringTrainer, TrainingStopped
from utils_qa import AnswerSettings, squad_scores, write_predictions

logger = logging.getLogger("run_squad")

METRIC_NAMES = """
    exact f1 total HasAns_exact HasAns_f1 HasAns_total NoAns_exact NoAns_f1 NoAns_total
    best_exact best_exact_thresh best_f1 best_f1_thresh
""".split()
# What the help shows first: transformers' flags that each run needs, and ours that stand among them.
WHAT_TO_DO = """
    do_train do_eval do_predict output_dir overwrite_output_dir resume_from_checkpoint
""".split()
OUT_OF_MEMORY = (
    "Halve --per_device_train_batch_size and double --gradient_accumulation_steps (in evaluation halve "
    "--per_device_eval_batch_size), or try --gradient_checkpointing, --bf16 or a smaller --max_seq_length"
)
# One of these is set where a launcher has started this process.
LAUNCHER_VARIABLES = "LOCAL_RANK WORLD_SIZE PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE".split()


def check_at_least_1(arguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise QAError(f"--{name} is {value}, must be at least 1")


@dataclass
class ModelArguments:
    """Which model, and from where."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A folder or the name of a model on the hub."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration folder or name, where it is not the model's."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or name, where it is not the model's."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where models and datasets of the hub, and features, are kept."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Token for the hub; by default the one that `hf auth login` has stored."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow model code that is kept with the model on the hub to run here."}
    )
    position_embedding_type: str | None = field(
        default=None,
        metadata={
            "help": "Position embeddings of BERT; by default the checkpoint's own. The relative types can start from "
            "an absolute checkpoint: their distance embeddings are then untrained.",
            "choices": list(POSITION_EMBEDDING_TYPES),
        },
    )


@dataclass
class DataTrainingArguments:
    """Which questions, and how they become windows and answers."""

    _argument_group_name = "questions and answers"

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the hub, such as squad."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "File to train on: JSON, JSON lines or Parquet in a SQuAD layout, also gzipped."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "File to predict on; its questions need no answers."})
    validation_split_percentage: int | None = field(
        default=None,
        metadata={
            "help": "Where there are no validation questions: evaluate on N%% of the training contexts, chosen "
            "by --seed, with all their questions, and train on the others."
        },
    )
    misplaced_answers: str = field(
        default="repair",
        metadata={
            "help": "What to do with a training answer that does not stand at its answer_start: repair (look "
            "for it in its context; leave the question out where it is not there), drop (leave the question out) or "
            "refuse.",
            "choices": list(MISPLACED_ANSWERS),
        },
    )
    max_seq_length: int = field(
        default=384, metadata={"help": "Most tokens of a window: question, a part of the context, special tokens."}
    )
    doc_stride: int = field(
        default=128,
        metadata={"help": "Context tokens from the start of one window to the start of the next, in a long context."},
    )
    max_query_length: int = field(default=64, metadata={"help": "Most tokens of a question; the rest is cut."})
    n_best_size: int = field(
        default=20, metadata={"help": "How many start and end positions are combined, and how many answers kept."}
    )
    max_answer_length: int = field(default=30, metadata={"help": "Most tokens of an answer."})
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Some questions have no answer in their context, as in SQuAD 2.0."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Answer with nothing where its score is above the best answer's by more than this."},
    )
    negative_windows: float = field(
        default=1.0,
        metadata={
            "help": "Train on this share of the windows that hold no answer, drawn by the seed; in SQuAD 2.0 those of "
            "questions without an answer are among them. 1 is what was published; of a contract nearly all are such."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N questions only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N questions only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N questions only."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every window to max_seq_length (for TPUs) instead of to the longest of its batch."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that make the features."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Make the features anew."})

    def __post_init__(self):
        names = "n_best_size max_answer_length max_train_samples max_eval_samples max_predict_samples"
        check_at_least_1(self, *names.split(), "preprocessing_num_workers")
        percentage = self.validation_split_percentage
        if percentage is not None and not 1 <= percentage <= 99:
            raise QAError(f"--validation_split_percentage is {percentage}, must be from 1 to 99")
        if not 0 <= self.negative_windows <= 1:
            raise QAError(f"--negative_windows is {self.negative_windows}, must be a share from 0 to 1")


@dataclass
class QATrainingArguments(TrainingArguments):
    """transformers' own, with what question answering needs."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    output_dir: str | None = field(
        default=None, metadata={"help": "The folder that the model, its checkpoints, answers and metrics go to."}
    )
    do_train: bool = field(default=False, metadata={"help": "Train, and save the model."})
    do_eval: bool = field(default=False, metadata={"help": "Answer the validation questions, and score the answers."})
    do_predict: bool = field(
        default=False, metadata={"help": "Answer the test questions; scored only where they have gold answers."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to go on from; by default the last one of an unfinished run in output_dir."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training windows: group_by_length (batches of like length, so that little is "
            "padded), random, sequential or batch_rebalance."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew where output_dir holds a run already, removing its checkpoints."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after N evaluations in a row in which --metric_for_best_model has not improved."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much it must improve to count as improved."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise QAError("--output_dir is missing: name the folder that the model and the results go to")
        check_at_least_1(
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "early_stopping_patience",
        )
        if not torch.accelerator.is_available():
            # Unset, every process under torchrun would be a world of its own and train alone into the same folder.
            self.use_cpu = True
            if self.fsdp:
                raise QAError("--fsdp needs GPUs, and there is none here: leave it out")
        if not self.dataloader_in_order:
            raise QAError("--dataloader_in_order False would mix up the windows: leave it out")
        if not self.eval_do_concat_batches or self.batch_eval_metrics:
            raise QAError(
                "answers are kept, not logits: --eval_do_concat_batches False and --batch_eval_metrics would have no "
                "effect. Leave them out"
            )
        if self.label_smoothing_factor:
            raise QAError("--label_smoothing_factor has no effect on start and end positions: leave it out")
        if self.enable_jit_checkpoint:
            raise QAError("--enable_jit_checkpoint is always on here: SIGTERM saves a checkpoint. Leave it out")
        if self.run_name is None:  # a tracker's name for the run, under which its parts come together
            self.run_name = os.path.basename(os.path.normpath(self.output_dir))
        stops_early = self.early_stopping_patience is not None
        if stops_early and self.eval_strategy == "no":
            raise QAError("--early_stopping_patience needs evaluations: give --eval_strategy epoch or steps as well")
        if not stops_early and self.early_stopping_threshold:
            raise QAError("--early_stopping_threshold has no effect without --early_stopping_patience: leave it out")
        if not 0 <= self.early_stopping_threshold < math.inf:
            raise QAError(f"--early_stopping_threshold is {self.early_stopping_threshold}, must be 0 or more")
        scheduled_by_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        needs_metric = self.save_strategy == "best" or scheduled_by_metric or stops_early
        if self.metric_for_best_model is None and (self.load_best_model_at_end or needs_metric):
            self.metric_for_best_model = "f1"
        best = self.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in (*METRIC_NAMES, "loss"):
            raise QAError(f"--metric_for_best_model is {best!r}, must be one of {', '.join(METRIC_NAMES)}, loss")
        if self.ddp_backend is not None and not any(name in os.environ for name in LAUNCHER_VARIABLES):
            logger.warning("--ddp_backend %s has no effect: without torchrun there is one process.", self.ddp_backend)
            self.ddp_backend = None
        if self.use_cpu or torch.cuda.is_available():
            meet_after_restart(self.ddp_backend or ("gloo" if self.use_cpu else "nccl"), self.ddp_timeout)
        super().__post_init__()
        if self.greater_is_better and scheduled_by_metric:
            # Both wait for a number that falls, unless they are told.
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.world_size > 1 and not self.accelerator_config.even_batches:
            raise QAError(
                "--accelerator_config even_batches false would leave processes waiting for each other: leave it out"
            )
        if self.world_size == 1 and self._n_gpu > 1:
            logger.warning(
                "Using one of %d GPUs. To use all: torchrun --nproc_per_node=%d run_squad.py ...",
                self._n_gpu,
                self._n_gpu,
            )
            self._n_gpu = 1  # else the Trainer would make it DataParallel

    def __getstate__(self):
        # training_args.bin goes to the hub with the model.
        return {**self.__dict__, "hub_token": None}


ARGUMENT_GROUPS = (ModelArguments, DataTrainingArguments, QATrainingArguments)


def main(argv: list[str] | None = None) -> None:
    try:
        run(*parse_arguments(sys.argv[1:] if argv is None else argv))
    except TrainingStopped as stopped:
        _exit(f"{stopped}.", stopped.exit_status)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except RuntimeError as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if os.environ.get("RUN_SQUAD_DEBUG") or not out_of_memory:
            raise
        _exit(f"error: {one_line(error)}. {OUT_OF_MEMORY}", 1, any_process=True)
    except (ValueError, OSError, QAError, ImportError) as error:
        if os.environ.get("RUN_SQUAD_DEBUG"):
            raise
        _exit(f"error: {one_line(error)}", 2 if isinstance(error, ValueError) else 1)


def run(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: QATrainingArguments) -> None:
    transformers.set_seed(training_args.seed)
    name, source = model_args.model_name_or_path, hub_source(model_args)
    position_type = model_args.position_embedding_type
    config = load_config(name, position_type, config_name=model_args.config_name, **source)
    tokenizer = load_tokenizer(model_args.tokenizer_name or name, **source)
    examples, answer_changes = read_examples(model_args, data_args, training_args)
    features = make_windows(examples, tokenizer, data_args, training_args)

    settings = checkpoints.run_settings(model_args, data_args, training_args, position_type_of(config), features)
    trained, checkpoint = False, None
    if training_args.do_train:
        restarted = was_restarted()
        trained, checkpoint = on_main_process(lambda: checkpoints.plan_training(training_args, settings, restarted))
    if trained:
        model = load_trained_model(training_args.output_dir, model_args.trust_remote_code)
    else:
        model = load_model(name, config, **source)
    grow_positions(model, tokenizer, data_args.max_seq_length)
    check_length(data_args.max_seq_length, model, tokenizer)
    trainer = make_trainer(model, tokenizer, examples, features, settings, data_args, training_args)
    log_summary(model, examples, features, data_args, training_args)
    if trainer.is_world_process_zero() and (training_args.do_train or training_args.do_eval):
        checkpoints.write_qa_settings(training_args, model_args, data_args)

    if trained:
        logger.info("Training was finished before; going on with the model in %s.", training_args.output_dir)
        trainer.state = TrainerState.load_from_json(os.path.join(training_args.output_dir, "trainer_state.json"))
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
    elif training_args.do_train:
        train(trainer, settings, checkpoint, answer_changes)
    scores = evaluate(trainer) if training_args.do_eval else {}
    if training_args.do_predict:
        predict(trainer, examples["test"], features["test"])

    if training_args.do_train and trainer.is_world_process_zero():
        card = model_card(model_args, data_args, training_args, position_type_of(config), scores, trainer.hub_model_id)
        write_text(os.path.join(training_args.output_dir, "README.md"), [card])
    if training_args.push_to_hub:
        push_to_hub(trainer)
    if trainer.is_world_process_zero():
        if scores:
            print(json.dumps(scores, indent=2), flush=True)
        log_where(training_args)
    trainer.accelerator.end_training()  # of the trackers


# ---- Arguments ----


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataTrainingArguments, QATrainingArguments]:
    """The three groups of arguments from flags, or from the one JSON file that `argv` names.

    Raises ValueError for a flag that is unknown or refused, and for a value that cannot be.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = flags_from_json(argv[0])
    argv, notices = translate_flags(argv)
    parser = make_parser(
        ARGUMENT_GROUPS,
        first=WHAT_TO_DO,
        prog="run_squad.py",
        usage="%(prog)s --model_name_or_path MODEL --output_dir FOLDER [--do_train] [--do_eval] [--do_predict] ...",
        description=__doc__.split("\n")[0],
    )
    refuse_unknown_flags(parser, argv)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    set_up_logging(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    for notice in notices:
        logger.info(notice)
    check_arguments(data_args, training_args)
    return model_args, data_args, training_args


def check_arguments(data_args: DataTrainingArguments, training_args: QATrainingArguments) -> None:
    """Raises ValueError where what is to be done lacks its data, or a tracker that is asked for is missing."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise QAError("nothing to do: give --do_train, --do_eval or --do_predict")
    held_out = data_args.train_file if data_args.validation_split_percentage else None
    needs = {
        "--do_train": (training_args.do_train, "--train_file", data_args.train_file),
        "--do_eval": (
            training_args.do_eval,
            "--validation_file, --train_file with --validation_split_percentage",
            data_args.validation_file or held_out,
        ),
        "--do_predict": (training_args.do_predict, "--test_file", data_args.test_file),
    }
    for task, (asked, flag, file) in needs.items():
        if asked and file is None and data_args.dataset_name is None:
            raise QAError(f"{task} needs data: give {flag} or --dataset_name")

    best = (training_args.metric_for_best_model or "").removeprefix("eval_")
    if best.startswith(("best_", "NoAns_")) and not data_args.version_2_with_negative:
        raise QAError(f"--metric_for_best_model {best} is there with --version_2_with_negative only")
    if training_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        logger.warning(
            "--early_stopping_patience without --load_best_model_at_end: the model will be that of the last step, not "
            "the best one."
        )

    installed = get_available_reporting_integrations()
    for tracker in training_args.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise QAError(f"--report_to {tracker}: unknown; one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if tracker not in installed:
            raise QAError(f"--report_to {tracker}: it is not installed; pip install it or leave the flag out")


def log_summary(model, examples, features, data_args, training_args: QATrainingArguments) -> None:
    """The first lines of a run: what is trained or evaluated, on what, and how."""
    logger.info("Model: %s, %s positions.", type(model).__name__, position_type_of(model.config))
    for split, questions in examples.items():
        logger.info("%s: %d questions, %d windows.", split.capitalize(), len(questions), len(features[split]))
        for line in data_limits(features[split], data_args.max_answer_length, data_args.max_query_length):
            logger.info("%s: %s.", split.capitalize(), line)
    logger.info(
        "Windows: at most %d tokens; the next one starts %d context tokens later (run_qa.py took --doc_stride as the "
        "overlap instead).",
        data_args.max_seq_length,
        data_args.doc_stride,
    )
    if training_args.do_train:
        batch = training_args.train_batch_size * training_args.world_size
        accumulated = training_args.gradient_accumulation_steps
        batches = len(features["train"]) / batch
        batches = math.floor(batches) if training_args.dataloader_drop_last else math.ceil(batches)
        if batches == 0:
            raise QAError(
                f"--dataloader_drop_last leaves nothing of {len(features['train'])} windows in batches of {batch}"
            )
        steps_per_epoch = math.ceil(batches / accumulated)
        steps = training_args.max_steps
        if steps <= 0:
            steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
        logger.info("Training: %d steps of %d windows.", steps, batch * accumulated)
    precision = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    logger.info("Device: %s, %d process(es), %s.", training_args.device, training_args.world_size, precision)


def log_answered(split: str, metrics: dict[str, float], prefix: str) -> None:
    windows, seconds = metrics[f"{prefix}_samples"], metrics[f"{prefix}_runtime"]
    scores = "".join(
        f", {name} {metrics[f'{prefix}_{name}']:.2f}" for name in ("exact", "f1") if f"{prefix}_{name}" in metrics
    )
    logger.info("Answered the %s questions: %d windows in %.1f s%s.", split, windows, seconds, scores)


def log_where(training_args: QATrainingArguments) -> None:
    """The last lines of a run: where everything is, and what to do with it."""
    folder = training_args.output_dir
    logger.info("Everything is in %s.", folder)
    if training_args.do_train:
        logger.info("To ask the model: python scripts/ask.py %s --context_file FILE", folder)
    if training_args.do_eval:
        logger.info("To see where it fails: python scripts/report.py %s", folder)


def hub_source(model_args: ModelArguments) -> dict:
    """Which version of what is on the hub, and how to get it."""
    return {
        "revision": model_args.model_revision,
        "token": model_args.token,
        "cache_dir": model_args.cache_dir,
        "trust_remote_code": model_args.trust_remote_code,
    }


# ---- Questions and windows ----


def read_examples(model_args, data_args, training_args) -> tuple[dict, list[dict]]:
    """The questions of each split that is needed: "train", "validation", "test" -> `datasets.Dataset`.

    And what `place_answers` changed in those of "train".
    """
    needed = {
        "train": (training_args.do_train, data_args.train_file, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.validation_file, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.test_file, data_args.max_predict_samples),
    }
    files = {split: file for split, (asked, file, _) in needed.items() if asked and file is not None}
    percentage = data_args.validation_split_percentage
    if percentage and training_args.do_eval and data_args.validation_file is None and data_args.train_file is not None:
        files["train"] = data_args.train_file
    with training_args.main_process_first(desc="reading the questions"):
        splits = load_examples(
            data_args.dataset_name, data_args.dataset_config_name, files, model_args.cache_dir, model_args.token
        )
    if percentage and (data_args.validation_file is not None or "validation" in splits):
        logger.info("--validation_split_percentage %d has no effect: there are validation questions.", percentage)
        data_args.validation_split_percentage = percentage = None
    if percentage and "train" in splits:
        source = data_args.train_file or data_args.dataset_name
        splits = hold_out(splits, percentage, training_args.seed, source)
    examples, answer_changes = {}, []
    for split, (asked, file, most) in needed.items():
        if not asked:
            continue
        source = file or data_args.dataset_name or data_args.train_file
        if split not in splits:
            hint = "; --validation_split_percentage makes one of its train split" if split == "validation" else ""
            raise QAError(f"the dataset {source} has no split {split!r}; it has {', '.join(splits)}{hint}")
        questions = splits[split]
        if split != "test" and "answers" not in questions.column_names:
            raise QAError(f"{source}: no question has the key 'answers', which {split} needs")
        if split != "test":
            warn_of_flags(split, questions, source, data_args.version_2_with_negative)
        if split == "train":
            questions, answer_changes = place_answers(questions, source, data_args.misplaced_answers)
        elif "answers" in questions.column_names:
            warn_of_misplaced_golds(split, questions, source)
        examples[split] = questions if most is None else questions.select(range(min(most, len(questions))))
    return examples, answer_changes


def make_windows(examples: dict, tokenizer, data_args, training_args) -> dict:
    """The features of each split, as `examples`; of the training windows those that are trained on."""
    windows = WindowSettings(data_args.max_seq_length, data_args.doc_stride, data_args.max_query_length)
    with training_args.main_process_first(desc="making the features"):
        features = {
            split: (make_train_features if split == "train" else make_features)(
                questions,
                tokenizer,
                windows,
                num_proc=data_args.preprocessing_num_workers,
                overwrite_cache=data_args.overwrite_cache and training_args.local_process_index == 0,
                desc=f"{split} features",
            )
            for split, questions in examples.items()
        }
    if "train" in features:
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        features["train"] = keep_negative_windows(features["train"], data_args.negative_windows, seed)
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
        answer_settings=AnswerSettings(
            data_args.n_best_size,
            data_args.max_answer_length,
            data_args.version_2_with_negative,
            data_args.null_score_diff_threshold,
        ),
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
        result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
        trainer.save_model()
        logger.info(
            "Trained for %.0f s; mean loss %.4g.",
            metrics["train_runtime"],
            metrics["train_loss"],
        )
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        on_main_process(lambda: checkpoints.write_run_state(trainer.args.output_dir, "trained", settings))
    trainer.stop_if_asked()


def evaluate(trainer: QuestionAnsweringTrainer) -> dict[str, float]:
    """Answers the validation questions; returns the scores by the metric's own names."""
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(trainer.eval_dataset)
    log_answered("validation", metrics, "eval")
    trainer.save_metrics("eval", metrics)
    return {name: metrics[f"eval_{name}"] for name in METRIC_NAMES if f"eval_{name}" in metrics}


def predict(trainer: QuestionAnsweringTrainer, examples, features) -> None:
    metrics = trainer.predict(features, examples)
    metrics["predict_samples"] = len(features)
    log_answered("test", metrics, "predict")
    trainer.save_metrics("predict", metrics)


def push_to_hub(trainer: QuestionAnsweringTrainer) -> None:
    """Sends output_dir, checkpoints aside, to the hub. Raises QAError where that fails."""
    try:
        trainer.push_to_hub()
    except Exception as error:  # of any library between here and the hub
        raise QAError(
            f"cannot push to the hub: {one_line(error)}. All of it stands in {trainer.args.output_dir}; "
            f"{checkpoints.same_command(trainer.args)} tries again"
        ) from error
    if trainer.is_world_process_zero():
        logger.info("Pushed to %s on the hub.", trainer.hub_model_id)


def _exit(message: str, status: int, any_process: bool = False) -> None:
    if any_process or int(os.environ.get("RANK", "0")) == 0:
        print(f"run_squad.py: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        exit_process(end.code)
    exit_process(0)
