"""Flags: a command line, with or without a JSON file before it, as instances of the argument dataclasses.

The old flags of transformers 4's run_squad.py, run_squad_trainer.py, run_qa.py and TrainingArguments are taken too:
`OLD_FLAGS`, at the end, says what each is read as, why it is ignored, or what to use instead. A flag that would change
the numbers is never ignored.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from qa.files import QAError, one_line

Flags = dict[str, list[str]]  # name, with underscores -> values; of a flag that is given twice, the last ones


def parse_flags(dataclass_types: Iterable[type], argv: list[str], **settings: Any) -> tuple[tuple, list[str]]:
    """An instance of each dataclass, and log lines about old flags, from a command line. That may begin with the name
    of a JSON file of flags, which those after it win over. A ~ that a value begins with is the home folder.

    `settings` go to ArgumentParser. Raises QAError for flags that are unknown, no longer taken or contradict each
    other, and for values that the parser or the dataclasses (such as transformers' TrainingArguments) do not accept.
    """
    parser = make_parser(dataclass_types, **settings)
    notices = []
    # Where a command ends with a backslash, as published ones do, shells hand over it or what stood after it.
    if argv and argv[-1] in ("\\", " ", "\t", "\r", "\n"):
        *argv, end = argv
        notices = [f"dropped the last argument, {end!r}: any flags on a line after it did not arrive"]
    file, *argv = argv if argv and argv[0].endswith(".json") else (None, *argv)
    flags = {}
    try:
        for given in (flags_from_json(file) if file else {}, split_flags(argv)):
            given = {name: [os.path.expanduser(value) for value in values] for name, values in given.items()}
            given, translations = translate_flags(given)
            flags |= given
            notices += translations
        refuse_unknown_flags(flags, parser.dataclass_types)
        instances = parser.parse_args_into_dataclasses(join_flags(flags), look_for_args_file=False)
    except (ValueError, ImportError, OSError) as error:
        where = "" if file is None else f"{file} and the flags after it: " if argv else f"{file}: "
        raise QAError(where + one_line(error)) from error
    return instances, notices


def make_parser(dataclass_types: Iterable[type], **settings: Any) -> HfArgumentParser:
    """HfArgumentParser without abbreviations, so that a misspelt or an old flag is never taken for another one, with
    several values for --report_to, and with QAError for its errors."""
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False, **settings)
    parser.error = raise_error
    for action in parser._actions:
        # Not those with dashes, which `split_flags` makes these of.
        action.option_strings = [spelling for spelling in action.option_strings if "-" not in spelling[2:]]
        if action.dest == "report_to":
            action.nargs = "+"
    return parser


def raise_error(message: str) -> NoReturn:
    raise QAError(message)


def split_flags(argv: list[str]) -> Flags:
    """The flags of a command line. Raises QAError for an argument before the first one."""
    flags: Flags = {}
    values = None
    for argument in argv:
        if argument.startswith("--") or argument == "-h":
            name, equals, value = argument.removeprefix("--").partition("=")
            values = [value] if equals else []
            flags["help" if name == "-h" else name.replace("-", "_")] = values
        elif values is None:
            raise QAError(
                f"unexpected argument {argument!r}: flags begin with --, and a file of them is in JSON (*.json)"
            )
        else:
            values.append(argument)
    return flags


def flags_from_json(path: str | os.PathLike) -> Flags:
    """The JSON object in the file: null and empty lists are left out, a list is several values and an object its JSON
    text. Raises OSError, or ValueError that does not name the file."""
    with open(path, encoding="utf-8-sig") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise QAError(f"holds a {type(content).__name__}, not one JSON object of flags")
    flags = {}
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        texts = [item if isinstance(item, str) else json.dumps(item) for item in values if item is not None]
        if texts:
            flags[key.replace("-", "_")] = texts
    return flags


def translate_flags(flags: Flags) -> tuple[Flags, list[str]]:
    """The flags in today's spelling, and a log line for each old one. `--logging_dir` sets an environment variable.

    Raises QAError for an old flag that is no longer taken, for a value that it never took, and where two spellings of
    one flag have different values.
    """
    given = {name: values[-1] if values else "" for name, values in flags.items()}
    todays = {name: values for name, values in flags.items() if name not in OLD_FLAGS}
    notices = []
    for name in (name for name in flags if name in OLD_FLAGS):
        if len(flags[name]) > 1:
            raise QAError(f"--{name} takes one value, got {len(flags[name])}")
        try:
            new = OLD_FLAGS[name](given[name], given)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise QAError(f"--{name}: {error}") from error
        if isinstance(new, str):
            notices.append(f"old flag --{name}: {new}")
            continue
        for flag, value in new.items():
            said = "".join(todays.setdefault(flag, [value]))
            if said != value and not {said, value} <= {"", "true", "True"}:
                raise QAError(f"--{name} and another flag give --{flag} different values: keep one of them")
            if (flag, value) != (name, given[name]):
                shown = "***" if flag.endswith("token") else value
                notices.append(f"old flag --{name}: read as --{flag} {shown}")
    return todays, notices


def refuse_unknown_flags(flags: Flags, dataclass_types: Iterable[type]) -> None:
    """Raises QAError that names each flag that no dataclass has, and the nearest one that is taken. argparse itself
    would first complain of a flag that is missing because it is misspelt."""
    fields = [field for dataclass in dataclass_types for field in dataclasses.fields(dataclass) if field.init]
    known = {"help", *(field.name for field in fields)}
    known |= {f"no_{field.name}" for field in fields if field.default is True}
    complaints = []
    for name in (name for name in flags if name not in known):
        nearest = difflib.get_close_matches(name, sorted(known | OLD_FLAGS.keys()), n=1)
        complaints.append(f"unknown flag --{name}" + "".join(f" (nearest: --{near})" for near in nearest))
    if complaints:
        raise QAError("; ".join(complaints))


def join_flags(flags: Flags) -> list[str]:
    """The command line of these flags; a single value, which may begin with a dash, stands behind a "="."""
    argv = []
    for name, values in flags.items():
        argv += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return argv


# ---- What becomes of old flags ----

Given = Mapping[str, str]  # the value of each flag, "" for one without
# Takes the value of an old flag and what else is given. Returns today's flags with their values, or a text that says
# why there are none. Raises ValueError that says what to use instead.
Translation = Callable[[str, Given], dict[str, str] | str]


def renamed(new: str) -> Translation:
    return lambda value, given: {new: value}


def ignored(why: str) -> Translation:
    return lambda value, given: f"ignored, {why}"


def refused(instead: str, *harmless: str) -> Translation:
    """No longer taken, but for values that ask for nothing (in lower case)."""

    def translate(value: str, given: Given) -> str:
        if value.lower() not in harmless:
            raise QAError(f"no longer taken: {instead}")
        return "ignored, it asks for nothing"

    return translate


def switch(flag: str, on: str, off: str | None = None) -> Translation:
    """A boolean flag: the values of `flag` for true and false (None: its default)."""

    def translate(value: str, given: Given) -> dict[str, str] | str:
        new = on if string_to_bool(value or "true") else off
        return "ignored, it asks for the default" if new is None else {flag: new}

    return translate


def unless_empty(flag: str) -> Translation:
    return lambda value, given: {flag: value} if value else "ignored, it is empty"


def newest_unless_named(checkpoint: str, given: Given) -> dict[str, str] | str:
    if checkpoint.lower() in ("", "true", "false"):
        return "ignored, a run in --output_dir goes on by itself, and --overwrite_output_dir starts anew"
    return {"resume_from_checkpoint": checkpoint}


def in_data_dir(flag: str) -> Translation:
    return lambda file, given: {flag: os.path.join(given.get("data_dir", ""), file)}


def warmup(_: str, given: Given) -> dict[str, str]:
    """--warmup_steps takes a fraction below 1, too; steps above 0 always won over the ratio."""
    if "warmup_ratio" not in given or float(given.get("warmup_steps", 0)) > 0:
        return {"warmup_steps": given["warmup_steps"]}
    ratio = float(given["warmup_ratio"])
    if not 0 <= ratio <= 1:
        raise QAError(f"a warm-up ratio of {ratio} does not lie between 0 and 1")
    # 1 would mean one step; the largest number below it still rounds up to all of them.
    return {"warmup_steps": str(min(ratio, math.nextafter(1, 0)))}


def tensorboard_folder(folder: str, given: Given) -> str:
    os.environ["TENSORBOARD_LOGGING_DIR"] = folder
    return f"read as TENSORBOARD_LOGGING_DIR={folder} in the environment, where --report_to tensorboard writes"


def files_of_data_dir(folder: str, given: Given) -> dict[str, str] | str:
    """The official files, where no others are given."""
    if "dataset_name" in given:
        raise QAError("--dataset_name is given too: keep one of them")
    version_2 = given.get("version_2_with_negative", "false") or "true"
    version = "v2.0" if string_to_bool(version_2) else "v1.1"
    files = {}
    if "train_file" not in given:
        files["train_file"] = os.path.join(folder, f"train-{version}.json")
    if "predict_file" not in given and "validation_file" not in given:
        files["validation_file"] = os.path.join(folder, f"dev-{version}.json")
    return files or "the folder of the files that are given"


SAFETENSORS = "drop it: weights are always saved as model.safetensors"
DEBUGGER = "use python -m debugpy --listen HOST:PORT --wait-for-client run_squad.py"
MIXED_PRECISION = "use --fp16 or --bf16: torch's own mixed precision is the only one"

OLD_FLAGS: dict[str, Translation] = {
    # run_squad.py and run_squad_trainer.py
    "data_dir": files_of_data_dir,
    "train_file": in_data_dir("train_file"),
    "predict_file": in_data_dir("validation_file"),
    "threads": renamed("preprocessing_num_workers"),
    "model_type": ignored("the checkpoint's config.json names the model type"),
    "config_name": unless_empty("config_name"),
    "tokenizer_name": unless_empty("tokenizer_name"),
    "cache_dir": unless_empty("cache_dir"),
    "do_lower_case": switch("do_lower_case", on="True", off="False"),
    "use_fast": ignored("the tokenizer is always a fast one"),
    "lang_id": refused("use a model without language ids, such as FacebookAI/xlm-roberta-base"),
    "verbose_logging": ignored("what is left out of the data is always logged; --log_level chooses the rest"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "evaluate_during_training": switch("eval_strategy", on="steps"),
    "eval_all_checkpoints": refused("use --eval_strategy steps, or --do_eval with each checkpoint", "false"),
    "no_cuda": switch("use_cpu", on="True"),
    "fp16_opt_level": refused("use --fp16 alone (it is what O1 was) or --bf16", "o1"),
    "server_ip": refused(DEBUGGER, ""),
    "server_port": refused(DEBUGGER, ""),
    "logging_steps": lambda steps, given: {"logging_strategy": "no"} if steps == "0" else {"logging_steps": steps},
    # run_qa.py
    "no_pad_to_max_length": switch("pad_to_max_length", on="False", off="True"),
    "metric_for_best_model": lambda metric, given: {"metric_for_best_model": metric.replace("exact_match", "exact")},
    "max_val_samples": renamed("max_eval_samples"),
    "max_test_samples": renamed("max_predict_samples"),
    "use_auth_token": refused("use --token TOKEN; without it that of `hf auth login` is used", "", "true", "false"),
    # TrainingArguments: training
    "warmup_ratio": warmup,
    "warmup_steps": warmup,
    "group_by_length": switch("train_sampling_strategy", on="group_by_length", off="random"),
    "adafactor": switch("optim", on="adafactor"),
    "optim": lambda optim, given: {"optim": {"adamw_apex_fused": "adamw_torch_fused"}.get(optim, optim)},
    "past_index": refused("use a model without a past state: none here keeps one", "-1"),
    # TrainingArguments: evaluation, saving, logging, hub
    "evaluation_strategy": renamed("eval_strategy"),
    "use_legacy_prediction_loop": ignored("there is one evaluation loop"),
    "jit_mode_eval": ignored("the numbers are the same without tracing; --torch_compile is today's way to speed"),
    "include_inputs_for_metrics": switch("include_for_metrics", on="inputs"),
    "include_tokens_per_second": switch("include_num_input_tokens_seen", on="True"),
    "save_safetensors": refused(SAFETENSORS, "", "true"),
    "no_save_safetensors": refused(SAFETENSORS, "false"),
    "logging_dir": tensorboard_folder,
    "resume_from_checkpoint": newest_unless_named,
    "ray_scope": ignored("nothing here searches hyperparameters"),
    "push_to_hub_model_id": renamed("hub_model_id"),
    "push_to_hub_organization": refused("use --hub_model_id ORGANIZATION/NAME"),
    "push_to_hub_token": renamed("hub_token"),
    # TrainingArguments: devices, precision and processes
    "use_mps_device": ignored("an mps device is used where there is one"),
    "fp16_backend": refused(MIXED_PRECISION, "auto", "amp"),
    "half_precision_backend": refused(MIXED_PRECISION, "auto", "cuda_amp", "cpu_amp"),
    "torchdynamo": renamed("torch_compile_backend"),
    "use_ipex": ignored("it only ever chose faster kernels, which torch has now"),
    "tpu_num_cores": ignored("the launcher decides"),
    "debug": unless_empty("debug"),
    "tpu_metrics_debug": switch("debug", on="tpu_metrics_debug"),
    "mp_parameters": ignored("it was for SageMaker's launcher only"),
    "xpu_backend": renamed("ddp_backend"),
    "model_parallel": refused("use torchrun with --fsdp", "false"),
    "sharded_ddp": refused("use torchrun with --fsdp", "", "false"),
    "fsdp_min_num_params": refused("give min_num_params in --fsdp_config", "0"),
    "fsdp_transformer_layer_cls_to_wrap": refused("give transformer_layer_cls_to_wrap in --fsdp_config"),
    "dispatch_batches": refused("give dispatch_batches in --accelerator_config"),
    "split_batches": refused("give split_batches in --accelerator_config", "false"),
}
