"""Flags in: the spellings of transformers 4's question answering scripts, and one JSON file of flags, as today's argv.

`OLD_FLAGS` gives every flag of transformers 4's run_squad.py, run_squad_trainer.py and run_qa.py, and of its
TrainingArguments, that is no longer parsed (or no longer means the same) its fate. A flag that would change the
numbers is translated or refused, never ignored.
"""

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from transformers import HfArgumentParser

from qa.files import QAError

Given = Mapping[str, str | None]  # flag name -> its last value on this command line, None for a bare flag


class Renamed(NamedTuple):
    """The same value under a new name."""

    new: str


class Switch(NamedTuple):
    """A boolean flag: the flags that stand for it when it is on and when it is off (none: that is the default)."""

    on: str
    off: str = ""


class Values(NamedTuple):
    """The flag stays, some of its values have new names; None: with that value the flag is left out."""

    new: Mapping[str, str | None]


class Derived(NamedTuple):
    """What several flags or the value decide: `argv(value, given)`. An empty list has no effect because of
    `otherwise`; None keeps the flag as it is. `bare` is the value of the flag without one."""

    argv: Callable[[str, Given], list[str] | None]
    otherwise: str = "is the default"
    bare: str | None = None


class Environment(NamedTuple):
    """The value goes into an environment variable of this process."""

    variable: str
    note: str


class Ignored(NamedTuple):
    """Accepted without effect, because of `why`."""

    why: str


class Refused(NamedTuple):
    """An error that says what to use instead; a value in `harmless` asks for nothing and is accepted."""

    instead: str
    harmless: tuple[str, ...] = ()


Fate = Renamed | Switch | Values | Derived | Environment | Ignored | Refused


def is_true(text: str | None) -> bool:
    """Reads a boolean flag's value (None: the bare flag) as HfArgumentParser does; ValueError for anything else."""
    if text is None or text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise QAError(f"{text!r} is neither true nor false")


def is_on(flag: str, given: Given) -> bool:
    return flag in given and is_true(given[flag])


def warmup_from_ratio(ratio: str, given: Given) -> list[str]:
    """--warmup_steps takes a fraction below 1; steps above 0 always won over the ratio."""
    if not 0 <= float(ratio) <= 1:
        raise QAError(f"{ratio} does not lie between 0 and 1")
    if float(given.get("warmup_steps") or 0) > 0:
        return []
    # 1 would mean one step; the largest number below it still rounds up to all of them.
    return ["--warmup_steps", repr(math.nextafter(1, 0)) if float(ratio) == 1 else ratio]


def warmup_steps_beside_ratio(steps: str, given: Given) -> list[str] | None:
    return [] if "warmup_ratio" in given and float(steps) == 0 else None


def no_logging_at_step_zero(steps: str, given: Given) -> list[str] | None:
    return ["--logging_strategy", "no"] if float(steps) == 0 else None


def train_file_in_data_dir(train_file: str, given: Given) -> list[str] | None:
    return ["--train_file", os.path.join(given["data_dir"] or "", train_file)] if "data_dir" in given else None


def validation_file_in_data_dir(predict_file: str, given: Given) -> list[str]:
    return ["--validation_file", os.path.join(given.get("data_dir") or "", predict_file)]


def files_of_data_dir(data_dir: str, given: Given) -> list[str]:
    """The official file names, for those that are used and not named."""
    if "dataset_name" in given:
        raise QAError("--dataset_name is given too: keep one of them")
    version = "v2.0" if is_on("version_2_with_negative", given) else "v1.1"
    evaluates = (
        is_on("do_eval", given)
        or is_on("evaluate_during_training", given)
        or given.get("eval_strategy", given.get("evaluation_strategy", "no")) != "no"
    )
    argv = []
    if is_on("do_train", given) and "train_file" not in given:
        argv += ["--train_file", os.path.join(data_dir, f"train-{version}.json")]
    if evaluates and not {"predict_file", "validation_file"} & given.keys():
        argv += ["--validation_file", os.path.join(data_dir, f"dev-{version}.json")]
    return argv


def token_from_auth_token(token: str, given: Given) -> list[str]:
    try:
        is_true(token)
    except ValueError:
        return ["--token", token]
    return []


def hub_model_id(name: str, given: Given) -> list[str]:
    organization = given.get("push_to_hub_organization")
    return ["--hub_model_id", f"{organization}/{name}" if organization else name]


def hub_model_id_of_output_dir(organization: str, given: Given) -> list[str]:
    if "push_to_hub_model_id" in given:
        return []
    output_dir = given.get("output_dir") or "trainer_output"
    return ["--hub_model_id", f"{organization}/{os.path.basename(os.path.normpath(output_dir))}"]


def optimizer_of_today(optim: str, given: Given) -> list[str] | None:
    if optim == "adamw_hf":
        raise QAError("adamw_hf is no longer there: use adamw_torch, which decays the weights before the step")
    return ["--optim", "adamw_torch_fused"] if optim == "adamw_apex_fused" else None


def size_based_wrap(min_num_params: str, given: Given) -> list[str]:
    if int(min_num_params) == 0:
        return []
    config = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": int(min_num_params)}
    return ["--fsdp_config", json.dumps(config)]


def layer_class_wrap(layer_class: str, given: Given) -> list[str]:
    return ["--fsdp_config", json.dumps({"transformer_layer_cls_to_wrap": [layer_class]})]


def batches_of_accelerator(_: str, given: Given) -> list[str]:
    config = {name: is_true(given[name]) for name in ("dispatch_batches", "split_batches") if name in given}
    return ["--accelerator_config", json.dumps(config)]


ONE_MIXED_PRECISION = "use --fp16 or --bf16: torch's own mixed precision is the only one"

OLD_FLAGS: dict[str, Fate] = {
    # run_squad.py and run_squad_trainer.py: data and model
    "data_dir": Derived(files_of_data_dir, "the folder that the files named beside it lie in"),
    "train_file": Derived(train_file_in_data_dir),
    "predict_file": Derived(validation_file_in_data_dir),
    "threads": Renamed("preprocessing_num_workers"),
    "model_type": Ignored("the checkpoint's config.json names the model type"),
    "config_name": Values({"": None}),
    "tokenizer_name": Values({"": None}),
    "cache_dir": Values({"": None}),
    "do_lower_case": Ignored("the tokenizer's own setting holds"),
    "use_fast": Ignored("the tokenizer is always a fast one"),
    "lang_id": Refused("use a model without language ids, such as FacebookAI/xlm-roberta-base"),
    "verbose_logging": Ignored("what is left out of the data is always logged; --log_level chooses the rest"),
    # run_squad.py and run_squad_trainer.py: training and evaluation
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "evaluate_during_training": Switch(on="--eval_strategy steps"),
    "eval_all_checkpoints": Refused(
        "use --eval_strategy steps while training, or --do_eval with --model_name_or_path OUTPUT_DIR/checkpoint-N",
        harmless=("False",),
    ),
    "no_cuda": Switch(on="--use_cpu True"),
    "fp16_opt_level": Refused("use --fp16 alone (it is what O1 was) or --bf16", harmless=("O1",)),
    "server_ip": Refused("use python -m debugpy --listen HOST:PORT --wait-for-client run_squad.py", harmless=("",)),
    "server_port": Refused("use python -m debugpy --listen HOST:PORT --wait-for-client run_squad.py", harmless=("",)),
    "logging_steps": Derived(no_logging_at_step_zero),
    # run_qa.py
    "no_pad_to_max_length": Switch(on="--pad_to_max_length False", off="--pad_to_max_length True"),
    "metric_for_best_model": Values({"exact_match": "exact", "eval_exact_match": "eval_exact"}),
    "max_val_samples": Renamed("max_eval_samples"),
    "max_test_samples": Renamed("max_predict_samples"),
    "use_auth_token": Derived(token_from_auth_token, "the token of `hf auth login` is used", bare="True"),
    # TrainingArguments: schedule, sampling and optimizer
    "warmup_ratio": Derived(warmup_from_ratio, "--warmup_steps above 0 wins"),
    "warmup_steps": Derived(warmup_steps_beside_ratio, "--warmup_ratio is given"),
    "group_by_length": Switch(on="--train_sampling_strategy group_by_length", off="--train_sampling_strategy random"),
    "adafactor": Switch(on="--optim adafactor"),
    "optim": Derived(optimizer_of_today),
    "past_index": Refused("use a model without a past state: none here keeps one", harmless=("-1",)),
    # TrainingArguments: evaluation, saving, logging
    "evaluation_strategy": Renamed("eval_strategy"),
    "use_legacy_prediction_loop": Ignored("there is one evaluation loop"),
    "jit_mode_eval": Ignored("the numbers are the same without tracing; --torch_compile is today's way to speed"),
    "include_inputs_for_metrics": Switch(on="--include_for_metrics inputs"),
    "include_tokens_per_second": Switch(on="--include_num_input_tokens_seen True"),
    "save_safetensors": Refused("drop it: weights are always saved as model.safetensors", harmless=("True",)),
    "no_save_safetensors": Refused("drop it: weights are always saved as model.safetensors", harmless=("False",)),
    "logging_dir": Environment("TENSORBOARD_LOGGING_DIR", "--report_to tensorboard writes there"),
    "ray_scope": Ignored("nothing here searches hyperparameters"),
    # TrainingArguments: hub
    "push_to_hub_model_id": Derived(hub_model_id),
    "push_to_hub_organization": Derived(hub_model_id_of_output_dir, "is part of --hub_model_id"),
    "push_to_hub_token": Renamed("hub_token"),
    # TrainingArguments: devices and precision
    "use_mps_device": Ignored("an mps device is used where there is one"),
    "fp16_backend": Refused(ONE_MIXED_PRECISION, harmless=("auto", "amp")),
    "half_precision_backend": Refused(ONE_MIXED_PRECISION, harmless=("auto", "cuda_amp", "cpu_amp")),
    "torchdynamo": Renamed("torch_compile_backend"),
    "use_ipex": Ignored("it only ever chose faster kernels, which torch has now"),
    "tpu_num_cores": Ignored("the launcher decides"),
    "debug": Values({"": None}),
    "tpu_metrics_debug": Switch(on="--debug tpu_metrics_debug"),
    "mp_parameters": Ignored("it was for SageMaker's launcher only"),
    # TrainingArguments: many devices
    "xpu_backend": Renamed("ddp_backend"),
    "model_parallel": Refused("use torchrun with --fsdp", harmless=("False",)),
    "sharded_ddp": Refused("use torchrun with --fsdp", harmless=("", "False")),
    "fsdp_min_num_params": Derived(size_based_wrap),
    "fsdp_transformer_layer_cls_to_wrap": Derived(layer_class_wrap),
    "dispatch_batches": Derived(batches_of_accelerator, bare="True"),
    "split_batches": Derived(batches_of_accelerator, bare="True"),
}


def drop_trailing_backslash(argv: list[str]) -> tuple[list[str], list[str]]:
    r"""Drops what a shell hands over for a backslash that ends the command: nothing where a newline follows, else the
    backslash itself (end of text), or the escaped character: " ", "\r", "\n". An empty string that is a flag's value
    stays. Returns the rest and a log line for each."""
    argv, lines = list(argv), []
    while argv and argv[-1].strip() in ("", "\\"):
        if argv[-1] == "" and len(argv) > 1 and argv[-2].startswith("--") and "=" not in argv[-2]:
            break
        dropped = argv.pop()
        if dropped not in ("", "\\"):
            lines.append(
                f"dropped a trailing {dropped!r}, which a backslash made: flags on any further line did not arrive"
            )
    return argv, lines


def split_flags(argv: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Each flag's name (with underscores, "" for arguments before the first flag), values and tokens, in order."""
    flags: list[tuple[str, list[str], list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else [], [token]))
        else:
            if not flags:
                flags.append(("", [], []))
            flags[-1][1].append(token)
            flags[-1][2].append(token)
    return flags


def needed(value: str | None) -> str:
    if value is None:
        raise QAError("needs a value")
    return value


def new_flags(name: str, fate: Fate, value: str | None, given: Given) -> list[str] | None:
    """The flags and values, in turn, that an old flag stands for; None: it stays as it is."""
    match fate:
        case Renamed(new):
            return [f"--{new}", needed(value)]
        case Switch(on, off):
            return (on if is_true(value) else off).split()
        case Values(new):
            if value not in new:
                return None
            return [] if new[value] is None else [f"--{name}", new[value]]
        case Derived(argv, _, bare):
            return argv(needed(bare if value is None else value), given)


def shown(name: str, value: str) -> str:
    return "***" if name == "token" or name.endswith("_token") else value


def refuse_contradictions(translated: list[tuple[str, str, str]], kept: Given) -> None:
    """An old spelling beside another one of the same flag must say the same. `translated`: old name, flag, value."""
    said = {f"--{name}": (f"--{name}", value) for name, value in kept.items()}
    for name, flag, value in translated:
        other, other_value = said.setdefault(flag, (f"--{name}", value))
        same = other_value == value or (value == "True" and (other_value or "True").lower() == "true")
        if not same and other != f"--{name}":
            raise QAError(
                f"--{name} means {flag} {shown(flag[2:], value)}, and {other} says otherwise: keep one of them"
            )


def translate_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Translates a command line of transformers 4's scripts.

    Returns the argv for `make_parser` and one log line for each old flag that was used. `--logging_dir` also sets an
    environment variable. Raises ValueError, in one line, for flags that are refused, for a value that an old flag
    never took, and where an old and a new spelling contradict each other.
    """
    argv, lines = drop_trailing_backslash(argv)
    flags = split_flags(argv)
    given = {name: values[-1] if values else None for name, values, _ in flags}
    kept, translated, refusals, environment = [], [], [], {}

    for name, values, tokens in flags:
        fate = OLD_FLAGS.get(name)
        if fate is None:
            kept.append((name, tokens))
            continue
        if len(values) > 1:
            raise QAError(f"--{name}: takes one value, got {' '.join(values)!r}")
        value = values[0] if values else None
        old = f"old flag --{name}" + ("" if value is None else f" {shown(name, value)}")
        match fate:
            case Ignored(why):
                lines.append(f"{old}: accepted without effect, {why}")
            case Refused(instead, harmless):
                if ("True" if value is None else value).lower() in (text.lower() for text in harmless):
                    lines.append(f"{old}: accepted without effect, it asks for nothing")
                else:
                    refusals.append(f"--{name} is no longer taken: {instead}")
            case Environment(variable, note):
                environment[variable] = value or ""
                lines.append(f"{old}: read as {variable}={value} in the environment, {note}")
            case _:
                try:
                    new = new_flags(name, fate, value, given)
                except ValueError as error:
                    raise QAError(f"--{name}: {error}") from None
                if new is None:
                    kept.append((name, tokens))
                    continue
                pairs = list(zip(new[::2], new[1::2], strict=True))
                translated += [(name, flag, text) for flag, text in pairs]
                read_as = " ".join(f"{flag} {shown(flag[2:], text)}" for flag, text in pairs)
                otherwise = fate.otherwise if isinstance(fate, Derived) else "is the default"
                lines.append(f"{old}: read as {read_as}" if new else f"{old}: {otherwise}")

    if refusals:
        raise QAError("; ".join(refusals))
    refuse_contradictions(translated, {name: given[name] for name, _ in kept})
    os.environ.update(environment)
    new_argv = [token for _, tokens in kept for token in tokens]
    return new_argv + [f"{flag}={value}" for _, flag, value in translated], lines


def refuse_duplicate_keys(path: str | os.PathLike, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise QAError(f"{path}: key {key!r} is there twice")
    return dict(pairs)


def flags_from_json(path: str | os.PathLike) -> list[str]:
    """One JSON object of flags, old spellings included, as argv for `translate_flags`: true and false become values,
    null and empty lists are left out, a list becomes several values and an object its JSON text.

    Raises ValueError, in one line that names the file and the key, for anything else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            flags = json.load(file, object_pairs_hook=lambda pairs: refuse_duplicate_keys(path, pairs))
    except OSError as error:
        raise QAError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise QAError(f"{path}: is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise QAError(f"{path}: is not JSON: {error}") from None
    if not isinstance(flags, dict):
        raise QAError(f"{path}: holds a {type(flags).__name__}, not one JSON object of flags")
    argv = []
    for key, value in flags.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", key):
            raise QAError(f"{path}: key {key!r} is not a flag's name without its leading dashes")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and any(isinstance(item, list | dict) or item is None for item in value):
            raise QAError(f"{path}: key {key!r} holds a list of something else than texts, numbers, true and false")
        texts = [json.dumps(item) if isinstance(item, dict) else str(item) for item in values if item is not None]
        if len(texts) == 1:
            argv.append(f"--{key}={texts[0]}")  # one token, so that a value may begin with a dash
        elif texts:
            argv += [f"--{key}", *texts]
    return argv


class HelpFormatter(argparse.HelpFormatter):
    """Each flag under one of its spellings, and its default where that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return super()._format_action_invocation(action)
        if action.nargs == "?":  # booleans take a value but need none
            return action.option_strings[0]
        value = f"{{{','.join(action.choices)}}}" if action.choices else "VALUE"
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default is None or action.default is False or action.default in ("", [])
        return action.help if action.nargs == 0 or says_nothing else f"{action.help} (default: %(default)s)"


def make_parser(dataclass_types: Iterable[type], first: Iterable[str] = (), **settings: Any) -> HfArgumentParser:
    """HfArgumentParser for `translate_flags`: no abbreviations, so that a misspelt or an old flag is never taken for
    another one; several trackers in --report_to; one-line ValueErrors instead of a page of usage and an exit.
    The help shows the fields named in `first` before all others; `settings` go to ArgumentParser."""
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **settings)
    actions = {action.dest: action for action in parser._actions}
    if "report_to" in actions:
        actions["report_to"].nargs = "+"
    groups = parser._action_groups
    what_to_do = parser.add_argument_group("what to do")
    for name in first:
        (group,) = (group for group in groups if actions[name] in group._group_actions)
        group._group_actions.remove(actions[name])
        what_to_do._group_actions.append(actions[name])
    groups.insert(0, groups.pop())

    def raise_one_line(message: str) -> None:
        raise QAError(message)

    parser.error = raise_one_line
    return parser


def refuse_unknown_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Raises ValueError, in one line, for flags in `argv` (as `translate_flags` returns it) that the parser does not
    know: each with the nearest spelling among those that it knows and the old flags that are still taken.

    To be asked before the parser, which would first complain of what is missing because it was misspelt.
    """
    known = parser._option_string_actions.keys()
    names = {flag.lstrip("-").replace("-", "_") for flag in known if flag.startswith("--")}
    names |= {name for name, fate in OLD_FLAGS.items() if not isinstance(fate, Refused)}
    complaints = []
    for name, values, tokens in split_flags(argv):
        if not name:
            complaints += [f"unexpected argument {value!r}" for value in values if value not in known]
        elif tokens[0].partition("=")[0] not in known:
            near = difflib.get_close_matches(name, sorted(names), n=1)
            complaints.append(f"unknown flag --{name}" + (f" (nearest: --{near[0]})" if near else ""))
    if complaints:
        raise QAError("; ".join(complaints))
