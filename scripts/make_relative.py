#!/usr/bin/env python
"""Makes a BERT with relative positions of one with absolute ones, by distillation on plain text or on its questions.

    python scripts/make_relative.py MODEL --text_file FILE... --position_embedding_type relative_key_query \
        --output_dir DIR
    python scripts/make_relative.py QA_MODEL --train_file FILE --validation_file FILE --do_eval \
        --position_embedding_type relative_key_query --output_dir DIR

The model itself is the teacher. The student starts as it, but with distances in the place of positions, and learns to
have its hidden states and attention in each layer (Jiao et al. 2020, TinyBERT), and the logits of its answers.
"""

import copy
import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset, concatenate_datasets, load_dataset
from huggingface_hub import ModelCardData

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_squad  # noqa: E402
from qa import checkpoints, hub  # noqa: E402
from qa.columns import column  # noqa: E402
from qa.distributed import on_main_process, run_and_exit, was_restarted  # noqa: E402
from qa.files import QAError, write_text  # noqa: E402
from qa.layouts import errors_of, gunzipped  # noqa: E402
from qa.load_model import (  # noqa: E402
    add_pipeline,
    check_length,
    fit_token_types,
    load_config,
    load_tokenizer,
    load_weights_there,
    position_type_of,
)
from qa.model_card import TRUST_NOTE, training_section, without_folder  # noqa: E402
from qa.modeling_relative_bert import RELATIVE_TYPES, RelativeBertForQuestionAnswering  # noqa: E402
from qa.question_answering_pipeline import pair_template  # noqa: E402
from qa.read_squad import files_of  # noqa: E402
from qa.train_questions import read_examples  # noqa: E402
from qa.windows import QADataCollator, WindowSettings, make_features  # noqa: E402
from trainer_qa import INPUTS, QuestionAnsweringTrainer  # noqa: E402

logger = logging.getLogger("run_squad.make_relative")

DISTANCE_LEARNING_RATE = 100  # times that of the other weights: distances start from nothing, those where they belong
CHARACTERS_PER_TOKEN = 4  # about, in writing with spaces; other writing fills its windows
QUESTION_WORDS = (4, 24)
HELD_OUT = 64  # windows, at most, that the agreement is measured on
MOST_UNKNOWN = 0.5  # of the tokens


@dataclass
class DistillationDataArguments(run_squad.DataTrainingArguments):
    """What the student learns on: text, or what run_squad.py trains on, for a model that answers questions."""

    _argument_group_name = "text, or questions and answers"

    text_file: list[str] | None = field(
        default=None, metadata={"help": "Plain text in UTF-8, gzipped or not: files, folders of them, or 'text/*'."}
    )
    text_dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub with a column text."})
    text_dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_dataset_split: str = field(default="train", metadata={"help": "Its split, or a part such as train[:1%%]."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a window, and the student's positions; by default the teacher's positions."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.has_text or self.has_questions):
            raise QAError(
                "there is nothing to learn on: give --text_file, --text_dataset_name, --train_file or "
                "--dataset_name, or several of them"
            )

    @property
    def has_text(self) -> bool:
        return bool(self.text_file or self.text_dataset_name)

    @property
    def has_questions(self) -> bool:
        return bool(self.train_file or self.dataset_name)


@dataclass
class DistillationArguments(run_squad.QATrainingArguments):
    """run_squad.py's, with defaults of their own."""

    do_train: bool = field(default=True, metadata={"help": "Always so."})
    learning_rate: float = field(
        default=5e-4, metadata={"help": f"Of what was the teacher's; the distances' is {DISTANCE_LEARNING_RATE} times."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up, or below 1 their share of all."})
    metric_for_best_model: str = field(default="loss", metadata={"help": "On held-out windows; there is no other."})

    def __post_init__(self):
        if self.do_predict or not self.do_train:
            raise QAError("make_relative.py always trains, and predicts nothing: leave out --do_train and --do_predict")
        asks_questions = self.do_eval
        super().__post_init__()
        self.do_eval = asks_questions  # which --eval_strategy sets: here that measures the agreement
        if self.metric_for_best_model != "loss":
            raise QAError(f"--metric_for_best_model is {self.metric_for_best_model!r}, must be loss")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--model_name_or_path", *argv]
    groups = (run_squad.ModelArguments, DistillationDataArguments, DistillationArguments)
    usage = "%(prog)s MODEL --text_file FILE... --position_embedding_type TYPE --output_dir FOLDER ..."
    settings = {"prog": "make_relative.py", "usage": usage, "description": __doc__.split("\n")[0]}
    run_squad.run_as("make_relative.py", lambda: run(*run_squad.parse_arguments(argv, groups, **settings)))


def run(model_args, data_args: DistillationDataArguments, training_args: DistillationArguments) -> None:
    transformers.set_seed(training_args.seed)
    name, position_type, source = model_args.model_name_or_path, model_args.position_embedding_type, model_args.source
    config = load_config(name, config_name=model_args.config_name, **source)
    check_teacher(config, name, position_type, data_args)
    tokenizer = load_tokenizer(model_args.tokenizer_name or name, model_args.do_lower_case, **source)
    examples, features, windows = {}, {}, []
    if data_args.has_questions:
        examples, _ = read_examples(model_args, data_args, training_args)
        features = run_squad.make_windows(examples, tokenizer, data_args, training_args)
        windows.append(features["train"])
    if data_args.has_text:
        windows.append(text_windows(read_text(data_args, model_args), tokenizer, data_args.max_seq_length))
    inputs = [name for name in (*INPUTS, "length") if name in windows[0].column_names]
    features["train"] = concatenate_datasets([each.select_columns(inputs) for each in windows])
    check_readable(features["train"], tokenizer)

    settings = checkpoints.run_settings(model_args, data_args, training_args, position_type, features)
    restarted = was_restarted()
    made, checkpoint = on_main_process(lambda: checkpoints.plan_run(training_args, settings, restarted))
    if made:
        logger.info("It was made before, and is in %s; --overwrite_output_dir makes it anew.", training_args.output_dir)
        return
    teacher, missing = load_weights_there(name, config, **source)
    answers = not missing
    if training_args.do_eval and not answers:
        raise QAError(f"--do_eval asks questions, but {name} was not trained to answer any: leave it out")
    student = make_student(teacher, position_type, data_args.max_seq_length)
    fit_token_types(student, tokenizer)
    check_length(data_args.max_seq_length, student, tokenizer)
    if answers:
        add_pipeline(student.config, data_args)
    trainer = DistillationTrainer(
        teacher,
        answers,
        model=student,
        args=training_args,
        train_dataset=features["train"],
        processing_class=tokenizer,
        data_collator=QADataCollator(tokenizer),
        run_settings=settings,
    )
    run_squad.train(trainer, settings, checkpoint, [])
    agreement = trainer.evaluate()
    trainer.save_metrics("eval", agreement)
    scores = {}
    if training_args.do_eval:
        on_main_process(lambda: checkpoints.write_qa_settings(training_args, model_args, data_args))
        for who, model in (("teacher", teacher), ("student", student)):  # whose answers stay in output_dir
            logger.info("The %s answers:", who)
            one = run_squad.make_trainer(model, tokenizer, examples, features, settings, data_args, training_args)
            scores[who] = run_squad.save_answered(one, "eval", one.evaluate(), features["validation"])
    if trainer.is_world_process_zero():
        card = model_card(model_args, data_args, training_args, trainer, agreement, scores)
        write_text(os.path.join(training_args.output_dir, "README.md"), [card])
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(json.dumps({**agreement, **scores}, indent=2), flush=True)
        logger.info("The model is in %s: give that as run_squad.py's --model_name_or_path.", training_args.output_dir)
    trainer.accelerator.end_training()  # of the trackers


def check_teacher(config, name: str, position_type: str | None, data_args) -> None:
    """Raises QAError where the model cannot be a teacher, or not of windows as long as are asked for."""
    if config.model_type != "bert":
        raise QAError(f"{name} is no BERT but of model_type {config.model_type}: relative positions are for BERT alone")
    if position_type_of(config) != "absolute":
        raise QAError(f"{name} has {position_type_of(config)} positions already: train it with run_squad.py")
    if position_type not in RELATIVE_TYPES:
        raise QAError(f"--position_embedding_type is {position_type}, must be {' or '.join(RELATIVE_TYPES)}")
    positions = config.max_position_embeddings
    data_args.max_seq_length = data_args.max_seq_length or positions
    if data_args.max_seq_length > positions:
        raise QAError(
            f"--max_seq_length is {data_args.max_seq_length}, but {name} has positions for {positions} tokens only; "
            "its student reads longer windows without having learned it (run_squad.py's --max_seq_length)"
        )


# ---- Text ----


def read_text(data_args: DistillationDataArguments, model_args) -> str:
    """All text, white space in it made single spaces. Raises QAError where there is none, or a file is not in UTF-8."""
    texts = []
    if name := data_args.text_dataset_name:
        what = f"--text_dataset_name {name}: cannot be loaded from the hub or its cache"
        settings = {"token": model_args.token, "cache_dir": model_args.cache_dir}
        with hub.loading(what, name, "dataset", **settings) as id_:
            dataset = load_dataset(
                id_, data_args.text_dataset_config_name, split=data_args.text_dataset_split, **settings
            )
        if "text" not in dataset.column_names:
            raise QAError(f"{name} has no column text, but {', '.join(dataset.column_names)}: name another dataset")
        texts += dataset["text"]
    for path in data_args.text_file or []:
        for file in files_of(path).values():
            with errors_of(file), open(file, "rb") as opened:
                try:
                    texts.append(gunzipped(opened).read().decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise QAError(f"is not in UTF-8 (byte {error.start}): convert it, as with iconv") from error
    text = " ".join(word for each in texts for word in each.split())
    if not text:
        raise QAError(f"there is no text in {name or ', '.join(data_args.text_file)}")
    return text


def text_windows(text: str, tokenizer, max_seq_length: int) -> Dataset:
    """Features, as `make_features` makes them, of passages of the text in place of contexts.

    Passages end anywhere and are of any length, short ones as often as long ones, so that near and far distances are
    seen. In place of a question stand some words of the passage, or of the one before it.
    """
    draw = random.Random(0)
    special = len(pair_template(tokenizer)[0])
    longest_question = max((max_seq_length - special) // 4, 1)
    room = max(max_seq_length - special - longest_question, 1)
    passages = list(cut(text, CHARACTERS_PER_TOKEN * max_seq_length, draw))
    questions = [words(passages[max(i - draw.randrange(2), 0)], draw) for i in range(len(passages))]
    ids = [str(i) for i in range(len(passages))]
    examples = Dataset.from_dict({"id": ids, "question": questions, "context": passages})
    windows = WindowSettings(max_seq_length, doc_stride=room, max_query_length=longest_question)
    return make_features(examples, tokenizer, windows, desc="Windows")


def cut(text: str, longest: int, draw: random.Random) -> Iterator[str]:
    """The text in passages of an eighth of `longest` characters to all of them, ending at a space if one is near."""
    start = 0
    while start < len(text):
        stop = start + int(longest * 8 ** -draw.random())
        space = text.find(" ", stop, stop + longest // 8)
        stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop


def words(passage: str, draw: random.Random) -> str:
    found = passage.split()
    count = draw.randint(*QUESTION_WORDS)
    first = draw.randrange(max(len(found) - count, 0) + 1)
    return " ".join(found[first : first + count])


def check_readable(features: Dataset, tokenizer) -> None:
    """Raises QAError for windows of which too few tokens are known."""
    ids = column(features, "input_ids").values.to_numpy()
    unknown = (ids == tokenizer.unk_token_id).mean()
    if unknown > MOST_UNKNOWN:
        raise QAError(
            f"{unknown:.0%} of the text's tokens are {tokenizer.unk_token}: it is not in the language of the model"
        )


# ---- Distillation ----


@torch.no_grad()
def make_student(teacher, position_type: str, positions: int) -> RelativeBertForQuestionAnswering:
    """A model with the teacher's weights and new distances.

    What all positions have in common goes into the token types, which are always added.
    """
    config = copy.deepcopy(teacher.config)
    config.position_embedding_type, config.max_position_embeddings = position_type, positions
    student = RelativeBertForQuestionAnswering(config)
    weights = teacher.state_dict()
    table = weights["bert.embeddings.position_embeddings.weight"][:positions]
    weights["bert.embeddings.position_embeddings.weight"] = table
    student.load_state_dict(weights, strict=False)
    student.bert.embeddings.token_type_embeddings.weight += table.mean(0)
    return student


class DistillationTrainer(QuestionAnsweringTrainer):
    """Trains a student to do in each layer what `teacher` does; `with_answers`: and to have its logits.

    The words' embeddings stay, since those of rare ones would not follow, and nothing is dropped out.
    """

    def __init__(self, teacher, with_answers: bool, *, model, args, train_dataset, **settings):
        if len(train_dataset) < 2:
            raise QAError("the text fills one window only: give more")
        held_out = min(HELD_OUT, len(train_dataset) // 10 or 1)
        learned = len(train_dataset) - held_out
        model.get_input_embeddings().requires_grad_(False)
        model.qa_outputs.requires_grad_(with_answers)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # all that is trained takes part in the loss
        parts = (range(learned), range(learned, len(train_dataset)))
        settings["train_dataset"], settings["eval_dataset"] = map(train_dataset.select, parts)
        super().__init__(model=model, args=args, **settings)
        self.with_answers = with_answers
        self.tokens = pc.sum(column(self.train_dataset, "length")).as_py()
        logger.info(f"Text: {learned} windows, {self.tokens} tokens; {held_out} more windows are held out.")
        for each in (model, teacher):
            each.set_attn_implementation("eager")  # which gives its attention
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        distances = [p for name, p in self.model.named_parameters() if "distance_embedding" in name]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not each for each in distances)]
        learning_rate = DISTANCE_LEARNING_RATE * self.args.learning_rate
        optimizer.add_param_group({"params": distances, "lr": learning_rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.errors(model, inputs)[0].mean()

    def errors(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the student is from the teacher, by window: the loss (batch,), and a part of it, (batch, layers + 1).

        The part: of the embeddings and each layer's hidden states the squared error over the variance, a mean over the
        dimensions. The loss is the sum of these, and of the Kullback-Leibler divergences of each layer's attention and,
        `with_answers`, of start and end.
        """
        inputs = {**inputs, "output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            teacher = self.teacher(**inputs)
        student = model(**inputs)
        mask = inputs["attention_mask"].float()  # (batch, length)

        def of_windows(errors):  # (batch, length), of tokens
            return (errors * mask).sum(1) / mask.sum(1)

        hidden = []
        for true, own in zip(teacher.hidden_states, student.hidden_states, strict=True):
            deviation = true[mask > 0].std(0, correction=0)  # (hidden,)
            deviation = deviation.clamp(min=0.3 * deviation.median())  # there may be dimensions that never change
            hidden.append(of_windows(((own - true) / deviation).square().mean(2)))
        loss = sum(hidden)
        for true, own in zip(teacher.attentions, student.attentions, strict=True):  # (batch, heads, length, length)
            loss = loss + of_windows(divergence(own, true).mean(1))
        if self.with_answers:
            for logits in zip(student[:2], teacher[:2], strict=True):  # of start and end
                own, true = (each.masked_fill(mask == 0, -1e4).softmax(-1) for each in logits)
                loss = loss + divergence(own, true) / 2
        return loss, torch.stack(hidden, 1)

    def evaluate(self, *args, metric_key_prefix="eval", **kwargs) -> dict[str, float]:
        """The loss on the held-out windows, and of each layer's hidden states the share of variance that is equal."""
        self._found = []
        with torch.random.fork_rng(devices=[]):  # evaluating must not move the random state that training goes on with
            self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
        loss, *errors = torch.cat(self._found).mean(0).tolist()
        names = ["embeddings", *(f"layer_{i}" for i in range(1, len(errors)))]
        shares = {name: 1 - error for name, error in zip(names, errors, strict=True)}
        said = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        logger.info("Agreement on %d windows held out: %s.", len(self.eval_dataset), said)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"loss": loss, **shares}.items()}
        self.log(dict(metrics))  # which gets an epoch
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(metrics))
        return metrics

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self.compute_loss_context_manager():
            loss, hidden = self.errors(model, self._prepare_inputs(inputs))
        self._found.append(self.accelerator.gather_for_metrics(torch.cat([loss[:, None], hidden], 1)))
        return None, None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; the model that is made has no span head where its teacher has none."""
        if output_dir is None and not self.with_answers:
            self.model._keys_to_ignore_on_save = {"qa_outputs.weight", "qa_outputs.bias"}
        super().save_model(output_dir, _internal_call)


def divergence(own: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence from `own` probabilities to `true` ones, over the last dimension.

    As torch's own, but keeps less for the backward pass, where attention is what fills the memory.
    """
    return (torch.xlogy(true, true) - true * (own + 1e-8).log()).sum(-1)


# ---- Model card ----


def model_card(model_args, data_args, training_args, trainer, agreement: dict, scores: dict) -> str:
    name = trainer.hub_model_id or os.path.basename(os.path.normpath(training_args.output_dir))
    base = without_folder(model_args.model_name_or_path)
    questions = data_args.train_file or data_args.dataset_name
    sources = filter(None, [*(data_args.text_file or []), data_args.text_dataset_name, questions])
    texts = ", ".join(map(without_folder, sources))
    position_type = model_args.position_embedding_type
    metadata = ModelCardData(
        model_name=name,
        base_model=None if os.path.isdir(model_args.model_name_or_path) else base,
        library_name="transformers",
        tags=["bert-squad", position_type],
    )
    steps, times = trainer.state.global_step, trainer.state.epoch
    read = f"{steps} steps on {trainer.tokens} tokens of {texts}, read {times:.1f} times"
    shares = {layer.removeprefix("eval_"): share for layer, share in agreement.items() if layer != "eval_loss"}
    table = "".join(f"| {layer} | {share:.3f} |\n" for layer, share in shares.items())
    answers = "".join(f"| {who} | {each['exact']:.2f} | {each['f1']:.2f} |\n" for who, each in scores.items())
    answers = f"\n| answers | exact | f1 |\n|---|---|---|\n{answers}" if answers else ""
    return f"""---
{metadata.to_yaml()}
---

# {name}

{base} with {position_type} position embeddings in place of absolute ones, made by distillation: {read}.

How much of the variance of its hidden states is that of {base}, in windows that it has not seen:

| hidden states | share |
|---|---|
{table}{answers}
## Use

Fine-tune it as any BERT.{TRUST_NOTE}
{training_section(model_args, data_args, training_args)}"""


if __name__ == "__main__":
    run_and_exit(main)
