"""Flags: what becomes of transformers 4's, against its own list and today's parser; JSON files; misspellings."""

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

from qa.files import QAError
from qa.legacy_flags import OLD_FLAGS, join_flags, make_parser, parse_flags, split_flags, translate_flags
from run_squad import DataTrainingArguments, ModelArguments, QATrainingArguments

GROUPS = (ModelArguments, DataTrainingArguments, QATrainingArguments)
PARSER = make_parser(GROUPS)
TAKEN = {field.name for group in GROUPS for field in dataclasses.fields(group) if field.init}
FIELDS_OF_4_57_6 = json.loads((Path(__file__).parent / "golden" / "training_args_4_57_6.json").read_text())

# Read off the argparse calls of run_squad.py, run_squad_trainer.py and, from model_revision on, run_qa.py.
FLAGS_OF_OLD_SCRIPTS = """model_type model_name_or_path output_dir data_dir train_file predict_file config_name
tokenizer_name use_fast cache_dir version_2_with_negative null_score_diff_threshold max_seq_length doc_stride
max_query_length do_train do_eval evaluate_during_training do_lower_case per_gpu_train_batch_size
per_gpu_eval_batch_size learning_rate gradient_accumulation_steps weight_decay adam_epsilon max_grad_norm
num_train_epochs max_steps warmup_steps n_best_size max_answer_length verbose_logging lang_id logging_steps save_steps
eval_all_checkpoints no_cuda overwrite_output_dir overwrite_cache seed local_rank fp16 fp16_opt_level server_ip
server_port threads model_revision token use_auth_token trust_remote_code dataset_name dataset_config_name
validation_file test_file preprocessing_num_workers pad_to_max_length no_pad_to_max_length max_train_samples
max_eval_samples max_val_samples max_predict_samples max_test_samples""".split()

# What was typed -> what it is read as.
TRANSLATED = {
    "--threads 3": "--preprocessing_num_workers 3",
    "--config_name ''": "",
    "--config_name bert": "--config_name bert",
    "--tokenizer_name ''": "",
    "--cache_dir=": "",
    "--do_lower_case": "--do_lower_case True",
    "--do_lower_case False": "--do_lower_case False",
    "--no_pad_to_max_length": "--pad_to_max_length False",
    "--no-pad-to-max-length": "--pad_to_max_length False",
    "--no_pad_to_max_length False": "--pad_to_max_length True",
    "--max_val_samples 7": "--max_eval_samples 7",
    "--max_test_samples 7": "--max_predict_samples 7",
    "--per_gpu_train_batch_size 3": "--per_device_train_batch_size 3",
    "--per-gpu-eval-batch-size=3": "--per_device_eval_batch_size 3",
    "--per_gpu_eval_batch_size 2 --per_gpu_eval_batch_size 3": "--per_device_eval_batch_size 3",
    "--evaluate_during_training": "--eval_strategy steps",
    "--evaluate_during_training False": "",
    "--evaluation_strategy epoch": "--eval_strategy epoch",
    "--logging_steps 0": "--logging_strategy no",
    "--logging_steps 9": "--logging_steps 9",
    "--no_cuda": "--use_cpu True",
    "--no_cuda False": "",
    "--metric_for_best_model exact_match": "--metric_for_best_model exact",
    "--metric_for_best_model eval_exact_match": "--metric_for_best_model eval_exact",
    "--metric_for_best_model f1": "--metric_for_best_model f1",
    "--group_by_length": "--train_sampling_strategy group_by_length",
    "--group_by_length false": "--train_sampling_strategy random",
    "--adafactor": "--optim adafactor",
    "--optim adamw_apex_fused": "--optim adamw_torch_fused",
    "--optim sgd": "--optim sgd",
    "--include_inputs_for_metrics": "--include_for_metrics inputs",
    "--include_tokens_per_second": "--include_num_input_tokens_seen True",
    "--push_to_hub_token hf_abc": "--hub_token hf_abc",
    "--push_to_hub_model_id squad": "--hub_model_id squad",
    "--torchdynamo eager": "--torch_compile_backend eager",
    "--debug ''": "",
    "--tpu_metrics_debug": "--debug tpu_metrics_debug",
    "--xpu_backend gloo": "--ddp_backend gloo",
    "--warmup_steps 7": "--warmup_steps 7",
    "--data_dir D": "--train_file D/train-v1.1.json --validation_file D/dev-v1.1.json",
    "--data_dir=D/ --version_2_with_negative": "--version_2_with_negative "
    "--train_file D/train-v2.0.json --validation_file D/dev-v2.0.json",
    "--data_dir D --train_file t --predict_file p": "--train_file D/t --validation_file D/p",
    "--predict_file p --train_file /t --data_dir D": "--train_file /t --validation_file D/p",
    "--data_dir D --validation_file v": "--train_file D/train-v1.1.json --validation_file v",
    "--train_file t --predict_file p": "--train_file t --validation_file p",
    "--no_cuda --use_cpu": "--use_cpu",
    "--resume_from_checkpoint": "",
    "--resume_from_checkpoint True": "",
    "--resume_from_checkpoint false": "",
    "--resume_from_checkpoint out/checkpoint-5": "--resume_from_checkpoint out/checkpoint-5",
    "--per_gpu_eval_batch_size 2 --per_device_eval_batch_size 2": "--per_device_eval_batch_size 2",
}
# Flags that no number depends on: what they chose is decided elsewhere, or not at all.
IGNORED = """model_type use_fast verbose_logging use_legacy_prediction_loop jit_mode_eval ray_scope
use_mps_device use_ipex tpu_num_cores mp_parameters""".split()
# What was typed -> what the error names instead.
REFUSED = {
    "--lang_id 0": "without language ids",
    "--eval_all_checkpoints": "--eval_strategy steps",
    "--server_ip 127.0.0.1": "debugpy",
    "--server_port 5678": "debugpy",
    "--fp16_opt_level O2": "--fp16",
    "--fp16_backend apex": "--fp16",
    "--half-precision-backend=apex": "--fp16",
    "--past_index 1": "past state",
    "--save_safetensors False": "model.safetensors",
    "--no_save_safetensors": "model.safetensors",
    "--use_auth_token hf_abc": "--token",
    "--push_to_hub_organization us": "--hub_model_id",
    "--model_parallel": "--fsdp",
    "--sharded_ddp zero_dp_3": "--fsdp",
    "--fsdp_min_num_params 9": "--fsdp_config",
    "--fsdp_transformer_layer_cls_to_wrap BertLayer": "--fsdp_config",
    "--dispatch_batches False": "--accelerator_config",
    "--split_batches": "--accelerator_config",
}
ELSEWHERE = {"warmup_ratio", "logging_dir"}  # have tests of their own below


def translate(command):
    return translate_flags(split_flags(shlex.split(command)))


def parse(*argv):
    """(model, data and training arguments), log lines."""
    return parse_flags(GROUPS, ["--model_name_or_path=bert", "--output_dir=out", *argv])


# ---- Old flags ----


def test_every_old_flag_has_a_fate_and_an_example():
    gone = FIELDS_OF_4_57_6.keys() - {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert len(FIELDS_OF_4_57_6) == 132 and len(gone) >= 26  # the golden file is the real list
    assert gone | set(FLAGS_OF_OLD_SCRIPTS) <= OLD_FLAGS.keys() | TAKEN
    examples = {name for command in [*TRANSLATED, *REFUSED] for name in split_flags(shlex.split(command))}
    assert OLD_FLAGS.keys() <= examples | ELSEWHERE | set(IGNORED)


@pytest.mark.parametrize(("old", "new"), TRANSLATED.items())
def test_an_old_flag_is_read_as_a_new_one_and_said_so_without_secrets(old, new):
    typed, expected = split_flags(shlex.split(old)), split_flags(shlex.split(new))
    flags, notices = translate(old)
    assert flags == expected
    PARSER.parse_args(["--model_name_or_path=bert", *join_flags(flags)])  # today's parser takes it
    changed = {name for name in typed if typed[name] != expected.get(name)}
    assert {notice.split()[2].strip(":") for notice in notices} == {f"--{name}" for name in changed}
    assert "hf_abc" not in " ".join(notices)


@pytest.mark.parametrize("name", IGNORED)
def test_a_flag_that_chooses_nothing_is_ignored_with_a_reason(name):
    for command in (f"--{name}", f"--{name} something"):
        flags, [notice] = translate(f"{command} --do_eval")
        assert flags == {"do_eval": []} and notice.startswith(f"old flag --{name}: ignored, ")


@pytest.mark.parametrize(("old", "instead"), REFUSED.items())
def test_a_refused_flag_is_one_line_that_says_what_to_use(old, instead):
    with pytest.raises(QAError, match=f"^--{next(iter(split_flags(old.split())))}: no longer taken: ") as error:
        translate(f"--do_train {old} --seed 1")
    assert instead in str(error.value) and "\n" not in str(error.value) and "hf_abc" not in str(error.value)


@pytest.mark.parametrize(
    "old",
    "fp16_opt_level=O1 past_index=-1 half_precision_backend=auto fp16_backend=auto save_safetensors server_ip= "
    "save_safetensors=true eval_all_checkpoints=False use_auth_token sharded_ddp= fsdp_min_num_params=0".split(),
)
def test_the_old_default_of_a_refused_flag_is_ignored(old):
    flags, [notice] = translate(f"--{old}")
    assert flags == {} and "it asks for nothing" in notice


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        ("--warmup_ratio 0.1", 3),
        ("--warmup_ratio 1", 30),
        ("--warmup_ratio 0.1 --warmup_steps 7", 7),
        ("--warmup_steps 7 --warmup_ratio 0.1", 7),
        ("--warmup_ratio 0.1 --warmup_steps 0", 3),
        ("--warmup_steps 0 --warmup_ratio 0.1", 3),
        ("--warmup_steps 1", 1),
    ],
)
def test_warmup_takes_as_many_of_30_steps_as_in_transformers_4(command, steps):
    """warmup_steps if above 0, else the ratio of all steps, rounded up."""
    (_, _, training_args), _ = parse(*command.split())
    assert training_args.get_warmup_steps(30) == steps


@given(ratio=st.floats(0, 1), steps=st.integers(1, 10**6))
def test_every_warmup_ratio_takes_as_many_steps_as_in_transformers_4(ratio, steps):
    flags, _ = translate(f"--warmup_ratio {ratio!r}")
    arguments = SimpleNamespace(warmup_steps=float(flags["warmup_steps"][0]))
    assert TrainingArguments.get_warmup_steps(arguments, steps) == math.ceil(steps * ratio)


def test_evaluating_while_training_follows_the_logging_steps():
    (_, _, arguments), _ = parse("--evaluate_during_training", "--logging_steps", "20")
    assert (arguments.eval_strategy, arguments.eval_steps, arguments.do_eval) == ("steps", 20, True)


def test_logging_dir_is_where_tensorboard_writes(monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    flags, [notice] = translate("--logging_dir runs/1")
    assert flags == {} and os.environ["TENSORBOARD_LOGGING_DIR"] == "runs/1"
    assert "TENSORBOARD_LOGGING_DIR=runs/1" in notice


@pytest.mark.parametrize("end", ["\\\n", "   \\\n", "\\", " \\ \n", " \\\r\n", " \\\t", ""])
def test_a_backslash_at_the_end_of_a_command_is_dropped_whatever_the_shell_makes_of_it(end):
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' --do_eval --seed=3 "
    for shell in ({"args": ["bash"], "input": show + end}, {"args": ["bash", "-c", show + end]}):
        output = subprocess.run(**shell, capture_output=True, text=True).stdout
        argv = json.loads(output.splitlines()[0])
        (_, _, arguments), notices = parse(*argv)
        assert arguments.do_eval and arguments.seed == 3
        assert len(notices) == len(argv) - 2  # lines after the backslash may not have arrived


# ---- One JSON file ----


def parse_json(folder, content):
    file = folder / "arguments.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return parse_flags(GROUPS, [str(file)])


def test_a_json_file_says_what_the_flags_say(tmp_path):
    same = {
        "model_name_or_path": "bert",
        "output_dir": "out",
        "do_train": True,
        "do_eval": False,
        "learning_rate": 3e-05,
        "train_file": "--odd name.json",
        "max_train_samples": None,
        "null_score_diff_threshold": -1.5,
        "report_to": ["tensorboard", "wandb"],
        "label_names": ["start_positions", "end_positions"],
        "debug": [],
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "run_name": "",
    }
    groups, notices = parse_json(tmp_path, {**same, "no_cuda": True, "per_gpu_train_batch_size": 6})
    read = {name: value for group in groups for name, value in vars(group).items()}
    expected = {**same, "use_cpu": True, "per_device_train_batch_size": 6}
    assert {name: read[name] for name in expected} == expected
    assert len(notices) == 2


def test_a_json_file_of_all_of_transformers_4s_defaults_is_read(tmp_path):
    flags = {**FIELDS_OF_4_57_6, "output_dir": "out"}
    (_, _, arguments), _ = parse_json(tmp_path, {**flags, "model_name_or_path": "bert"})
    assert arguments.train_sampling_strategy == "random"  # "group_by_length": false
    assert arguments.warmup_steps == 0
    same = {name for name, value in flags.items() if hasattr(arguments, name) and value not in (None, [], "")}
    changed = {name for name in same if getattr(arguments, name) != flags[name]}
    by_themselves = {"use_cpu", "dataloader_pin_memory", "include_num_input_tokens_seen"}
    assert len(same) > 60 and changed <= {*by_themselves, "warmup_ratio"}  # which earlier versions still have


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "Expecting value"),
        ("[]", "holds a list"),
        ("3", "holds a int"),
        ('{"--do_train": true}', "__do_train"),
        ('{"seed": "x"}', "--seed"),
        ('{"model_name_or_path": "bert"}', "--output_dir"),
    ],
)
def test_a_json_file_that_does_not_hold_flags_is_one_line_with_its_name(content, complaint, tmp_path):
    with pytest.raises(QAError) as error:
        parse_json(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/arguments.json: ") and complaint in message and "\n" not in message


def test_a_json_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "folder.json").mkdir()
    for name in ("none.json", "folder.json", "bytes.json"):
        with pytest.raises(QAError, match=f"^{tmp_path / name}: "):
            parse_flags(GROUPS, [str(tmp_path / name)])


def test_flags_after_a_json_file_win_in_old_spellings_too(tmp_path, monkeypatch):
    """And a ~ is the home folder wherever it comes from: shells leave it alone behind a "="."""
    monkeypatch.setenv("HOME", "/home/anna")
    file = tmp_path / "arguments.json"
    kept = {"model_name_or_path": "~/bert", "output_dir": "out", "seed": 7, "data_dir": "~/squad"}
    file.write_text(json.dumps({**kept, "learning_rate": 1e-5, "per_device_train_batch_size": 2, "warmup_ratio": 0.1}))
    flags = ["--learning_rate", "1e-4", "--per_gpu_train_batch_size=3", "--warmup_steps=9", "--cache_dir=~/c"]
    (model, data, training), notices = parse_flags(GROUPS, [str(file), *flags])
    assert (training.seed, training.learning_rate) == (7, 1e-4)
    assert (training.per_device_train_batch_size, training.warmup_steps) == (3, 9)
    assert (model.model_name_or_path, model.cache_dir) == ("/home/anna/bert", "/home/anna/c")
    assert data.train_file == "/home/anna/squad/train-v1.1.json"
    assert len(notices) == 4  # of data_dir two, of warmup_ratio and of per_gpu_train_batch_size
    with pytest.raises(QAError, match=f"^{file} and the flags after it: argument --seed: invalid int value: 'x'"):
        parse_flags(GROUPS, [str(file), "--seed=x"])


# ---- Errors ----

KEEP_ONE = "different values: keep one of them"
WRONG = {
    "--per_gpu_train_batch_size 2 --per_device_train_batch_size 3": KEEP_ONE,
    "--no_cuda --use_cpu False": KEEP_ONE,
    "--adafactor --optim sgd": KEEP_ONE,
    "--predict_file a.json --validation_file A.json": KEEP_ONE,
    "--evaluate_during_training --evaluation_strategy epoch": KEEP_ONE,
    "--no_pad_to_max_length --pad_to_max_length": KEEP_ONE,
    "--push_to_hub_token hf_abc --hub_token hf_def": KEEP_ONE,
    "--data_dir D --dataset_name squad": "--data_dir: --dataset_name is given too: keep one of them",
    "--no_cuda maybe": "--no_cuda: Truthy value expected",
    "--per_gpu_train_batch_size 2 3": "--per_gpu_train_batch_size takes one value",
    "--do_lower_case stray 1": "--do_lower_case takes one value",
    "--warmup_ratio -0.1": "--warmup_ratio: a warm-up ratio of -0.1 does not lie between 0 and 1",
    "--warmup_ratio nan": "--warmup_ratio: a warm-up ratio of nan does not lie",
    "--warmup_ratio x": "--warmup_ratio: could not convert",
    "--seed=x": "argument --seed: invalid int value: 'x'",
    "--load_best_model_at_end": "--load_best_model_at_end requires the save and eval strategy",  # transformers'
    "--warmup_rat 0.1 --per_gpu_train 4 --max_seq_len 384 --zzqqx 1": "unknown flag --warmup_rat (nearest: "
    "--warmup_ratio); unknown flag --per_gpu_train (nearest: --per_gpu_train_batch_size); unknown flag --max_seq_len "
    "(nearest: --max_seq_length); unknown flag --zzqqx",
}


@pytest.mark.parametrize(("command", "says"), WRONG.items())
def test_a_wrong_flag_is_one_line_without_secrets(command, says):
    with pytest.raises(QAError) as error:
        parse(*command.split())
    assert says in str(error.value) and "\n" not in str(error.value) and "hf_" not in str(error.value)


def test_a_misspelling_is_named_before_what_is_missing_because_of_it():
    with pytest.raises(QAError, match=r"^unknown flag --model_name_or_pth \(nearest: --model_name_or_path\)$"):
        parse_flags(GROUPS, ["--model_name_or_pth", "bert"])
    with pytest.raises(QAError, match=r"^unexpected argument 'arguments.yaml': .* a file of them is in JSON"):
        parse_flags(GROUPS, ["arguments.yaml", "--do_train"])
    with pytest.raises(QAError, match="^the following arguments are required: --model_name_or_path"):
        parse_flags(GROUPS, ["--do_train"])
