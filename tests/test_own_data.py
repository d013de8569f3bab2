"""The whole program on data of one's own: answers that moved, contexts held out, flags that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_report import report
from test_run_squad import QUICK, read, refusal
from tiny import tiny_bert, tiny_questions

import run_squad
from qa.read_squad import read_squad_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    moved = json.loads(Path(tiny_questions(folder / "train.json", paragraphs=6)).read_text())
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


def run(capsys, argv: list[str]) -> tuple[dict | None, str]:
    """Runs the program; returns the metrics that it prints, if any, and what it says."""
    capsys.readouterr()
    run_squad.main(argv)
    out, err = capsys.readouterr()
    return json.loads(
        out[out.rindex("\n{\n") + 1 :] if "\n{\n" in out else out or "null"
    ) if '"exact"' in out else None, err


def command(inputs, out: Path, train: str, *more: str) -> list[str]:
    argv = ["--model_name_or_path", inputs["bert"], "--output_dir", str(out), *QUICK]
    return [*argv, "--do_train", "--train_file", inputs[train], *more]


def test_repaired_answers_are_listed(inputs, tmp_path, capsys):
    _, said = run(capsys, command(inputs, tmp_path / "out", "moved"))
    assert "2 of 12 questions have an answer that does not stand at its answer_start" in said
    assert "1 of 12 questions are left out of training" in said
    changes = read(tmp_path / "out", "repaired_answers.json")
    assert [change["id"] for change in changes] == ["train-1-0", "train-2-0", "train-3-1"]
    contexts = {row["id"]: row["context"] for row in read_squad_file(inputs["moved"], tmp_path / "cache")}
    for change in changes[:2]:
        assert contexts[change["id"]][change["repaired_start"] : change["repaired_end"]] == change["text"]
    assert changes[2]["repaired_start"] is None and changes[2]["text"] == "nowhere"
    assert read(tmp_path / "out", "train_results.json")["train_samples"] == 11

    # Of a run without repairs there is no such file, and of another's none is overwritten.
    run_squad.main(command(inputs, tmp_path / "out", "train", "--overwrite_output_dir"))
    assert not (tmp_path / "out" / "repaired_answers.json").exists()


def test_a_list_of_another_run_is_not_overwritten(inputs, tmp_path, capsys):
    (tmp_path / "repaired_answers.json").write_text("[]")
    line = refusal(capsys, *command(inputs, tmp_path, "moved"))
    assert "holds repaired_answers.json of something else" in line
    assert (tmp_path / "repaired_answers.json").read_text() == "[]"


def test_drop_and_refuse(inputs, tmp_path, capsys):
    run_squad.main(command(inputs, tmp_path / "out", "moved", "--misplaced_answers", "drop"))
    assert read(tmp_path / "out", "train_results.json")["train_samples"] == 9
    assert [c["repaired_start"] for c in read(tmp_path / "out", "repaired_answers.json")] == [None] * 3
    line = refusal(capsys, *command(inputs, tmp_path / "no", "moved", "--misplaced_answers", "refuse"))
    assert "3 of 12 questions have an answer whose text does not stand at its answer_start" in line
    assert "train-1-0, train-2-0, train-3-1" in line and not (tmp_path / "no").exists()
    assert "invalid choice" in refusal(capsys, *command(inputs, tmp_path, "moved", "--misplaced_answers", "x"))


def test_an_unfinished_run_goes_on_with_the_same_answers_only(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    argv = command(inputs, out, "moved", "--save_steps", "1")
    run_squad.main(argv)
    state = read(out, "run_state.json")
    (out / "run_state.json").write_text(json.dumps({**state, "status": "training"}))
    shutil.rmtree(out / "checkpoint-3")
    line = refusal(capsys, *argv, "--misplaced_answers", "drop")
    assert "belongs to another run" in line and "training data" in line
    run_squad.main(argv)


# ---- Held out ----


def test_validation_split(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--do_eval", "--validation_split_percentage", "34", "--seed", "7"]
    metrics, said = run(capsys, command(inputs, out, "moved", *more))
    assert metrics["total"] == 4
    assert "2 contexts with 4 questions are held out to evaluate on, 4 with 8 left to train on" in said
    held_out = read(out, "eval_predictions.json").keys()
    changed = {change["id"] for change in read(out, "repaired_answers.json")}
    assert len(held_out) == 4 and not held_out & changed
    assert read(out, "train_results.json")["train_samples"] == 8 - ("train-3-1" in changed)
    settings = read(out, "qa_settings.json")
    assert (settings["validation_split_percentage"], settings["seed"], settings["train_file"]) == (
        34,
        7,
        inputs["moved"],
    )
    card = ModelCard.load(out / "README.md")
    assert {result.dataset_name for result in card.data.eval_results} == {"34% of the contexts of moved.json, held out"}

    # The trained model alone is evaluated on the same questions, and the report finds them.
    argv = ["--model_name_or_path", str(out), "--output_dir", str(out), *QUICK, "--train_file", inputs["moved"], *more]
    assert run(capsys, argv)[0] == metrics and read(out, "eval_predictions.json").keys() == held_out
    reported = report.read_run(report.make_parser().parse_args([str(out)]))
    assert {question.id for question in reported.questions} == held_out
    assert reported.metrics["f1"] == pytest.approx(metrics["f1"])
    report.main([str(out)])
    assert (out / "report.html").exists()


def test_validation_split_beside_validation_questions(inputs, tmp_path, capsys):
    more = ["--do_eval", "--validation_split_percentage", "50", "--validation_file", inputs["dev"]]
    metrics, said = run(capsys, command(inputs, tmp_path / "out", "train", *more))
    assert metrics["total"] == 6
    assert "--validation_split_percentage 50 has no effect: there are validation questions." in said
    assert read(tmp_path / "out", "train_results.json")["train_samples"] == 12
    assert "validation_split_percentage" not in read(tmp_path / "out", "qa_settings.json")


@pytest.mark.parametrize("percentage", ["0", "100", "-5"])
def test_validation_split_out_of_range(percentage, inputs, tmp_path, capsys):
    line = refusal(capsys, *command(inputs, tmp_path, "train", "--validation_split_percentage", percentage))
    assert f"--validation_split_percentage is {percentage}, must be from 1 to 99" in line


def test_nothing_to_evaluate(inputs, tmp_path, capsys):
    argv = ["--model_name_or_path", inputs["bert"], "--output_dir", str(tmp_path), "--do_eval"]
    assert "--train_file with --validation_split_percentage" in refusal(capsys, *argv)
    assert "--do_eval needs data" in refusal(capsys, *argv, "--validation_split_percentage", "10")
    assert "--do_eval needs data" in refusal(capsys, *argv, "--train_file", inputs["train"])


# ---- Flags ----


@pytest.mark.parametrize(
    ("train", "flags", "says"),
    [
        ("train_v2", [], ["8 of 16 train questions have no answer, but --version_2_with_negative is not given"]),
        ("train", ["--version_2_with_negative"], ["but each of 12 train questions has an answer"]),
        ("train", [], []),
        ("train_v2", ["--version_2_with_negative"], []),
    ],
)
def test_flags_that_do_not_fit(train, flags, says, inputs, tmp_path, capsys):
    _, said = run(capsys, command(inputs, tmp_path, train, "--max_steps", "1", *flags))
    warned = [line for line in said.splitlines() if "version_2_with_negative" in line]
    assert len(warned) == len(says) and all(line in warned[0] for line in says)
