"""The whole program on data and models that take seconds: what it writes, prints, resumes and refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_questions
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

import run_squad
from qa.load_model import load_config, load_model
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.read_squad import read_squad_file

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


def read(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def printed_metrics(capsys) -> dict:
    out = capsys.readouterr().out
    return json.loads(out[out.rindex("\n{\n") + 1 :] if "\n{\n" in out else out[out.index("{") :])


def refusal(capsys, *argv: str) -> str:
    """Runs a command that must be refused; returns its one line."""
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main(list(argv))
    assert exit_status.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("run_squad.py: error: ")
    return line


def test_train_evaluate_predict_write_every_file(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(out), *QUICK]
    argv += ["--position_embedding_type", "relative_key_query", "--do_train", "--do_eval", "--do_predict"]
    argv += ["--train_file", inputs["train"], "--validation_file", inputs["dev"], "--test_file", inputs["test"]]
    run_squad.main(argv)

    metrics = printed_metrics(capsys)
    assert list(metrics) == ["exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert metrics["total"] == metrics["HasAns_total"] == 6

    assert read(out, "config.json")["position_embedding_type"] == "relative_key_query"
    assert read(out, "config.json")["architectures"] == ["BertForQuestionAnswering"]
    assert read(out, "train_results.json")["train_samples"] == 12
    results = read(out, "eval_results.json")
    assert results["eval_f1"] == metrics["f1"] and results["eval_samples"] == 6
    assert "predict_samples" in read(out, "predict_results.json") and not any(
        key.endswith("f1") for key in read(out, "predict_results.json")
    )
    everything = read(out, "all_results.json")
    assert everything["eval_f1"] == metrics["f1"] and everything["train_samples"] == 12
    assert read(out, "trainer_state.json")["global_step"] == 3
    assert (out / "tokenizer_config.json").exists() and (out / "model.safetensors").exists()
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "question-answering" and card.data.library_name == "transformers"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["f1"] == round(
        metrics["f1"], 4
    )
    assert "relative_key_query" in card.text and "--max_seq_length 48" in card.text and "- torch " in card.text
    for prefix, ids in (("eval", {f"dev-{p}-{q}" for p in range(3) for q in range(2)}), ("predict", {"test-0-0"})):
        assert ids <= read(out, f"{prefix}_predictions.json").keys()
        n_best = read(out, f"{prefix}_nbest_predictions.json")
        assert all(entry["probability"] <= 1 for entries in n_best.values() for entry in entries)
        assert not (out / f"{prefix}_null_odds.json").exists()

    # The trained model's own folder is where one evaluates it; the numbers are the same.
    argv = ["--model_name_or_path", str(out), "--output_dir", str(out), "--do_eval", "--validation_file", inputs["dev"]]
    run_squad.main([*argv, *QUICK])
    assert printed_metrics(capsys) == metrics

    # Training into it is not, unless asked for.
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(out), *QUICK]
    argv += ["--do_train", "--train_file", inputs["train"]]
    weights = (out / "model.safetensors").read_bytes()
    assert "holds a finished run" in refusal(capsys, *argv)
    assert (out / "model.safetensors").read_bytes() == weights
    run_squad.main([*argv, "--overwrite_output_dir"])
    assert (out / "model.safetensors").read_bytes() != weights


def test_version_2_scores_questions_without_an_answer(inputs, tmp_path, capsys):
    argv = ["--model_name_or_path", inputs["relative_key"], "--output_dir", str(tmp_path), *QUICK, "--do_eval"]
    run_squad.main([*argv, "--validation_file", inputs["dev_v2"], "--version_2_with_negative"])
    metrics = printed_metrics(capsys)
    assert (metrics["total"], metrics["HasAns_total"], metrics["NoAns_total"]) == (6, 3, 3)
    assert {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"} <= metrics.keys()
    assert read(tmp_path, "eval_null_odds.json").keys() == read(tmp_path, "eval_predictions.json").keys()


def test_one_json_file_is_the_same_as_flags(inputs, tmp_path, capsys):
    argv = ["--model_name_or_path", inputs["absolute"], "--do_eval", "--validation_file", inputs["dev"], *QUICK]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "flags")])
    from_flags = printed_metrics(capsys)
    arguments = {
        "model_name_or_path": inputs["absolute"],
        "do_eval": True,
        "validation_file": inputs["dev"],
        "max_seq_length": 48,
        "doc_stride": 16,
        "use_cpu": True,
        "output_dir": str(tmp_path / "json"),
    }
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    run_squad.main([str(tmp_path / "arguments.json")])
    assert printed_metrics(capsys) == from_flags
    assert read(tmp_path, "json", "eval_predictions.json") == read(tmp_path, "flags", "eval_predictions.json")


def test_same_command_same_numbers(inputs, tmp_path):
    for name in ("one", "two"):
        argv = ["--model_name_or_path", inputs["relative_key"], "--output_dir", str(tmp_path / name), *QUICK]
        argv += ["--do_train", "--do_eval", "--train_file", inputs["train"], "--validation_file", inputs["dev"]]
        run_squad.main(argv)
    for file in ("model.safetensors", "eval_nbest_predictions.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_samples_count_questions(inputs, tmp_path):
    argv = [
        "--model_name_or_path",
        inputs["absolute"],
        "--output_dir",
        str(tmp_path),
        *QUICK,
        "--do_train",
        "--do_eval",
    ]
    argv += ["--train_file", inputs["train"], "--validation_file", inputs["dev"]]
    # Windows of 16 tokens: each question has several.
    argv += ["--max_seq_length", "20", "--doc_stride", "4", "--max_train_samples", "5", "--max_eval_samples", "2"]
    run_squad.main(argv)
    assert len(read(tmp_path, "eval_predictions.json")) == read(tmp_path, "eval_results.json")["eval_total"] == 2
    assert read(tmp_path, "train_results.json")["train_samples"] > 5


def test_relative_positions_start_from_an_absolute_checkpoint(inputs, caplog):
    with caplog.at_level("INFO", logger="qa.load_model"):
        model = load_model(inputs["absolute"], load_config(inputs["absolute"], "relative_key"))
    new = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    assert caplog.text.count("New parameters") == 1 and new in caplog.text and "qa_outputs" not in caplog.text
    loaded = load_file(Path(inputs["absolute"], "model.safetensors"))
    for name, parameter in model.state_dict().items():
        assert name == new or torch.equal(parameter, loaded[name]), name


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--do_eval --validation_file {missing}", ["missing.json"]),
        ("--do_eval --validation_file {empty}", ["empty.json"]),
        ("--do_eval --validation_file {text}", ["text.json", "JSON"]),
        ("--do_eval --validation_file {layout}", ["layout.json", "data"]),
        ("--do_eval --validation_file {no_context}", ["no_context.json", "context"]),
        ("--do_eval --validation_file {duplicates}", ["duplicates.json", "twice-1"]),
        ("--do_eval --validation_file {test}", ["test.json", "answers"]),
        ("--do_train", ["--do_train", "--train_file"]),
        ("--do_eval", ["--do_eval", "--validation_file"]),
        ("--do_predict", ["--do_predict", "--test_file"]),
        ("", ["--do_train"]),
        ("--do_eval --validation_file {dev} --doc_stride 60", ["doc_stride", "60"]),
        ("--do_eval --validation_file {dev} --max_seq_length 65", ["--max_seq_length", "65", "64"]),
        ("--do_eval --validation_file {dev} --position_embedding_type sinus", ["position_embedding_type", "sinus"]),
        ("--do_eval --validation_file {dev} --n_best_size 0", ["--n_best_size", "0"]),
        ("--do_train --train_file {train} --negative_windows 1.5", ["--negative_windows is 1.5", "from 0 to 1"]),
        ("--do_train --train_file {train} --negative_windows -0.1", ["--negative_windows is -0.1", "from 0 to 1"]),
        ("--do_train --train_file {train} --negative_windows nan", ["--negative_windows is nan", "from 0 to 1"]),
        ("--do_train --train_file {unanswerable} --negative_windows 0", ["no window holds an answer"]),
        ("--do_eval --validation_file {dev} --max_seq_lenght 40", ["--max_seq_lenght", "--max_seq_length"]),
        ("--do_eval --validation_file {dev} --load_best_model_at_end --eval_strateg steps",
         ["(nearest: --eval_strategy)"]),
        ("--do_eval --validation_file {dev} --load_best_model_at_end", ["--load_best_model_at_end requires"]),
        ("--do_eval --validation_file {dev} --tokenizer_nam {absolute}", ["(nearest: --tokenizer_name)"]),
        ("--do_eval --validation_file {dev} --per_device_train_batch_size 0", ["--per_device_train_batch_size is 0"]),
        ("--do_eval --validation_file {dev} --gradient_accumulation_steps 0", ["--gradient_accumulation_steps is 0"]),
        ("--do_train --train_file {train} --dataloader_drop_last --per_device_train_batch_size 13",
         ["--dataloader_drop_last leaves nothing of 12 windows in batches of 13"]),
        ("--do_eval --validation_file {dev} --dataloader_in_order False", ["--dataloader_in_order"]),
        ("--do_eval --validation_file {dev} --batch_eval_metrics", ["--batch_eval_metrics"]),
        ("--do_eval --validation_file {dev} --label_smoothing_factor 0.1", ["--label_smoothing_factor"]),
        ("--do_eval --validation_file {dev} --metric_for_best_model best_f1", ["best_f1", "--version_2_with_negative"]),
        ("--do_eval --validation_file {dev} --tokenizer_name {larger}", ["tokens, but the model has embeddings for"]),
        ("--do_eval --validation_file {dev} --model_name_or_path {relative_key} --config_name {absolute}",
         ["has relative position embeddings, but the configuration says absolute"]),
        ("--do_eval --validation_file {dev} --lang_id 3", ["--lang_id"]),
        ("--do_eval --validation_file {dev} --enable_jit_checkpoint", ["--enable_jit_checkpoint"]),
        ("--do_eval --validation_file {dev} --load_best_model_at_end --eval_strategy steps --eval_steps 9 "
         "--save_steps 9 --metric_for_best_model f2", ["--metric_for_best_model", "f2"]),
        ("--do_eval --validation_file {dev} --tokenizer_name {nowhere}", ["nowhere"]),
        ("--do_eval --validation_file {dev} --report_to clearml", ["--report_to clearml", "not installed"]),
        ("--do_eval --validation_file {dev} --report_to paper", ["--report_to paper", "unknown"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_training(inputs, tmp_path, capsys, flags, says):
    bad_question = {"id": "twice-1", "question": "who ?", "answers": []}
    nested = {"title": "t", "paragraphs": [{"context": "anna .", "qas": [bad_question, bad_question]}]}
    contents = {
        "empty": "",
        "text": "where does anna live ?",
        "layout": '{"questions": []}',
        "no_context": json.dumps({"data": [{"title": "t", "paragraphs": [{"qas": [bad_question]}]}]}),
        "duplicates": json.dumps({"data": [nested]}),
        "unanswerable": json.dumps([{**bad_question, "context": "anna ."}]),
    }
    tokenizer = BertTokenizerFast.from_pretrained(inputs["absolute"])
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "larger.json")
    files = {name: str(tmp_path / f"{name}.json") for name in [*contents, "larger", "missing", "nowhere"]}
    for name, content in contents.items():
        Path(files[name]).write_text(content)
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(tmp_path / "out")]
    argv += ["--max_seq_length", "48", "--doc_stride", "16", "--use_cpu", *flags.format(**files, **inputs).split()]
    line = refusal(capsys, *argv)
    assert all(word in line for word in says), line
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_misspelt_flag_is_named_before_what_is_missing_for_it(inputs, capsys):
    line = refusal(capsys, "--model_name_or_pth", inputs["absolute"], "--output_dri", "out", "--do_eval")
    assert "unknown flag --model_name_or_pth (nearest: --model_name_or_path)" in line
    assert "unknown flag --output_dri (nearest: --output_dir)" in line


def test_a_damaged_model_is_one_line(inputs, tmp_path, capsys):
    shutil.copytree(inputs["absolute"], tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    argv = ["--do_eval", "--validation_file", inputs["dev"], "--output_dir", str(tmp_path / "out"), *QUICK]
    assert "cannot load a model from" in refusal(capsys, "--model_name_or_path", str(tmp_path / "model"), *argv)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried. Halve --per_device_train"),
        (ImportError("You need to install x"), "You need to install x"),
        (RuntimeError("a bug"), None),
    ],
)
def test_errors_from_within_training(inputs, tmp_path, capsys, monkeypatch, error, says):
    def fail(*args):
        raise error

    monkeypatch.setattr(run_squad.QuestionAnsweringTrainer, "training_step", fail)
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(tmp_path / "out"), *QUICK]
    argv += ["--do_train", "--train_file", inputs["train"]]
    if says is None:  # what nobody has foreseen keeps its traceback
        with pytest.raises(RuntimeError):
            run_squad.main(argv)
        return
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main(argv)
    assert exit_status.value.code == 1
    assert f"run_squad.py: error: {says}" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_half_precision_checkpoint_is_trained_in_float32(inputs, tmp_path):
    model = RelativeBertForQuestionAnswering.from_pretrained(inputs["relative_key"])
    model.half().save_pretrained(tmp_path / "half")
    argv = ["--model_name_or_path", str(tmp_path / "half"), "--tokenizer_name", inputs["relative_key"], *QUICK]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "out"), "--do_train", "--train_file", inputs["train"]])
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_the_card_names_what_was_trained_on_and_what_was_scored(inputs, tmp_path, monkeypatch):
    squad = read_squad_file(inputs["train"], cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(run_squad, "load_examples", lambda name, config, files, *rest: {"train": squad} | {
        split: read_squad_file(file, cache_dir=str(tmp_path / "cache")) for split, file in files.items()
    })  # fmt: skip
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(tmp_path / "out"), *QUICK, "--do_train"]
    run_squad.main([*argv, "--do_eval", "--dataset_name", "squad", "--validation_file", inputs["dev"]])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["squad"] and "question answering on squad, with" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"dev.json"}
    argv += ["--overwrite_output_dir", "--train_file", inputs["train"], "--validation_file", inputs["dev"], "--do_eval"]
    run_squad.main([*argv, "--dataset_name", "squad"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets is None and "question answering on train.json, with" in card.text


def test_position_types_that_do_not_suit_the_model_are_refused(inputs, tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path / "out"), "--do_eval", "--validation_file", inputs["dev"], *QUICK]
    line = refusal(
        capsys, "--model_name_or_path", inputs["relative_key"], "--position_embedding_type", "absolute", *argv
    )
    assert "relative_key" in line and "absolute" in line
    config = RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    RobertaForQuestionAnswering(config).save_pretrained(tmp_path / "roberta")
    argv += ["--tokenizer_name", inputs["absolute"], "--position_embedding_type", "relative_key"]
    assert "roberta" in refusal(capsys, "--model_name_or_path", str(tmp_path / "roberta"), *argv)


def test_overwriting_removes_nothing_before_the_run_can_start(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(out), *QUICK, "--do_train"]
    argv += ["--train_file", inputs["train"], "--save_steps", "1"]
    run_squad.main(argv)
    kept = {path.name for path in out.glob("checkpoint-*")}
    assert len(kept) == 3
    refusal(capsys, *argv, "--overwrite_output_dir", "--max_seq_length", "65")
    line = refusal(capsys, *argv, "--overwrite_output_dir", "--model_name_or_path", str(out / "checkpoint-3"))
    assert "would remove --model_name_or_path" in line
    assert {path.name for path in out.glob("checkpoint-*")} == kept
    assert read(out, "run_state.json")["status"] == "finished"
    # A named checkpoint is no way around it.
    other = tmp_path / "other"
    run_squad.main([*argv, "--output_dir", str(other), "--learning_rate", "1e-3"])
    named = ["--resume_from_checkpoint", str(out / "checkpoint-1")]
    assert "holds a finished run" in refusal(capsys, *argv, *named, "--output_dir", str(other))
    run_squad.main([*argv, "--overwrite_output_dir"])
    assert {path.name for path in out.glob("checkpoint-*")} == kept


def test_a_share_of_the_windows_without_an_answer(inputs, tmp_path, capsys, monkeypatch):
    argv = ["--model_name_or_path", inputs["absolute"], *QUICK, "--do_train", "--train_file", inputs["dev_v2"]]
    argv += ["--save_steps", "1", "--per_device_train_batch_size", "2"]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "out"), "--negative_windows", "0.34"])
    assert read(tmp_path, "out", "train_results.json")["train_samples"] == 4
    assert "Training windows: 3 hold an answer; of the 3 others 1 are trained on" in capsys.readouterr().err
    argv += ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-1")]
    assert "negative_windows is 1.0, was 0.34" in refusal(capsys, *argv)
    # The seed that the order of the windows comes from draws them.
    seeds = []
    monkeypatch.setattr(
        run_squad, "keep_negative_windows", lambda features, share, seed: (seeds.append((share, seed)), features)[1]
    )
    refusal(capsys, *argv, "--seed", "3")
    refusal(capsys, *argv, "--seed", "3", "--data_seed", "5", "--negative_windows", "0.5")
    assert seeds == [(1.0, 3), (0.5, 5)]


def test_a_configuration_alone_brings_no_tokenizer(inputs, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(Path(inputs["absolute"], "config.json"), tmp_path / "config")
    argv = ["--model_name_or_path", inputs["absolute"], "--config_name", str(tmp_path / "config"), *QUICK]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "out"), "--do_eval", "--validation_file", inputs["dev"]])
    run_squad.main(
        [*argv[:2], *QUICK, "--output_dir", str(tmp_path / "plain"), "--do_eval", "--validation_file", inputs["dev"]]
    )
    assert read(tmp_path, "out", "eval_predictions.json") == read(tmp_path, "plain", "eval_predictions.json")


def test_a_classifier_of_three_classes_is_a_start(inputs, tmp_path):
    config = BertConfig.from_pretrained(inputs["absolute"], num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "nli")
    argv = ["--model_name_or_path", str(tmp_path / "nli"), "--tokenizer_name", inputs["absolute"], *QUICK]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "out"), "--do_train", "--train_file", inputs["train"]])


def test_loader_flags_of_training_leave_the_answers_as_they_are(inputs, tmp_path):
    argv = ["--model_name_or_path", inputs["absolute"], *QUICK, "--do_eval", "--validation_file", inputs["dev"]]
    argv += ["--do_predict", "--test_file", inputs["test"], "--per_device_eval_batch_size", "5"]
    run_squad.main([*argv, "--output_dir", str(tmp_path / "plain")])
    flags = "--dataloader_drop_last --dataloader_num_workers 1 --dataloader_persistent_workers".split()
    run_squad.main([*argv, *flags, "--output_dir", str(tmp_path / "flags")])
    for name in ("eval_predictions.json", "predict_predictions.json"):
        assert read(tmp_path, "flags", name) == read(tmp_path, "plain", name)


def test_a_plateau_is_seen_in_f1(inputs, tmp_path):
    argv = ["--model_name_or_path", inputs["absolute"], *QUICK, "--do_train", "--do_eval", "--train_file"]
    argv += [inputs["train"], "--validation_file", inputs["dev"], "--output_dir", str(tmp_path / "out")]
    run_squad.main([*argv, "--eval_strategy", "epoch", "--lr_scheduler_type", "reduce_lr_on_plateau"])
    assert read(tmp_path, "out", "run_state.json")["settings"]["metric_for_best_model"] == "f1"


def test_someone_elses_folder_is_not_trained_into(inputs, tmp_path, capsys):
    argv = ["--model_name_or_path", inputs["absolute"], "--do_train", "--train_file", inputs["train"], *QUICK]
    (tmp_path / "config.json").write_text("{}")
    assert "config.json" in refusal(capsys, *argv, "--output_dir", str(tmp_path))


def test_misplaced_answers_are_left_out_of_training_and_named(inputs, tmp_path, capsys):
    data = read(inputs["train"])
    question = data["data"][0]["paragraphs"][0]["qas"][1]
    question["answers"][0]["answer_start"] += 1
    (tmp_path / "train.json").write_text(json.dumps(data))
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(tmp_path / "out"), *QUICK, "--do_train"]
    argv += ["--misplaced_answers", "drop"]
    run_squad.main([*argv, "--train_file", str(tmp_path / "train.json")])
    assert f"first ids: {question['id']}" in capsys.readouterr().err
    assert read(tmp_path, "out", "train_results.json")["train_samples"] == 11


@pytest.mark.slow
def test_torchrun_trains_one_model_with_two_processes(inputs, tmp_path):
    argv = ["--model_name_or_path", inputs["relative_key"], "--output_dir", str(tmp_path / "out"), *QUICK]
    argv += ["--do_train", "--do_eval", "--train_file", inputs["train"], "--validation_file", inputs["dev"]]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(ROOT / "run_squad.py"), *argv], capture_output=True, text=True, check=True)
    assert read(tmp_path, "out", "trainer_state.json")["global_step"] == 2  # 12 windows, 2 processes, batches of 4
    assert read(tmp_path, "out", "eval_results.json")["eval_total"] == 6
    assert done.stdout.count('"exact"') == 1
    assert "2 process(es)" in done.stderr


# ---- Help ----


def test_help_shows_what_to_do_first_and_every_flag_once(capsys):
    with pytest.raises(SystemExit) as exit_status:
        run_squad.main(["--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "what to do:",
        "options:",
        "model:",
        "questions and answers:",
        "training (transformers' TrainingArguments):",
    ]
    first = text[: text.index("\noptions:")]
    assert all(f"\n  --{name}" in first for name in run_squad.WHAT_TO_DO)

    shown = re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)
    assert len(set(shown)) == len(shown)
    fields = {
        name for group in run_squad.ARGUMENT_GROUPS for name, field in group.__dataclass_fields__.items() if field.init
    }
    assert {name for name in shown if not name.startswith("no_")} == fields | {"help"}
    words = " ".join(text.split())
    assert "tokens of a window: question, a part of the context, special tokens. (default: 384)" in words
    assert "by more than this. (default: 0.0)" in words


# ---- Screen ----


def test_the_screen_of_a_run(inputs, tmp_path):
    argv = ["--model_name_or_path", inputs["absolute"], "--output_dir", str(tmp_path / "out"), *QUICK, "--do_train"]
    argv += ["--do_eval", "--train_file", inputs["train"], "--validation_file", inputs["dev"]]
    argv += "--logging_steps 2 --eval_strategy steps --eval_steps 3".split()
    done = subprocess.run([sys.executable, ROOT / "run_squad.py", *argv], capture_output=True, text=True)
    number = r"[0-9.e+-]+"
    said = [line[line.index("INFO ") + 5 :] for line in done.stderr.splitlines() if " INFO " in line]
    for line, pattern in zip(
        said,
        [
            "Model: BertForQuestionAnswering, absolute positions.",
            "Train: 12 questions, 12 windows.",
            "Validation: 6 questions, 6 windows.",
            r"Windows: at most 48 tokens; the next one starts 16 context tokens later \(.*\).",
            "Training: 3 steps of 4 windows.",
            r"Device: cpu, 1 process\(es\), float32.",
            f"Trained for {number} s, {number} windows a second; mean loss {number}.",
            f"Answered the validation questions: 6 windows in {number} s, exact {number}, f1 {number}.",
            f"Everything is in {tmp_path / 'out'}.",
            f"To ask the model: python scripts/ask.py {tmp_path / 'out'} --context_file FILE",
            f"To see where it fails: python scripts/report.py {tmp_path / 'out'}",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line
    steps = [line.strip() for line in done.stdout.splitlines() if "step " in line]
    assert [line.split("  ")[0] for line in steps] == ["step 2/3", "step 3/3"]
    assert re.fullmatch(rf"step 2/3  epoch 0.67  loss {number}  grad_norm {number}  learning_rate {number}", steps[0])
    assert re.fullmatch(rf"step 3/3  epoch 1.00  eval_exact {number}  eval_f1 {number}  eval_loss {number}", steps[1])
    assert {bar for bar in ("Training", "Answering") if f"{bar}: 100%" in done.stderr} == {"Training", "Answering"}
    assert "Warning" not in done.stderr and done.stdout.count('"f1"') == 1
