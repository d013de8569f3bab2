"""Windows longer than the checkpoint's positions, in the whole program: train, go on, evaluate, ask, train again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import At, run
from safetensors.torch import load_file
from test_run_squad import read, refusal
from tiny import tiny_bert, tiny_questions

import run_squad
from scripts import ask

TABLE = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
LONG = "--max_seq_length 40 --doc_stride 16 --num_train_epochs 2 --per_device_train_batch_size 4 --use_cpu".split()


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Of a model of 16 positions in windows of up to 29 tokens, all but its output_dir."""
    model = tiny_bert(tmp_path / "model", "relative_key_query", max_positions=16)
    questions = tiny_questions(tmp_path / "questions.json", paragraphs=6)
    argv = ["--model_name_or_path", model, "--do_train", "--do_eval", "--save_steps", "2", "--learning_rate", "1e-2"]
    return [*argv, "--train_file", questions, "--validation_file", questions, *LONG]


def positions(folder: Path) -> int:
    """Of a saved model, whose parts must all say the same."""
    weights = load_file(folder / "model.safetensors")
    (number,) = {
        (len(weights[TABLE]) + 1) // 2,
        len(weights["bert.embeddings.position_embeddings.weight"]),
        read(folder, "config.json")["max_position_embeddings"],
        read(folder, "tokenizer_config.json")["model_max_length"],
    }
    return number


def test_a_killed_run_goes_on_with_the_grown_model(command, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_squad.main([*command, "--output_dir", str(whole)])
    assert capsys.readouterr().err.count("Relative positions grow from 16 tokens to 40") == 1
    run(*command, "--output_dir", killed, at=At("trainer_qa.QuestionAnsweringTrainer.training_step", 4))
    assert positions(killed / "checkpoint-2") == 40
    run_squad.main([*command, "--output_dir", str(killed)])
    assert f"Going on from {killed / 'checkpoint-2'}" in capsys.readouterr().err
    assert positions(whole) == positions(killed) == 40
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    reached = first[TABLE][39 - 27 : 39 + 28]  # the rows of distances -27 to 27, each trained by itself
    assert len(reached.unique(dim=0)) == len(reached)

    # Ended between the training and the evaluation, whose model is then that of the folder.
    (killed / "eval_results.json").unlink()
    state = read(killed, "run_state.json")
    (killed / "run_state.json").write_text(json.dumps(state | {"status": "trained"}))
    run_squad.main([*command, "--output_dir", str(killed)])
    assert "Training was finished before" in capsys.readouterr().err
    results = [read(folder, "eval_results.json") for folder in (whole, killed)]
    assert results[0]["eval_f1"] == results[1]["eval_f1"]


def test_a_grown_model_answers_and_goes_back_to_shorter_windows(command, tmp_path, capsys):
    grown = tmp_path / "grown"
    run_squad.main([*command, "--output_dir", str(grown)])
    text = json.loads((tmp_path / "questions.json").read_text())["data"][0]["paragraphs"][0]["context"]
    (tmp_path / "text.txt").write_text(text)
    asked = [str(grown), "--context_file", str(tmp_path / "text.txt"), "--question", "where does anna live ?", "--json"]
    answers = {}
    for length in ("40", "200"):  # the text fits into one window of either
        capsys.readouterr()
        ask.main([*asked, "--max_seq_length", length])
        answers[length] = json.loads(capsys.readouterr().out)
    assert answers["40"] == answers["200"]
    expected = read(grown, "eval_nbest_predictions.json")["questions-0-0"]
    for ours, evaluated in zip(answers["40"]["n_best"], expected, strict=True):
        assert ours["text"] == evaluated["text"]
        assert ours["probability"] == pytest.approx(evaluated["probability"], rel=1e-3)

    again = [*command, "--model_name_or_path", str(grown)]
    for length, expected in (("24", 40), ("60", 60)):
        folder = tmp_path / f"again_{length}"
        capsys.readouterr()
        run_squad.main([*again, "--max_seq_length", length, "--doc_stride", "8", "--output_dir", str(folder)])
        assert positions(folder) == expected
        assert ("positions grow from 40 tokens to 60" in capsys.readouterr().err) == (length == "60")


def test_evaluation_alone_grows_in_memory_only(command, tmp_path):
    model = tmp_path / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    command.remove("--do_train")
    run_squad.main([*command, "--output_dir", str(tmp_path / "evaluated")])
    assert read(tmp_path / "evaluated", "eval_results.json")["eval_samples"] == 12  # each in one window
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_absolute_positions_are_refused_by_name(command, tmp_path, capsys):
    shutil.rmtree(tmp_path / "model")
    tiny_bert(tmp_path / "model", max_positions=16)
    line = refusal(capsys, *command, "--output_dir", str(tmp_path / "out"))
    assert "--max_seq_length is 40, but the model has positions for 16 tokens only" in line
    assert "relative_key, relative_key_query" in line
    assert not (tmp_path / "out").exists()
