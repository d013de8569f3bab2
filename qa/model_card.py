"""The README.md of a trained model, in the hub's format."""

import dataclasses
import os

import accelerate
import datasets
import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

METRIC_TITLES = {
    "exact": "Exact match",
    "f1": "F1",
    "HasAns_exact": "Exact match, questions with an answer",
    "HasAns_f1": "F1, questions with an answer",
    "NoAns_exact": "Exact match, questions without an answer",
    "best_f1": "F1 at the best threshold",
}
# Flags that say nothing about the model, or set by TrainingArguments itself.
LEFT_OUT = """
    token hub_token output_dir cache_dir resume_from_checkpoint overwrite_output_dir overwrite_cache disable_tqdm
    use_cpu dataloader_pin_memory ddp_find_unused_parameters report_to run_name
""".split()


def model_card(
    model_args,
    data_args,
    training_args,
    position_embedding_type: str,
    metrics: dict[str, float],
    hub_model_id: str | None = None,
) -> str:
    """The card's text: base model, dataset, position type, flags, metrics (bare names, percent), library versions.

    `hub_model_id`: the model's whole name on the hub, where it goes there.
    """
    name = hub_model_id or os.path.basename(os.path.normpath(training_args.output_dir))
    base = model_args.model_name_or_path
    # A file takes the place of the dataset's split.
    train_set, eval_set = (
        os.path.basename(file) if file else data_args.dataset_name
        for file in (data_args.train_file, data_args.validation_file)
    )
    if data_args.validation_split_percentage is not None:
        eval_set = f"{data_args.validation_split_percentage}% of the contexts of {train_set}, held out"
    relative = position_embedding_type != "absolute"
    trust = ", trust_remote_code=True" if relative else ""
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type=eval_set,
            dataset_name=eval_set,
            metric_type=metric,
            metric_name=title,
            metric_value=round(metrics[metric], 4),
        )
        for metric, title in METRIC_TITLES.items()
        if metric in metrics
    ]
    metadata = ModelCardData(
        model_name=name,
        base_model=None if os.path.isdir(base) else base,
        datasets=None if data_args.train_file else [train_set],
        library_name="transformers",
        pipeline_tag="question-answering",
        tags=["bert-squad", position_embedding_type] if relative else ["bert-squad"],
        eval_results=results or None,
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"{os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base}, fine-tuned for extractive "
        f"question answering on {train_set}, with {position_embedding_type} position embeddings.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForQuestionAnswering, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForQuestionAnswering.from_pretrained("{name}"{trust})',
        "```",
    ]
    if relative:
        lines += [
            "",
            "transformers 5 has no relative positions for BERT: without `trust_remote_code=True` it adds absolute ones "
            "that were never trained, and the answers are wrong. transformers 4 needs no such argument.",
        ]
    if results:
        lines += ["", "## Results", "", f"On {eval_set}:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {result.metric_name} | {result.metric_value:.2f} |" for result in results]
        if "total" in metrics:
            lines += [f"| Questions | {metrics['total']:.0f} |"]
    lines += ["", "## Training", "", "Flags that differ from their defaults:", "", "```"]
    lines += [f"--{flag} {value}" for flag, value in changed_flags(model_args, data_args, training_args).items()]
    lines += ["```", "", f"Processes: {training_args.world_size}.", "", "## Versions", ""]
    libraries = (torch, transformers, datasets, tokenizers, accelerate)
    lines += [f"- {library.__name__} {library.__version__}" for library in libraries]
    return "\n".join(lines) + "\n"


def changed_flags(*groups) -> dict[str, str]:
    """The fields of the argument dataclasses that are not at their defaults, local files by their names alone."""
    changed = {}
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            unset = value is False and field.default is None
            if field.name in LEFT_OUT or unset or value == _default(field) or not isinstance(value, str | int | float):
                continue
            value = str(getattr(value, "value", value))
            changed[field.name] = os.path.basename(os.path.normpath(value)) if os.path.exists(value) else value
    return changed


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
