"""Windows longer than the checkpoint's positions, in the whole program: train, resume, evaluate, ask, train again."""

import json
from pathlib import Path

import pytest
import torch
from launch import At, run
from safetensors.torch import load_file
from test_run_squad import refusal
from tiny import read, tiny_bert, tiny_questions

import run_squad
from scripts import ask

TABLE = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
LONG = "--max_seq_length 40 --doc_stride 16 --num_train_epochs 2 --per_device_train_batch_size 4 --use_cpu".split()


def command_for(folder: Path, position_embedding_type: str) -> list[str]:
    """Of a model of 16 positions in windows of up to 29 tokens, all but its output_dir."""
    model = tiny_bert(folder / "model", position_embedding_type, max_positions=16)
    questions = tiny_questions(folder / "questions.json", paragraphs=6)
    argv = ["--model_name_or_path", model, "--do_train", "--do_eval", "--save_steps", "2", "--learning_rate", "1e-2"]
    return [*argv, "--train_file", questions, "--validation_file", questions, *LONG]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], Path, Path]:
    """The command, the folder of its model and questions, and what it has trained."""
    folder = tmp_path_factory.mktemp("longer")
    command = command_for(folder, "relative_key_query")
    run_squad.main([*command, "--output_dir", str(folder / "trained")])
    return command, folder, folder / "trained"


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


def test_a_killed_run_resumes_with_the_grown_model(trained, tmp_path, capsys):
    command, _, whole = trained
    run(*command, "--output_dir", tmp_path, at=At("trainer_qa.QuestionAnsweringTrainer.training_step", 4))
    assert positions(tmp_path / "checkpoint-2") == 40
    run_squad.main([*command, "--output_dir", str(tmp_path)])
    assert str(tmp_path / "checkpoint-2") in capsys.readouterr().err
    assert positions(whole) == positions(tmp_path) == 40
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    reached = first[TABLE][39 - 27 : 39 + 28]  # the rows of distances -27 to 27, each trained by itself
    assert len(reached.unique(dim=0)) == len(reached)


def test_a_grown_model_answers_evaluates_and_trains_in_windows_of_any_length(trained, tmp_path, capsys):
    command, folder, grown = trained
    text = read(folder, "questions.json")["data"][0]["paragraphs"][0]["context"]
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
        assert (ours["answer"], ours["probability"]) == (
            evaluated["text"],
            pytest.approx(evaluated["probability"], 1e-3),
        )

    again = [*command, "--model_name_or_path", str(grown)]
    for length, expected in (("24", 40), ("60", 60)):
        capsys.readouterr()
        run_squad.main(
            [*again, "--max_seq_length", length, "--doc_stride", "8", "--output_dir", str(tmp_path / length)]
        )
        assert positions(tmp_path / length) == expected
        assert ("positions grow from 40 tokens to 60" in capsys.readouterr().err) == (length == "60")

    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    command = [flag for flag in command if flag != "--do_train"]  # grows in memory only
    run_squad.main([*command, "--output_dir", str(tmp_path / "evaluated")])
    assert read(tmp_path / "evaluated", "eval_results.json")["eval_samples"] == 12  # each in one window
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before


def test_absolute_positions_are_refused_by_name(tmp_path, capsys):
    line = refusal(capsys, [*command_for(tmp_path, "absolute"), "--output_dir", str(tmp_path / "out")])
    assert "--max_seq_length is 40, but the model has positions for 16 tokens only" in line
    assert "relative_key, relative_key_query" in line and not (tmp_path / "out").exists()
