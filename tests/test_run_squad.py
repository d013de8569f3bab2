"""The whole program on data and models that take seconds: what it writes, prints and refuses."""

import errno
import fcntl
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import read, tiny_bert, tiny_questions
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

import run_squad
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from trainer_qa import NEWEST_TESTED

ROOT = Path(run_squad.__file__).parent
QUICK = "--max_seq_length 48 --doc_stride 16 --num_train_epochs 1 --per_device_train_batch_size 4 --use_cpu".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files and models that the tests only read."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "absolute": tiny_bert(folder / "absolute"),
        "relative_key": tiny_bert(folder / "relative_key", "relative_key"),
        "train": tiny_questions(folder / "train.json", paragraphs=6),
        "dev": tiny_questions(folder / "dev.json", paragraphs=3),
        "dev_v2": tiny_questions(folder / "dev_v2.json", paragraphs=3, version_2=True),
        "test": tiny_questions(folder / "test.json", paragraphs=2, answers=False),
    }


@pytest.fixture
def command(inputs):
    """A function that makes a command of flags in which {names} stand for the inputs."""

    def make(out: Path, flags: str, model: str = "absolute", **more) -> list[str]:
        model = ["--model_name_or_path", str(more.get(model, inputs.get(model)))]
        return [*model, "--output_dir", str(out), *QUICK, *flags.format(**inputs, **more).split()]

    return make


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The output_dir of a run that trained, evaluated and predicted, with a checkpoint at each of its 3 steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(out), *QUICK, "--save_steps", "1"]
    argv += ["--position_embedding_type", "relative_key_query", "--do_train", "--do_eval", "--do_predict"]
    argv += ["--train_file", inputs["train"], "--validation_file", inputs["dev"], "--test_file", inputs["test"]]
    run_squad.main(argv)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def printed_scores(capsys) -> dict:
    out = capsys.readouterr().out
    return json.loads(out[out.rindex("{\n") :])


def refusal(capsys, argv: list[str]) -> str:
    """Runs a command that must be refused; returns its one line."""
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main(argv)
    assert exit_status.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("run_squad.py: error: ")
    return line


# ---- What a run leaves ----


def test_training_evaluation_and_prediction_write_every_file(trained):
    config, results = read(trained, "config.json"), read(trained, "eval_results.json")
    assert config["position_embedding_type"] == "relative_key_query"
    assert config["architectures"] == ["BertForQuestionAnswering"]
    assert read(trained, "train_results.json")["train_samples"] == 12 and results["eval_samples"] == 6
    assert results["eval_total"] == results["eval_HasAns_total"] == 6
    predicted = read(trained, "predict_results.json")
    assert predicted["predict_samples"] == 4 and not any(name.endswith("f1") for name in predicted)
    everything = read(trained, "all_results.json")
    assert everything["eval_f1"] == results["eval_f1"] and everything["train_samples"] == 12
    assert read(trained, "trainer_state.json")["global_step"] == 3
    assert (trained / "tokenizer_config.json").exists() and (trained / "model.safetensors").exists()
    for prefix, ids in (("eval", {f"dev-{p}-{q}" for p in range(3) for q in range(2)}), ("predict", {"test-0-0"})):
        assert ids <= read(trained, f"{prefix}_predictions.json").keys()
        assert ids <= read(trained, f"{prefix}_nbest_predictions.json").keys()
        assert not (trained / f"{prefix}_null_odds.json").exists()
    card = ModelCard.load(trained / "README.md")
    scored = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scored["f1"] == round(results["eval_f1"], 4)
    assert "relative_key_query" in card.text and "--max_seq_length 48" in card.text and "- torch " in card.text
    for set_by_the_trainer in ("remove_unused_columns", "logging_nan_inf_filter", "restore_callback_states"):
        assert set_by_the_trainer not in card.text


def test_evaluating_a_trained_model_in_its_own_folder_gives_the_same_scores(trained, copy, command, capsys):
    run_squad.main(command(copy, "--do_eval --validation_file {dev}", model="copy", copy=copy))
    scores = printed_scores(capsys)
    assert list(scores) == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert scores == {name: read(trained, "eval_results.json")[f"eval_{name}"] for name in scores}
    assert (copy / "eval_nbest_predictions.json").read_bytes() == (trained / "eval_nbest_predictions.json").read_bytes()


def test_version_2_scores_questions_without_an_answer(command, tmp_path, capsys):
    run_squad.main(command(tmp_path, "--do_eval --validation_file {dev_v2} --version_2_with_negative", "relative_key"))
    scores = printed_scores(capsys)
    assert (scores["total"], scores["HasAns_total"], scores["NoAns_total"]) == (6, 3, 3)
    assert {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"} <= scores.keys()
    assert read(tmp_path, "eval_null_odds.json").keys() == read(tmp_path, "eval_predictions.json").keys()


def test_samples_count_questions_not_windows(command, tmp_path):
    flags = "--do_train --do_eval --train_file {train} --validation_file {dev} --max_seq_length 20 --doc_stride 4"
    run_squad.main(command(tmp_path, f"{flags} --max_train_samples 5 --max_eval_samples 2"))
    assert len(read(tmp_path, "eval_predictions.json")) == read(tmp_path, "eval_results.json")["eval_total"] == 2
    assert read(tmp_path, "train_results.json")["train_samples"] > 5


def test_half_precision_checkpoint_is_trained_in_float32(inputs, command, tmp_path):
    model = RelativeBertForQuestionAnswering.from_pretrained(inputs["relative_key"])
    model.half().save_pretrained(tmp_path / "half")
    flags = "--do_train --train_file {train} --tokenizer_name {relative_key} --max_steps 1"
    run_squad.main(command(tmp_path / "out", flags, "half", half=tmp_path / "half"))
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_classifier_of_three_classes_is_a_start(inputs, command, tmp_path):
    config = BertConfig.from_pretrained(inputs["absolute"], num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "nli")
    flags = "--do_train --train_file {train} --tokenizer_name {absolute} --max_steps 1"
    run_squad.main(command(tmp_path / "out", flags, "nli", nli=tmp_path / "nli"))
    assert read(tmp_path / "out", "config.json")["architectures"] == ["BertForQuestionAnswering"]


def test_a_vocabulary_of_no_stated_case_and_a_model_of_one_token_type(inputs, command, tmp_path):
    config = BertConfig.from_pretrained(inputs["absolute"], type_vocab_size=1)
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "one_type")
    vocabulary = BertTokenizerFast.from_pretrained(inputs["absolute"]).get_vocab()
    (tmp_path / "one_type" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    flags = "--do_train --do_eval --train_file {train} --validation_file {dev} --max_steps 1 --do_lower_case False"
    run_squad.main(command(tmp_path / "out", flags, "one_type", one_type=tmp_path / "one_type"))
    saved = read(tmp_path, "out", "tokenizer_config.json")
    assert saved["do_lower_case"] is False and saved["model_input_names"] == ["input_ids", "attention_mask"]


def test_configuration_alone_brings_no_tokenizer(inputs, trained, command, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(Path(inputs["absolute"], "config.json"), tmp_path / "config")
    flags = "--do_eval --validation_file {dev} --config_name {config}"
    run_squad.main(command(tmp_path / "out", flags, config=tmp_path / "config"))
    assert read(tmp_path / "out", "eval_predictions.json").keys() == read(trained, "eval_predictions.json").keys()


def test_loader_flags_of_training_leave_the_answers_as_they_are(command, tmp_path):
    flags = "--do_eval --validation_file {dev} --do_predict --test_file {test} --per_device_eval_batch_size 5"
    run_squad.main(command(tmp_path / "plain", flags))
    loader = "--dataloader_drop_last --dataloader_num_workers 1 --dataloader_persistent_workers"
    run_squad.main(command(tmp_path / "flags", f"{flags} {loader}"))
    for name in ("eval_predictions.json", "predict_predictions.json"):
        assert read(tmp_path, "flags", name) == read(tmp_path, "plain", name)


def test_misplaced_answers_are_left_out_of_training_and_named(inputs, command, tmp_path, capsys):
    data = read(inputs["train"])
    question = data["data"][0]["paragraphs"][0]["qas"][1]
    question["answers"][0]["answer_start"] += 1
    (tmp_path / "misplaced.json").write_text(json.dumps(data))
    flags = "--do_train --train_file {misplaced} --misplaced_answers drop --max_steps 1"
    run_squad.main(command(tmp_path / "out", flags, misplaced=tmp_path / "misplaced.json"))
    assert f"first ids: {question['id']}" in capsys.readouterr().err
    assert read(tmp_path, "out", "train_results.json")["train_samples"] == 11


def test_share_of_the_windows_without_an_answer_is_drawn_by_the_data_seed(command, tmp_path, capsys, monkeypatch):
    flags = "--do_train --train_file {dev_v2} --max_steps 1"
    run_squad.main(command(tmp_path / "out", f"{flags} --negative_windows 0.34"))
    assert read(tmp_path, "out", "train_results.json")["train_samples"] == 4
    assert "Training windows: 3 hold an answer; of the 3 others 1 are trained on" in capsys.readouterr().err
    seeds = []

    def note(features, share, seed):
        seeds.append((share, seed))
        raise run_squad.QAError("seen")

    monkeypatch.setattr(run_squad, "keep_negative_windows", note)
    refusal(capsys, command(tmp_path, f"{flags} --seed 3"))
    refusal(capsys, command(tmp_path, f"{flags} --seed 3 --data_seed 5 --negative_windows 0.5"))
    assert seeds == [(1.0, 3), (0.5, 5)]


# ---- Flags ----


def test_one_json_file_is_the_same_as_flags(command, tmp_path):
    flags = command(tmp_path, "--do_eval --validation_file {dev}")
    values = dict(zip(flags[::2], flags[1::2], strict=False))  # up to --use_cpu each flag has a value
    arguments = {name.removeprefix("--"): value for name, value in values.items() if name != "--use_cpu"}
    arguments |= {"use_cpu": True, "do_eval": True, "validation_file": flags[-1], "max_seq_length": 48}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    from_file = run_squad.parse_arguments([str(tmp_path / "arguments.json")])
    for group, same in zip(from_file, run_squad.parse_arguments(flags), strict=True):
        ours, theirs = ({name: str(value) for name, value in vars(each).items()} for each in (group, same))
        assert ours == theirs


def test_plateau_scheduler_waits_for_f1_to_stop_rising(command, tmp_path):
    flags = "--do_train --do_eval --train_file {train} --validation_file {dev} --eval_strategy epoch"
    _, _, training_args = run_squad.parse_arguments(
        command(tmp_path, f"{flags} --lr_scheduler_type reduce_lr_on_plateau")
    )
    assert training_args.metric_for_best_model == "f1" and training_args.lr_scheduler_kwargs == {"mode": "max"}


def test_help_shows_every_flag_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main(["--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)
    assert len(set(shown)) == len(shown)
    groups = run_squad.ARGUMENT_GROUPS
    fields = {name for group in groups for name, field in group.__dataclass_fields__.items() if field.init}
    assert fields <= {*shown}
    assert "(default: 384)" in text


# ---- Bad input ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--do_eval --validation_file {missing}", ["missing.json"]),
        ("--do_eval --validation_file {layout}", ["layout.json", "data"]),
        ("--do_eval --validation_file {test}", ["test.json", "answers"]),
        ("--do_train", ["train", "--train_file"]),
        ("--do_eval", ["validation", "--validation_file", "--validation_split_percentage"]),
        ("--do_predict", ["test", "--test_file"]),
        ("", ["--do_train"]),
        ("--do_eval --validation_file {dev} --doc_stride 60", ["doc_stride", "60"]),
        ("--do_eval --validation_file {dev} --max_seq_length 65", ["--max_seq_length", "65", "64"]),
        ("--do_eval --validation_file {dev} --position_embedding_type sinus", ["position_embedding_type", "sinus"]),
        ("--do_eval --validation_file {dev} --n_best_size 0", ["--n_best_size", "0"]),
        ("--do_eval --validation_file {dev} --max_query_length 0", ["--max_query_length", "0"]),
        ("--do_train --train_file {train} --negative_windows nan", ["--negative_windows is nan", "from 0 to 1"]),
        ("--do_train --train_file {unanswerable} --negative_windows 0", ["no window holds an answer"]),
        ("--do_eval --validation_file {dev} --max_seq_lenght 40", ["--max_seq_lenght", "--max_seq_length"]),
        ("--do_eval --validation_file {dev} --load_best_model_at_end", ["--load_best_model_at_end requires"]),
        ("--do_eval --validation_file {dev} --per_device_train_batch_size 0", ["--per_device_train_batch_size is 0"]),
        ("--do_eval --validation_file {dev} --label_smoothing_factor 0.1", ["--label_smoothing_factor"]),
        ("--do_eval --validation_file {dev} --metric_for_best_model best_f1", ["best_f1", "--version_2_with_negative"]),
        ("--do_eval --validation_file {dev} --metric_for_best_model f2", ["--metric_for_best_model", "f2"]),
        ("--do_eval --validation_file {dev} --tokenizer_name {larger}", ["tokens, but the model has embeddings for"]),
        ("--do_eval --validation_file {dev} --model_name_or_path {relative_key} --config_name {absolute}",
         ["has relative position embeddings, but the configuration says absolute"]),
        ("--do_eval --validation_file {dev} --model_name_or_path {damaged}", ["cannot load a model from"]),
        ("--do_eval --validation_file {dev} --model_name_or_path {headless} --tokenizer_name {absolute}",
         ["lacks qa_outputs.bias, qa_outputs.weight: it was not trained to answer questions"]),
        ("--do_predict --test_file {test} --position_embedding_type relative_key", ["distance_embedding.weight:"]),
        ("--do_train --train_file {train} --config_name {wider}", ["other shapes than", "weight and 17 more"]),
        ("--do_eval --validation_file {dev} --report_to clearml", ["--report_to clearml", "installed"]),
        ("--do_train --train_file {train} --early_stopping_patience 1", ["--early_stopping_patience", "evaluations"]),
        ("--do_train --train_file {train} --early_stopping_patience 0", ["--early_stopping_patience is 0"]),
        ("--do_train --train_file {train} --fsdp full_shard", ["--fsdp needs GPUs"]),
        ("--do_train --train_file {train} --dataloader_drop_last --per_device_train_batch_size 13",
         ["--dataloader_drop_last leaves nothing of 12 windows in batches of 13"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_training(inputs, command, tmp_path, capsys, flags, says):
    (tmp_path / "layout.json").write_text('{"questions": []}')
    unanswerable = {"id": "1", "question": "who ?", "answers": [], "context": "anna ."}
    (tmp_path / "unanswerable.json").write_text(json.dumps([unanswerable]))
    tokenizer = BertTokenizerFast.from_pretrained(inputs["absolute"])
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "larger.json")
    damaged = Path(shutil.copytree(inputs["absolute"], tmp_path / "damaged.json"), "model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:2000])
    config = BertConfig.from_pretrained(inputs["absolute"])
    BertModel(config).save_pretrained(tmp_path / "headless.json")
    BertConfig(**config.to_dict() | {"hidden_size": 32}).save_pretrained(tmp_path / "wider.json")
    names = ("layout", "unanswerable", "larger", "damaged", "headless", "wider", "missing")
    line = refusal(capsys, command(tmp_path / "out", flags, **{name: tmp_path / f"{name}.json" for name in names}))
    assert all(word in line for word in says), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried. Halve --per_device_train"),
        (RuntimeError("a bug"), None),
    ],
)
def test_error_within_training_is_explained_or_keeps_its_traceback(command, tmp_path, capsys, monkeypatch, error, says):
    def fail(*args):
        raise error

    monkeypatch.setattr(run_squad.QuestionAnsweringTrainer, "training_step", fail)
    argv = command(tmp_path / "out", "--do_train --train_file {train}")
    if says is None:
        with pytest.raises(RuntimeError, match="a bug"):
            run_squad.main(argv)
    else:
        assert f"run_squad.py: error: {says}" in refusal(capsys, argv)


# ---- Nothing is overwritten unasked ----


def test_finished_run_is_not_trained_into_unless_asked(copy, command, capsys):
    before = (copy / "model.safetensors").read_bytes()
    argv = command(copy, "--do_train --train_file {train}")
    line = refusal(capsys, argv)
    assert (
        "belongs to another run" in line and "position_embedding_type is 'absolute', was 'relative_key_query'" in line
    )
    run_squad.main([*argv, "--position_embedding_type", "relative_key_query"])
    assert "Training was finished before" in capsys.readouterr().err
    assert (copy / "model.safetensors").read_bytes() == before
    run_squad.main([*argv, "--overwrite_output_dir"])
    assert (copy / "model.safetensors").read_bytes() != before and not (copy / "checkpoint-1").exists()


def test_overwriting_removes_nothing_before_the_run_can_start(copy, command, capsys):
    flags = "--do_train --train_file {train} --overwrite_output_dir"
    refusal(capsys, command(copy, f"{flags} --max_seq_length 65"))
    assert "would remove --model_name_or_path" in refusal(
        capsys, command(copy, flags, "own", own=copy / "checkpoint-3")
    )
    assert {path.name for path in copy.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}
    assert read(copy, "run_state.json")["status"] == "trained"


@pytest.mark.parametrize(
    "name",
    "README.md config.json model-00001-of-00002.safetensors tokenizer.json all_results.json checkpoint-7".split(),
)
def test_folder_of_someone_else_is_not_trained_into(command, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    for flags in ("", " --overwrite_output_dir"):
        line = refusal(capsys, command(tmp_path, f"--do_train --train_file {{train}}{flags}"))
        assert f"--output_dir {tmp_path} holds {name} of something else" in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_results_that_are_not_json_are_refused_before_the_work(command, tmp_path, capsys):
    """Those of an evaluation are kept, and may stand where is trained."""
    evaluate = command(tmp_path, "--do_eval --validation_file {dev}")
    run_squad.main(evaluate)
    file, f1 = tmp_path / "all_results.json", read(tmp_path, "eval_results.json")["eval_f1"]
    run_squad.main(command(tmp_path, "--do_train --train_file {train} --max_steps 1"))
    results = read(file)
    assert results["eval_f1"] == f1 and results["train_samples"] == 12
    (tmp_path / "eval_results.json").unlink()
    for content in ("f1: 80", "[]"):
        file.write_text(content)
        assert f"{file}: cannot be read as a JSON object" in refusal(capsys, evaluate)
        assert file.read_text() == content and not (tmp_path / "eval_results.json").exists()


def test_more_epochs_are_a_new_run_from_the_weights(copy, command, tmp_path, capsys):
    checkpoint, more = copy / "checkpoint-3", "--do_train --train_file {train} --num_train_epochs 2"
    argv = command(tmp_path / "more", f"{more} --position_embedding_type relative_key_query")
    line = refusal(capsys, [*argv, "--resume_from_checkpoint", str(checkpoint)])
    advice = f"--model_name_or_path {checkpoint} and a new --output_dir, without --resume_from_checkpoint"
    assert "num_train_epochs is 2.0, was 1.0. Use the same flags, or train on from its weights: " + advice in line
    run_squad.main(command(tmp_path / "more", more, "checkpoint", checkpoint=checkpoint))
    assert read(tmp_path, "more", "trainer_state.json")["global_step"] == 6


# ---- Where it runs ----


def test_notebook_in_a_thread_of_windows(command, tmp_path, capsys, monkeypatch):
    """Its progress callback takes entries out of the metrics; signals are the main thread's; and Windows flushes to the
    disk only what is open for writing."""
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda html, display_id=None: types.SimpleNamespace(update=str)
    for name, module in {"IPython": types.ModuleType("IPython"), "IPython.display": display}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    notebook = importlib.import_module("transformers.utils.notebook")
    if transformers.__version__ != NEWEST_TESTED and "must be called before on_evaluate" in inspect.getsource(notebook):
        pytest.skip("the notebook's callback of this transformers takes no evaluation after training")
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)

    def flush(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", flush)
    flags = "--do_train --do_eval --do_predict --train_file {train} --validation_file {dev} --test_file {dev}"
    with ThreadPoolExecutor(1) as executor:
        executor.submit(run_squad.main, command(tmp_path, f"{flags} --eval_strategy epoch")).result()
    assert printed_scores(capsys)["total"] == 6
    for prefix in ("eval", "predict"):
        assert read(tmp_path, f"{prefix}_results.json")[f"{prefix}_runtime"] > 0


@pytest.mark.parametrize("rank, local_rank, says", [("0", "0", True), ("9", "1", False), ("8", "0", True)])
def test_a_machine_that_fails_says_so_once(capsys, monkeypatch, rank, local_rank, says):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run_squad.main(["--do_everything"])
    assert ("unknown flag --do_everything" in capsys.readouterr().err) == says


def test_precision_is_the_launchers_and_the_log_level_the_flags(copy, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = "--do_train --train_file {train} --position_embedding_type relative_key_query"
    assert "bf16 is True, was False" in refusal(capsys, command(copy, flags))
    evaluate = command(tmp_path / "out", "--do_eval --validation_file {dev}")
    run_squad.main(evaluate)
    assert "1 process(es), bfloat16." in capsys.readouterr().err
    run_squad.main([*evaluate, "--log_level", "warning"])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "ACCELERATE_MIXED_PRECISION is 'fp8', must be no, fp16 or bf16" in refusal(capsys, evaluate)


# ---- Screen ----


def test_screen_of_a_run_under_torchrun(inputs, command, tmp_path):
    """Two processes train one model, and only the main one prints."""
    flags = "--do_train --do_eval --train_file {train} --validation_file {dev} --logging_steps 2"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*launch, str(ROOT / "run_squad.py"), *command(tmp_path / "out", flags)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    number, out = r"[0-9.e+-]+", tmp_path / "out"
    said = [line[line.index("INFO ") + 5 :] for line in done.stderr.splitlines() if " INFO " in line]
    for line, pattern in zip(
        said,
        [
            "Train: 12 questions, 12 windows.",
            "Validation: 6 questions, 6 windows.",
            "Model: BertForQuestionAnswering, absolute positions.",
            r"Windows: at most 48 tokens; the next one starts 16 context tokens later \(.*\).",
            r"Device: cpu:0, 2 process\(es\), float32.",
            f"Trained for {number} s; mean loss {number}.",
            rf"Answered \(eval\): 6 windows in {number} s, exact {number}, f1 {number}.",
            f"Everything is in {out}.",
            f"To ask the model: python scripts/ask.py {out} --context_file FILE",
            f"To see where it fails: python scripts/report.py {out}",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line
    assert read(out, "trainer_state.json")["global_step"] == 2  # 12 windows, 2 processes, batches of 4
    assert "Warning" not in done.stderr and done.stdout.count('"f1"') == 1
