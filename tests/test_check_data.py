"""scripts/check_data.py: what training would see, on the screen and for programs, and nothing written."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_run_squad import QUICK, read
from tiny import tiny_bert, tiny_questions

import run_squad

ROOT = Path(run_squad.__file__).parent
spec = importlib.util.spec_from_file_location("check_data", ROOT / "scripts" / "check_data.py")
check_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_data)

LONG = " ".join(["anna lives in rome and goes to the market every day"] * 60)  # 660 tokens
FLAGS = ["--max_seq_length", "60", "--doc_stride", "16"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_questions(folder / "dev.json", paragraphs=3)
    articles = json.loads(Path(tiny_questions(folder / "train.json", paragraphs=8)).read_text())["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    questions = [question for paragraph in paragraphs for question in paragraph["qas"]]
    questions[0]["answers"][0]["answer_start"] += 5
    questions[2]["answers"][0]["answer_start"] = "-1"
    questions[3]["answers"][0]["text"] = "london"
    questions[4]["answers"] = ["vienna", "lisbon"]  # two golds, of which the first is nowhere
    del questions[6]["id"], questions[7]["id"]
    questions[8]["answers"] = []
    questions[9]["question"] = "who " * 70
    answers = {"long": LONG[:1500].rsplit(" ", 1)[0], "longish": LONG[:200].rsplit(" ", 1)[0], "short": "anna"}
    gold = {id_: [{"text": text, "answer_start": 0}] for id_, text in answers.items()}
    qas = [{"id": id_, "question": "where ?", "answers": answers} for id_, answers in gold.items()]
    paragraphs.append({"context": LONG, "qas": qas})
    (folder / "own.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, paragraphs)).encode()))
    tiny_bert(folder / "bert", max_positions=512)
    return folder


def facts(capsys, *argv) -> list[dict]:
    capsys.readouterr()
    check_data.main([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_with_every_fault(inputs, capsys):
    argv = [inputs / "own.jsonl.gz", "--model_name_or_path", inputs / "bert", "--validation_file", inputs / "dev.json"]
    (found,) = facts(capsys, *argv, "--max_seq_length", 128, "--doc_stride", 32)
    assert found["layout"] == "gzipped JSON lines, paragraphs"
    assert (found["questions"], found["contexts"], found["without_answer"]) == (19, 9, 1)
    assert found["without_id"] == {"count": 2, "first_ids": ["row 3.qas[0]", "row 3.qas[1]"]}
    assert "1 of 19 train questions have no answer" in found["flag_warning"]
    assert found["answers"] == {
        "repaired": {"count": 2, "first_ids": ["train-0-0", "train-1-0"]},
        "left_out": {"count": 2, "first_ids": ["train-1-1", "train-2-0"]},
    }
    assert found["context_tokens"]["max"] == 660 and found["question_tokens"]["max"] == 70
    assert [row[2] for row in found["context_tokens"]["histogram"]] == [8, 0, 0, 0, 0, 1]
    lines = [
        "2 of 16 (12.5%) answers are longer than --max_answer_length 30 and can never be given",
        "1 of 16 (6.2%) answers lie in no window as a whole and can never be given",
        "1 of 9 (11.1%) contexts are longer than one window",
        "1 of 17 (5.9%) questions are cut at --max_query_length 64",
    ]
    assert found["limits"] == {"lines": lines, "too_long": 2, "not_held": 1, "long_contexts": 1, "cut_questions": 1}
    assert found["doubled"] == {
        "questions": {"count": 6, "first_ids": [f"train-{p}-{q}" for p in range(3) for q in range(2)][:5]},
        "contexts": 3,
        "ids": {"count": 0, "first_ids": []},
    }
    check_data.main([*map(str, argv), "--max_seq_length", "128", "--doc_stride", "32"])
    screen = capsys.readouterr().out
    for line in (
        "19 questions on 9 contexts",
        "! 2 answers were not at their answer_start and are repaired: train-0-0, train-1-0",
        "! 2 answers are nowhere, or cannot be told apart: left out: train-1-1, train-2-0",
        *(f"  ! {line}\n" for line in lines),
        "! 3 contexts stand in",
    ):
        assert line in screen
    assert re.search(r"16-31 █{40} 8\n", screen) and re.search(r"512-1023 █{5} 1\n", screen)


def test_a_file_without_a_fault(inputs, capsys):
    (found,) = facts(capsys, inputs / "train.json", "--model_name_or_path", inputs / "bert")
    assert found["layout"] == "JSON, articles" and found["flag_warning"] is None and "doubled" not in found
    check_data.main([str(inputs / "train.json"), "--model_name_or_path", str(inputs / "bert")])
    assert "!" not in capsys.readouterr().out


def test_it_is_what_training_sees(inputs, tmp_path, capsys):
    """The same windows, the same questions left out."""
    model = ["--model_name_or_path", str(inputs / "bert")]
    quick = [*QUICK, "--max_steps", "1", "--max_query_length", "16"]
    file = inputs / "own.jsonl.gz"
    (found,) = facts(capsys, file, *model, *quick[:4], "--max_query_length", 16)
    run_squad.main([*model, *quick, "--do_train", "--train_file", str(file), "--output_dir", str(tmp_path)])
    assert read(tmp_path, "train_results.json")["train_samples"] == found["windows"]["count"]
    changes = read(tmp_path, "repaired_answers.json")
    left_out = [change["id"] for change in changes if change["repaired_start"] is None]
    assert found["answers"]["left_out"]["first_ids"] == left_out


def test_files_without_answers_or_without_a_good_one(inputs, tmp_path, capsys):
    test = tiny_questions(tmp_path / "test.json", answers=False)
    rows = [{"context": "anna lives", "question": "who ?", "answers": ["ben"]}]
    (tmp_path / "bad\033[31m.json").write_text(json.dumps(rows))
    model = ["--model_name_or_path", inputs / "bert", *FLAGS]
    first, second = facts(capsys, test, tmp_path / "bad\033[31m.json", *model)
    assert first["answers"] is first["limits"] is None and first["windows"]["count"] > 0
    assert second["answers"]["left_out"]["count"] == 1 and second["windows"]["count"] == 0 and second["limits"] is None
    check_data.main([str(tmp_path / "bad\033[31m.json"), test, *map(str, model)])
    assert "\033" not in capsys.readouterr().out


def test_nothing_is_written(inputs, tmp_path):
    home = tmp_path / "home"
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, ROOT / "scripts" / "check_data.py", inputs / "own.jsonl.gz", *FLAGS]
    command += [
        "--model_name_or_path",
        inputs / "bert",
        "--validation_file",
        inputs / "dev.json",
        "--version_2_with_negative",
    ]
    before = sorted(inputs.rglob("*"))
    environment = {**os.environ, "HF_HOME": str(home), "HOME": str(home), "TMPDIR": str(tmp_path / "tmp")}
    command += ["--max_query_length", "16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "19 questions on 9 contexts" in done.stdout, done.stderr
    assert done.stderr == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert sorted(inputs.rglob("*")) == before


def test_each_error_is_one_line(inputs, tmp_path, capsys):
    def refusal(*argv) -> str:
        with pytest.raises(SystemExit) as status:
            check_data.main([*map(str, argv)])
        out, err = capsys.readouterr()
        assert (status.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("check_data.py: error: ")
        return err

    model = ["--model_name_or_path", inputs / "bert"]
    assert "none.json: cannot be read" in refusal(tmp_path / "none.json", *model)
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b'{"data": []}')[:-4])
    assert "its gzip data breaks off" in refusal(tmp_path / "broken.gz", *model)
    assert "--doc_stride 300 would leave tokens" in refusal(
        inputs / "dev.json", *model, "--doc_stride", 300, *FLAGS[:2]
    )
    assert "--max_answer_length is 0" in refusal(inputs / "dev.json", *model, "--max_answer_length", 0)
    assert "required: --model_name_or_path" in refusal(inputs / "dev.json")
    assert "nowhere" in refusal(inputs / "dev.json", "--model_name_or_path", tmp_path / "nowhere")
