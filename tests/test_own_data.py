"""The whole program on data of one's own: answers that moved, contexts held out, flags that do not fit."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_report import report
from test_run_squad import QUICK, printed_scores, refusal
from tiny import read, tiny_bert, tiny_questions

import run_squad
from qa.read_squad import read_squad_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    moved = read(tiny_questions(folder / "train.json", paragraphs=6))
    questions = [qa for article in moved["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    questions[2]["answers"][0]["answer_start"] += 3
    questions[4]["answers"][0]["answer_start"] = -1
    questions[7]["answers"][0]["text"] = "nowhere"
    (folder / "moved.json").write_text(json.dumps(moved))
    return {
        "bert": tiny_bert(folder / "bert"),
        "train": str(folder / "train.json"),
        "moved": str(folder / "moved.json"),
        "dev": tiny_questions(folder / "dev.json", paragraphs=3),
        "train_v2": tiny_questions(folder / "train_v2.json", paragraphs=8, version_2=True),
    }


def command(inputs, out: Path, train: str, *more: str) -> list[str]:
    argv = ["--model_name_or_path", inputs["bert"], "--output_dir", str(out), *QUICK]
    return [*argv, "--do_train", "--train_file", inputs[train], *more]


def test_repaired_answers_are_listed(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    run_squad.main(command(inputs, out, "moved", "--save_steps", "1"))
    said = capsys.readouterr().err
    assert "2 of 12 questions have an answer that does not stand at its answer_start" in said
    assert "1 of 12 questions are left out of training" in said and "version_2_with_negative" not in said
    changes = read(out, "repaired_answers.json")
    assert [change["id"] for change in changes] == ["train-1-0", "train-2-0", "train-3-1"]
    contexts = {row["id"]: row["context"] for row in read_squad_file(inputs["moved"], tmp_path / "cache")}
    for change in changes[:2]:
        assert contexts[change["id"]][change["repaired_start"] : change["repaired_end"]] == change["text"]
    assert changes[2]["repaired_start"] is None and changes[2]["text"] == "nowhere"
    assert read(out, "train_results.json")["train_samples"] == 11

    # Unfinished, it goes on with the same answers only.
    (out / "run_state.json").write_text(json.dumps({**read(out, "run_state.json"), "status": "training"}))
    line = refusal(capsys, command(inputs, out, "moved", "--save_steps", "1", "--misplaced_answers", "drop"))
    assert "belongs to another run" in line and "training data" in line

    # Of a run without repairs there is no such file, and of another's none is overwritten.
    run_squad.main(command(inputs, out, "train", "--overwrite_output_dir", "--max_steps", "1"))
    assert not (out / "repaired_answers.json").exists()
    (tmp_path / "repaired_answers.json").write_text("[]")
    line = refusal(capsys, command(inputs, tmp_path, "moved"))
    assert "holds repaired_answers.json of something else" in line
    assert (tmp_path / "repaired_answers.json").read_text() == "[]"


def test_a_folder_and_a_pattern_with_an_empty_question(inputs, tmp_path, capsys):
    """Which is not trained on, but answered."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.json").write_bytes(Path(inputs["dev"]).read_bytes())
    row = "anna lives in rome,{},rome,14\n"
    questions = "".join(row.format(question) for question in ("where ?", "", "where does anna live ?"))
    (tmp_path / "set" / "b.csv").write_text(f"context,question,answer_text,answer_start\n{questions}")
    files = ["--train_file", str(tmp_path / "set"), "--do_eval", "--validation_file", str(tmp_path / "set" / "*.csv")]
    run_squad.main([*command(inputs, tmp_path / "out", "dev"), *files])
    assert printed_scores(capsys)["total"] == 3
    assert list(read(tmp_path / "out", "eval_predictions.json")) == ["row 0", "row 1", "row 2"]
    assert read(tmp_path / "out", "train_results.json")["train_samples"] == 8
    report.main([str(tmp_path / "out")])


def test_drop_and_refuse(inputs, tmp_path, capsys):
    run_squad.main(command(inputs, tmp_path / "out", "moved", "--misplaced_answers", "drop"))
    assert read(tmp_path / "out", "train_results.json")["train_samples"] == 9
    assert [c["repaired_start"] for c in read(tmp_path / "out", "repaired_answers.json")] == [None] * 3
    line = refusal(capsys, command(inputs, tmp_path / "no", "moved", "--misplaced_answers", "refuse"))
    assert "3 of 12 questions have an answer" in line and "train-1-0, train-2-0, train-3-1" in line
    assert not (tmp_path / "no").exists()


def test_validation_split(inputs, tmp_path, capsys):
    out, more = tmp_path / "out", ["--do_eval", "--validation_split_percentage", "34", "--seed", "7"]
    run_squad.main(command(inputs, out, "moved", *more))
    held_out = read(out, "eval_predictions.json").keys()
    changed = {change["id"] for change in read(out, "repaired_answers.json")}
    assert len(held_out) == 4 and not held_out & changed
    assert read(out, "train_results.json")["train_samples"] == 8 - ("train-3-1" in changed)
    settings = read(out, "qa_settings.json")
    assert (settings["validation_split_percentage"], settings["seed"]) == (34, 7)
    assert settings["train_file"] == inputs["moved"]
    card = ModelCard.load(out / "README.md")
    assert {result.dataset_name for result in card.data.eval_results} == {"34% of the contexts of moved.json, held out"}

    # The trained model alone is evaluated on the same questions, and the report finds them.
    metrics = printed_scores(capsys)
    argv = ["--model_name_or_path", str(out), "--output_dir", str(out), *QUICK, "--train_file", inputs["moved"], *more]
    run_squad.main(argv)
    assert printed_scores(capsys) == metrics and read(out, "eval_predictions.json").keys() == held_out
    report.main([str(out)])
    assert all(id_ in (out / "report.html").read_text(encoding="utf-8") for id_ in held_out)


def test_validation_split_beside_validation_questions_has_no_effect(inputs, tmp_path, capsys):
    more = ["--do_eval", "--validation_split_percentage", "50", "--validation_file", inputs["dev"]]
    run_squad.main(command(inputs, tmp_path, "train_v2", "--max_steps", "1", *more))
    said = capsys.readouterr().err
    assert "--validation_split_percentage 50 has no effect: there are validation questions." in said
    assert len(read(tmp_path, "eval_predictions.json")) == 6
    assert read(tmp_path, "qa_settings.json")["validation_split_percentage"] is None
    assert "8 of 16 train questions have no answer, but --version_2_with_negative is not given" in said


def test_validation_split_that_cannot_be(inputs, tmp_path, capsys):
    for percentage in ("0", "100"):
        line = refusal(capsys, command(inputs, tmp_path, "train", "--validation_split_percentage", percentage))
        assert f"--validation_split_percentage is {percentage}, must be from 1 to 99" in line
    argv = ["--model_name_or_path", inputs["bert"], "--output_dir", str(tmp_path), "--do_eval"]
    assert "no validation questions: no data are given" in refusal(capsys, argv)
    assert "no validation questions" in refusal(capsys, [*argv, "--validation_split_percentage", "10"])
