"""Old spellings: the fates of transformers 4's flags, against its own list of them and against today's parser."""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from qa.legacy_flags import (
    OLD_FLAGS,
    Ignored,
    Refused,
    flags_from_json,
    make_parser,
    refuse_unknown_flags,
    translate_flags,
)
from run_squad import DataTrainingArguments, ModelArguments, QATrainingArguments

FIELDS_OF_4_57_6 = json.loads((Path(__file__).parent / "golden" / "training_args_4_57_6.json").read_text())

# Read off the argparse calls of transformers 4's examples/legacy/question-answering/run_squad.py.
FLAGS_OF_RUN_SQUAD = """model_type model_name_or_path output_dir data_dir train_file predict_file config_name
tokenizer_name cache_dir version_2_with_negative null_score_diff_threshold max_seq_length doc_stride max_query_length
do_train do_eval evaluate_during_training do_lower_case per_gpu_train_batch_size per_gpu_eval_batch_size learning_rate
gradient_accumulation_steps weight_decay adam_epsilon max_grad_norm num_train_epochs max_steps warmup_steps n_best_size
max_answer_length verbose_logging lang_id logging_steps save_steps eval_all_checkpoints no_cuda overwrite_output_dir
overwrite_cache seed local_rank fp16 fp16_opt_level server_ip server_port threads""".split()
# ... run_squad_trainer.py with SquadDataTrainingArguments, and run_qa.py with the flags that it had for a while.
FLAGS_OF_RUN_SQUAD_TRAINER = """model_name_or_path config_name tokenizer_name use_fast cache_dir model_type data_dir
max_seq_length doc_stride max_query_length max_answer_length overwrite_cache version_2_with_negative
null_score_diff_threshold n_best_size lang_id threads""".split()
FLAGS_OF_RUN_QA = """model_name_or_path config_name tokenizer_name cache_dir model_revision token use_auth_token
trust_remote_code dataset_name dataset_config_name train_file validation_file test_file overwrite_cache
preprocessing_num_workers max_seq_length pad_to_max_length no_pad_to_max_length max_train_samples max_eval_samples
max_val_samples max_predict_samples max_test_samples version_2_with_negative null_score_diff_threshold doc_stride
n_best_size max_answer_length""".split()


PARSER = make_parser((ModelArguments, DataTrainingArguments, QATrainingArguments))
TAKEN = {action.dest for action in PARSER._actions}


def parse(command):
    """(namespace, log lines) of a command line or an argv."""
    argv, lines = translate_flags(shlex.split(command) if isinstance(command, str) else command)
    return PARSER.parse_args(["--model_name_or_path=bert", *argv]), lines


def training_arguments(command, folder):
    argv, _ = translate_flags(shlex.split(command) if isinstance(command, str) else command)
    argv += ["--model_name_or_path=bert", f"--output_dir={folder}"]
    return PARSER.parse_args_into_dataclasses(argv, look_for_args_file=False)[2]


def test_every_field_that_went_between_4_57_6_and_today_has_a_fate():
    gone = FIELDS_OF_4_57_6.keys() - {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert len(FIELDS_OF_4_57_6) == 132 and len(gone) >= 28  # the golden file is the real list
    assert gone <= OLD_FLAGS.keys() | {"overwrite_output_dir"}  # which is run_squad.py's own flag
    assert "overwrite_output_dir" in TAKEN


@pytest.mark.parametrize("flags", [FLAGS_OF_RUN_SQUAD, FLAGS_OF_RUN_SQUAD_TRAINER, FLAGS_OF_RUN_QA])
def test_every_flag_of_the_old_scripts_has_a_fate_or_is_still_taken(flags):
    assert set(flags) <= OLD_FLAGS.keys() | TAKEN


# flag as typed, flag it reads as, value it must parse to
TRANSLATED = [
    ("--threads 3", "preprocessing_num_workers", 3),
    ("--predict_file dev.json", "validation_file", "dev.json"),
    ("--config_name ''", "config_name", None),
    ("--tokenizer_name ''", "tokenizer_name", None),
    ("--cache_dir ''", "cache_dir", None),
    ("--no_pad_to_max_length", "pad_to_max_length", False),
    ("--no-pad-to-max-length", "pad_to_max_length", False),
    ("--no_pad_to_max_length False", "pad_to_max_length", True),
    ("--pad_to_max_length", "pad_to_max_length", True),
    ("--pad_to_max_length True", "pad_to_max_length", True),
    ("--pad_to_max_length False", "pad_to_max_length", False),
    ("--pad_to_max_length=False", "pad_to_max_length", False),
    ("--max_val_samples 7", "max_eval_samples", 7),
    ("--max_test_samples 7", "max_predict_samples", 7),
    ("--use_auth_token", "token", None),
    ("--use_auth_token False", "token", None),
    ("--use_auth_token hf_abc", "token", "hf_abc"),
    ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
    ("--per_gpu_train_batch_size=3", "per_device_train_batch_size", 3),
    ("--per-gpu-eval-batch-size 3", "per_device_eval_batch_size", 3),
    ("--evaluate_during_training", "eval_strategy", "steps"),
    ("--evaluate_during_training False", "eval_strategy", "no"),
    ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
    ("--logging_steps 0", "logging_strategy", "no"),
    ("--logging_steps 9", "logging_steps", 9),
    ("--no_cuda", "use_cpu", True),
    ("--no_cuda False", "use_cpu", False),
    ("--metric_for_best_model exact_match", "metric_for_best_model", "exact"),
    ("--metric_for_best_model eval_exact_match", "metric_for_best_model", "eval_exact"),
    ("--metric_for_best_model f1", "metric_for_best_model", "f1"),
    ("--group_by_length", "train_sampling_strategy", "group_by_length"),
    ("--group_by_length True", "train_sampling_strategy", "group_by_length"),
    ("--group_by_length false", "train_sampling_strategy", "random"),
    ("--adafactor", "optim", "adafactor"),
    ("--optim adamw_apex_fused", "optim", "adamw_torch_fused"),
    ("--optim sgd", "optim", "sgd"),
    ("--include_inputs_for_metrics", "include_for_metrics", ["inputs"]),
    ("--include_tokens_per_second", "include_num_input_tokens_seen", True),
    ("--push_to_hub_token hf_abc", "hub_token", "hf_abc"),
    ("--push_to_hub_model_id squad", "hub_model_id", "squad"),
    ("--push_to_hub_model_id squad --push_to_hub_organization us", "hub_model_id", "us/squad"),
    ("--push_to_hub_organization us --output_dir runs/squad/", "hub_model_id", "us/squad"),
    ("--torchdynamo eager", "torch_compile_backend", "eager"),
    ("--debug ''", "debug", None),
    ("--tpu_metrics_debug", "debug", ["tpu_metrics_debug"]),
    ("--xpu_backend gloo", "ddp_backend", "gloo"),
    ("--fsdp_min_num_params 0", "fsdp_config", None),
    ("--fsdp_min_num_params 9", "fsdp_config", '{"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 9}'),
    ("--fsdp_transformer_layer_cls_to_wrap L", "fsdp_config", '{"transformer_layer_cls_to_wrap": ["L"]}'),
]


@pytest.mark.parametrize(("command", "flag", "value"), TRANSLATED)
def test_an_old_flag_parses_as_the_new_one(command, flag, value):
    namespace, lines = parse(command)
    assert getattr(namespace, flag) == value
    typed = {token[2:].partition("=")[0].replace("-", "_") for token in shlex.split(command) if token.startswith("--")}
    announced = {line.split()[2].strip(":")[2:] for line in lines}
    assert announced <= typed and typed - announced <= TAKEN  # one line for each old flag that was used
    assert len(lines) == len(announced)
    assert "hf_abc" not in " ".join(lines)  # tokens stay out of logs


def test_every_translating_row_has_an_example():
    examples = {shlex.split(command)[0][2:].partition("=")[0].replace("-", "_") for command, _, _ in TRANSLATED}
    tested_below = set(
        "data_dir train_file warmup_ratio warmup_steps logging_dir dispatch_batches split_batches".split()
    )
    translating = {name for name, fate in OLD_FLAGS.items() if not isinstance(fate, Ignored | Refused)}
    assert translating == (examples | tested_below) & OLD_FLAGS.keys()


IGNORED = {name: fate for name, fate in OLD_FLAGS.items() if isinstance(fate, Ignored)}


@pytest.mark.parametrize("flag", IGNORED)
def test_a_flag_that_chooses_nothing_is_accepted_and_announced(flag):
    assert translate_flags(["--do_eval", f"--{flag}", "something"])[0] == ["--do_eval"]
    argv, [line] = translate_flags([f"--{flag}", "--do_eval"])
    assert argv == ["--do_eval"] and f"--{flag}" in line and IGNORED[flag].why in line


# Flags that old commands carry and that no number depends on: what they chose is decided elsewhere, or not at all.
def test_only_flags_without_an_effect_on_numbers_are_ignored():
    assert IGNORED.keys() == set(
        """model_type do_lower_case use_fast verbose_logging use_legacy_prediction_loop jit_mode_eval ray_scope
        use_mps_device use_ipex tpu_num_cores mp_parameters""".split()
    )


REFUSED = [
    ("--lang_id 0", "without language ids"),
    ("--lang_id 3", "without language ids"),
    ("--eval_all_checkpoints", "--eval_strategy steps"),
    ("--server_ip 127.0.0.1", "debugpy"),
    ("--server_port 5678", "debugpy"),
    ("--fp16_opt_level O2", "--fp16"),
    ("--fp16_opt_level=O0", "--fp16"),
    ("--fp16_backend apex", "--fp16"),
    ("--half-precision-backend apex", "--fp16"),
    ("--past_index 1", "past state"),
    ("--save_safetensors False", "model.safetensors"),
    ("--no_save_safetensors", "model.safetensors"),
    ("--model_parallel", "--fsdp"),
    ("--sharded_ddp zero_dp_3", "--fsdp"),
    ("--optim adamw_hf", "adamw_torch"),
]


@pytest.mark.parametrize(("command", "instead"), REFUSED)
def test_a_refused_flag_says_in_one_line_what_to_use(command, instead):
    with pytest.raises(ValueError, match="^--") as error:
        translate_flags(["--do_train", *command.split(), "--seed", "1"])
    message = str(error.value)
    assert (
        instead in message and "\n" not in message and command.split()[0][2:].split("=")[0].replace("-", "_") in message
    )


def test_every_refusing_row_has_an_example_and_all_refusals_come_at_once():
    examples = {command.split()[0][2:].split("=")[0].replace("-", "_") for command, _ in REFUSED}
    assert {name for name, fate in OLD_FLAGS.items() if isinstance(fate, Refused)} <= examples
    with pytest.raises(ValueError, match="--lang_id.*; --eval_all_checkpoints"):
        translate_flags(["--lang_id=1", "--eval_all_checkpoints"])


@pytest.mark.parametrize(
    "command",
    [
        "--fp16_opt_level O1",
        "--past_index -1",
        "--half_precision_backend auto",
        "--save_safetensors",
        "--save_safetensors true",
        "--eval_all_checkpoints False",
        "--server_ip=",
    ],
)
def test_the_old_default_of_a_refused_flag_is_accepted(command):
    argv, lines = translate_flags(command.split())
    assert argv == [] and len(lines) == 1


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        ("--warmup_ratio 0.1", 3),
        ("--warmup_ratio 0.11", 4),
        ("--warmup_ratio 0", 0),
        ("--warmup_ratio 0.0", 0),
        ("--warmup_ratio 1", 30),
        ("--warmup_ratio 1.0", 30),
        ("--warmup_ratio 0.1 --warmup_steps 7", 7),
        ("--warmup_steps 7 --warmup_ratio 0.1", 7),
        ("--warmup_ratio 0.1 --warmup_steps 0", 3),
        ("--warmup_steps 0 --warmup_ratio 0.1", 3),
        ("--warmup_steps 1", 1),
        ("--warmup_steps 0", 0),
    ],
)
def test_warmup_takes_as_many_steps_as_it_took(command, steps, tmp_path):
    """Of 30 steps: transformers 4 takes warmup_steps if above 0, else the ratio of all steps, rounded up."""
    assert training_arguments(command, tmp_path).get_warmup_steps(30) == steps


@given(ratio=st.floats(0, 1), steps=st.integers(1, 10**6))
def test_every_warmup_ratio_takes_as_many_steps_as_it_took(ratio, steps):
    [flag], _ = translate_flags(["--warmup_ratio", repr(ratio)])
    warmup_steps = float(flag.partition("=")[2])
    arguments = SimpleNamespace(warmup_steps=warmup_steps)
    assert TrainingArguments.get_warmup_steps(arguments, steps) == math.ceil(steps * ratio)


@pytest.mark.parametrize("ratio", ["-0.1", "1.1", "nan", "x"])
def test_a_warmup_ratio_that_never_was_one_is_refused(ratio):
    with pytest.raises(ValueError, match="^--warmup_ratio"):
        translate_flags(["--warmup_ratio", ratio])


@pytest.mark.parametrize(
    ("command", "train_file", "validation_file"),
    [
        ("--data_dir D --do_train --do_eval", "D/train-v1.1.json", "D/dev-v1.1.json"),
        ("--do_train --do_eval --data_dir=D/", "D/train-v1.1.json", "D/dev-v1.1.json"),
        ("--data_dir D --do_train --do_eval --version_2_with_negative", "D/train-v2.0.json", "D/dev-v2.0.json"),
        ("--data_dir D --do_eval --version_2_with_negative False", None, "D/dev-v1.1.json"),
        ("--data_dir D --do_train", "D/train-v1.1.json", None),
        ("--data_dir D --do_train --evaluate_during_training", "D/train-v1.1.json", "D/dev-v1.1.json"),
        ("--data_dir D --do_train --eval-strategy epoch", "D/train-v1.1.json", "D/dev-v1.1.json"),
        ("--data_dir D --do_train --train_file t --do_eval --predict_file p", "D/t", "D/p"),
        ("--predict_file p --train_file /t --data_dir D", "/t", "D/p"),
        ("--data_dir D --do_eval --validation_file v", None, "v"),
        ("--train_file t --predict_file p", "t", "p"),
    ],
)
def test_data_dir_finds_the_files_that_the_old_script_read(command, train_file, validation_file):
    namespace, _ = parse(command)
    assert (namespace.train_file, namespace.validation_file) == (train_file, validation_file)


def test_evaluating_while_training_follows_the_logging_steps(tmp_path):
    arguments = training_arguments("--evaluate_during_training --logging_steps 20", tmp_path)
    assert (arguments.eval_strategy, arguments.eval_steps, arguments.do_eval) == ("steps", 20, True)


def test_settings_of_accelerate_are_read(tmp_path):
    config = training_arguments("--dispatch_batches False --split_batches", tmp_path).accelerator_config
    assert (config.dispatch_batches, config.split_batches) == (False, True)


def test_logging_dir_is_where_tensorboard_writes(monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    argv, [line] = translate_flags(["--logging_dir", "runs/1"])
    assert argv == [] and os.environ["TENSORBOARD_LOGGING_DIR"] == "runs/1" and "TENSORBOARD_LOGGING_DIR=runs/1" in line


@pytest.mark.parametrize(
    "command",
    [
        "--per_gpu_train_batch_size 2 --per_device_train_batch_size 3",
        "--per_device_train_batch_size=3 --per_gpu_train_batch_size=2",
        "--no_cuda --use_cpu False",
        "--adafactor --optim sgd",
        "--predict_file a.json --validation_file A.json",
        "--evaluate_during_training --evaluation_strategy epoch",
        "--no_pad_to_max_length --pad_to_max_length",
        "--data_dir D --dataset_name squad",
    ],
)
def test_an_old_spelling_that_contradicts_a_new_one_is_refused(command):
    with pytest.raises(ValueError, match="keep one of them") as error:
        translate_flags(command.split())
    assert "\n" not in str(error.value)


def test_an_old_spelling_that_says_the_same_is_accepted():
    namespace, _ = parse("--no_cuda --use_cpu --per_gpu_eval_batch_size 2 --per_device_eval_batch_size 2")
    assert namespace.use_cpu is True and namespace.per_device_eval_batch_size == 2
    assert parse("--per_gpu_eval_batch_size 2 --per_gpu_eval_batch_size 3")[0].per_device_eval_batch_size == 3


@pytest.mark.parametrize("command", ["--threads", "--no_cuda maybe", "--per_gpu_train_batch_size 2 3", "--data_dir"])
def test_a_value_that_an_old_flag_never_took_is_refused(command):
    with pytest.raises(ValueError, match="^" + command.split()[0]):
        translate_flags(command.split())


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda t: t.strip() not in ("", "\\"))))
def test_what_is_not_an_old_flag_stays_as_it_is(texts):
    argv = [t for t in texts if t.lstrip("-").partition("=")[0].replace("-", "_") not in OLD_FLAGS]
    assert translate_flags(argv) == (argv, [])


# ---- A trailing backslash, as shells hand it over ----


def argv_from_shell(text):
    """What a program is started with when bash reads `text` as a script, and as its -c argument."""
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "
    run = {"capture_output": True, "text": True, "check": False}
    read = subprocess.run(["bash"], input=show + text, **run).stdout
    given_as_argument = subprocess.run(["bash", "-c", show + text], **run).stdout
    return [json.loads(output.splitlines()[0]) for output in (read, given_as_argument)]


@pytest.mark.parametrize("end", ["\\\n", "   \\\n", "\\", " \\ \n", " \\\r\n", " \\\t", " ''", ""])
def test_a_trailing_backslash_is_dropped_whatever_the_shell_makes_of_it(end):
    for argv in argv_from_shell("--do_eval --per_device_train_batch_size=3 " + end):
        translated, lines = translate_flags(argv)
        assert translated == ["--do_eval", "--per_device_train_batch_size=3"]
        assert len(lines) == (argv[-1] in (" ", "\r", "\t"))  # the command was cut there: worth a word


def test_an_empty_value_at_the_end_stays():
    assert translate_flags(["--do_eval", "--run_name", ""])[0] == ["--do_eval", "--run_name", ""]


# ---- One JSON file ----


def write(folder, flags):
    path = folder / "args.json"
    path.write_text(flags if isinstance(flags, str) else json.dumps(flags))
    return path


def test_a_json_file_says_what_the_flags_say(tmp_path):
    path = write(
        tmp_path,
        {
            "do_train": True,
            "do_eval": False,
            "no_cuda": True,
            "learning_rate": 3e-05,
            "per_gpu_train_batch_size": 6,
            "train_file": "--odd name.json",
            "max_train_samples": None,
            "null_score_diff_threshold": -1.5,
            "report_to": ["tensorboard", "wandb"],
            "label_names": ["start_positions", "end_positions"],
            "debug": [],
            "tf32": False,
            "lr_scheduler_type": "cosine_with_restarts",
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "metric_for_best_model": "exact_match",
            "run_name": "",
        },
    )
    namespace, lines = parse(flags_from_json(path))
    expected = {
        "do_train": True,
        "do_eval": False,
        "use_cpu": True,
        "learning_rate": 3e-05,
        "per_device_train_batch_size": 6,
        "train_file": "--odd name.json",
        "max_train_samples": None,
        "null_score_diff_threshold": -1.5,
        "report_to": ["tensorboard", "wandb"],
        "label_names": ["start_positions", "end_positions"],
        "debug": None,
        "tf32": False,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "metric_for_best_model": "exact",
        "run_name": "",
    }
    assert {name: getattr(namespace, name) for name in expected} == expected
    assert len(lines) == 3
    kwargs = training_arguments(["--lr_scheduler_kwargs", '{"num_cycles": 2}'], tmp_path).lr_scheduler_kwargs
    assert kwargs == {"num_cycles": 2}


def test_a_json_file_of_all_of_transformers_4s_defaults_is_read(tmp_path):
    flags = {name: value for name, value in FIELDS_OF_4_57_6.items() if name != "output_dir"}
    argv = flags_from_json(write(tmp_path, flags))
    namespace, _ = parse(argv)
    same = {name: value for name, value in flags.items() if name not in OLD_FLAGS and value not in (None, [], {})}
    assert len(same) > 60 and {name: getattr(namespace, name) for name in same} == same
    assert namespace.train_sampling_strategy == "random"  # "group_by_length": false
    assert namespace.use_cpu is False and namespace.warmup_steps == 0
    training_arguments(argv, tmp_path)  # transformers' own checks pass


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("3", "holds a int"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"--do_train": true}', "'--do_train'"),
        ('{"": true}', "''"),
        ('{"report_to": [["a"]]}', "'report_to'"),
        ('{"report_to": [null]}', "'report_to'"),
    ],
)
def test_a_json_file_that_does_not_hold_flags_is_refused(text, complaint, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        flags_from_json(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and complaint in message and "\n" not in message


def test_a_json_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read: "):
            flags_from_json(path)
    (tmp_path / "args.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="args.json: is not UTF-8"):
        flags_from_json(tmp_path / "args.json")


# ---- Unknown flags ----


def test_an_abbreviation_or_a_misspelling_is_never_taken_for_another_flag():
    argv, lines = translate_flags(
        "--warmup_rat 0.1 --per_gpu_train 4 --max_seq_lenght 384 --max_seq_len 384 --zzqqx 1".split()
    )
    assert lines == []
    with pytest.raises(ValueError) as error:
        refuse_unknown_flags(PARSER, argv)
    assert str(error.value) == (
        "unknown flag --warmup_rat (nearest: --warmup_ratio); unknown flag --per_gpu_train (nearest: "
        "--per_gpu_train_batch_size); unknown flag --max_seq_lenght (nearest: --max_seq_length); unknown flag "
        "--max_seq_len (nearest: --max_seq_length); unknown flag --zzqqx"
    )


def test_an_argument_that_belongs_to_no_flag_is_named():
    with pytest.raises(ValueError) as error:
        refuse_unknown_flags(PARSER, ["stray", "--do-trian", "--seed=1", "--do-train", "-h"])
    assert str(error.value) == "unexpected argument 'stray'; unknown flag --do_trian (nearest: --do_train)"
    refuse_unknown_flags(PARSER, ["-h", "--seed", "1", "--do-train", "--null_score_diff_threshold", "-2.5"])


def test_a_wrong_value_is_one_line():
    with pytest.raises(ValueError, match="^argument --seed: invalid int value: 'x'$"):
        PARSER.parse_args(["--model_name_or_path=bert", "--seed=x"])
