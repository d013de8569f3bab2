"""The README.md of a trained model, in the hub's format."""

import dataclasses
import os
from importlib.metadata import version

from huggingface_hub import EvalResult, ModelCardData

TRUST_NOTE = """
transformers 5 has no relative positions for BERT: without `trust_remote_code=True` it adds absolute ones that were
never trained, and the answers are wrong. transformers 4 needs no such argument.
"""
LIBRARIES = "torch transformers datasets tokenizers accelerate".split()
METRICS = "exact f1 HasAns_exact HasAns_f1 NoAns_exact best_f1".split()
# Flags that say nothing about the model, or are set by TrainingArguments or the trainer.
LEFT_OUT = """
    token hub_token output_dir cache_dir resume_from_checkpoint overwrite_output_dir overwrite_cache disable_tqdm
    use_cpu dataloader_pin_memory ddp_find_unused_parameters report_to run_name
    remove_unused_columns logging_nan_inf_filter restore_callback_states_from_checkpoint
""".split()


def model_card(model_args, data_args, training_args, position_type: str, metrics: dict, hub_model_id=None) -> str:
    """The card's text. `metrics`: by bare names, in percent; `hub_model_id`: the model's whole name, if it has one."""
    name = hub_model_id or os.path.basename(os.path.normpath(training_args.output_dir))
    base = without_folder(model_args.model_name_or_path)
    # A file takes the place of the dataset's split.
    train_set = without_folder(data_args.train_file or data_args.dataset_name)
    eval_set = without_folder(data_args.validation_file or data_args.dataset_name or "")
    if data_args.validation_split_percentage is not None:
        eval_set = f"{data_args.validation_split_percentage}% of the contexts of {train_set}, held out"
    task = {"task_type": "question-answering", "dataset_type": eval_set, "dataset_name": eval_set}
    scores = {metric: round(metrics[metric], 4) for metric in METRICS if metric in metrics}
    results = [EvalResult(metric_type=m, metric_name=m, metric_value=value, **task) for m, value in scores.items()]
    table = "".join(f"| {metric} | {value:.2f} |\n" for metric, value in scores.items())
    heading = f"\nOn {eval_set} ({metrics['total']:.0f} questions):\n\n| metric | value |\n|---|---|\n" if table else ""
    metadata = ModelCardData(
        model_name=name,
        base_model=None if os.path.isdir(model_args.model_name_or_path) else base,
        datasets=None if data_args.train_file else [train_set],
        library_name="transformers",
        pipeline_tag="question-answering",
        tags=["bert-squad", position_type],
        eval_results=results or None,
    )
    relative = position_type != "absolute"
    versions = "\n".join(f"- {library} {version(library)}" for library in LIBRARIES)
    return f"""---
{metadata.to_yaml()}
---

# {name}

{base}, fine-tuned for extractive question answering on {train_set}, with {position_type} position embeddings.
{heading}{table}
## Use

```python
from transformers import pipeline

ask = pipeline(model="{name}", trust_remote_code=True)
print(ask(question="Where was Marie Curie born?", context="Marie Curie was born in Warsaw in 1867."))
```

The code that this runs, `question_answering_pipeline.py`, stands beside the weights. The bare model:

```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForQuestionAnswering.from_pretrained("{name}"{", trust_remote_code=True" if relative else ""})
```
{TRUST_NOTE if relative else ""}
{training_section(model_args, data_args, training_args)}
{versions}
"""


def training_section(model_args, data_args, training_args) -> str:
    flags = "\n".join(changed_flags(model_args, data_args, training_args))
    return f"""## Training

Processes: {training_args.world_size}. Flags that differ from their defaults:

```
{flags}
```
"""


def changed_flags(*groups) -> list[str]:
    """The flags of the argument dataclasses that are not at their defaults, as on a command line."""
    flags = []
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            unset = value == field.default or (value is False and field.default is None)
            if field.name not in LEFT_OUT and not unset and isinstance(value, str | int | float):
                flags.append(f"--{field.name} {without_folder(str(getattr(value, 'value', value)))}")
    return flags


def without_folder(value: str) -> str:
    """A local file or folder by its name alone, anything else as it is."""
    return os.path.basename(os.path.normpath(value)) if os.path.exists(value) else value
