"""scripts/check_data.py: what training would see, on the screen and for programs, and nothing written."""

import errno
import gzip
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import pytest
from tiny import tiny_bert, tiny_questions, with_own_code

import run_squad

ROOT = Path(run_squad.__file__).parent
spec = importlib.util.spec_from_file_location("check_data", ROOT / "scripts" / "check_data.py")
check_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_data)

LONG = " ".join(["anna lives in rome and goes to the market every day"] * 60)  # 660 tokens
FLAGS = ["--max_seq_length", "128", "--doc_stride", "32"]


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


def facts(capsys, inputs, *argv) -> list[dict]:
    capsys.readouterr()
    check_data.main([*map(str, argv), "--model_name_or_path", str(inputs / "bert"), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def screen(capsys, inputs, *argv) -> str:
    capsys.readouterr()
    check_data.main([*map(str, argv), "--model_name_or_path", str(inputs / "bert")])
    return capsys.readouterr().out


def test_a_file_with_every_fault(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    before = sorted(inputs.rglob("*"))
    argv = [inputs / "own.jsonl.gz", *FLAGS, "--validation_file", inputs / "dev.json"]
    (found,) = facts(capsys, inputs, *argv)
    assert found["layout"] == "gzipped JSON lines, paragraphs"
    assert (found["questions"], found["contexts"], found["without_answer"]) == (19, 9, 1)
    assert found["without_id"]["count"] == 2
    assert "1 of 19 train questions have no answer" in found["flag_warning"]
    moved = {"farthest": 5, "start_is_0": 0}
    assert found["repaired"] == {"count": 2, "first_ids": ["train-0-0", "train-1-0"], **moved}
    assert found["left_out"] == {"count": 2, "first_ids": ["train-1-1", "train-2-0"], "farthest": 0, "start_is_0": 1}
    tokens = found["context_tokens"]
    assert tokens["max"] == tokens["99%"] == 660 > 25 > tokens["median"] and found["question_tokens"]["max"] == 70
    assert found["limits"] == [
        "3 of 17 (17.6%) questions have a context longer than one window",
        "1 of 17 (5.9%) questions are cut at --max_query_length 64",
        "2 of 16 (12.5%) answers are longer than --max_answer_length 30 and can never be given",
        "1 of 16 (6.2%) answers lie in no window as a whole and can never be given",
    ]
    asked = [f"train-{paragraph}-{question}" for paragraph in range(3) for question in range(2)]
    assert found["asked_in_validation"] == {"count": 6, "first_ids": asked[:5]}
    shown = screen(capsys, inputs, *argv)
    for line in (
        "19 questions on 9 contexts",
        f"! 2 of 19 {check_data.REPAIRED}, at most 5 characters away; first ids: train-0-0, train-1-0",
        f"! 2 of 19 {check_data.LEFT_OUT} (the answer_start of 1 is 0); first ids: train-1-1, train-2-0",
        f"! 6 of 19 {check_data.NAMED['asked_in_validation']}; first ids: {', '.join(asked[:5])}\n",
        f"context tokens: mean {tokens['mean']}, median {tokens['median']}, 90% 660, 99% 660, max 660",
        *(f"  ! {line}\n" for line in found["limits"]),
    ):
        assert line in shown
    assert not list(tmp_path.iterdir()) and sorted(inputs.rglob("*")) == before  # nothing is written


def test_a_file_without_a_fault(inputs, capsys):
    (found,) = facts(capsys, inputs, inputs / "train.json")
    assert found["layout"] == "JSON, articles" and found["flag_warning"] is None and "asked_in_validation" not in found
    assert "!" not in screen(capsys, inputs, inputs / "train.json")


def test_it_is_what_training_sees(inputs, tmp_path, capsys):
    """The same windows, the same questions left out."""
    command = ["--train_file", str(inputs / "own.jsonl.gz"), "--model_name_or_path", str(inputs / "bert"), *FLAGS]
    run_squad.main([*command, "--do_train", "--max_steps", "1", "--use_cpu", "--output_dir", str(tmp_path)])
    (found,) = facts(capsys, inputs, inputs / "own.jsonl.gz", *FLAGS)
    assert json.loads((tmp_path / "train_results.json").read_text())["train_samples"] == found["windows"]["count"]
    changes = json.loads((tmp_path / "repaired_answers.json").read_text())
    left_out = [change["id"] for change in changes if change["repaired_start"] is None]
    assert found["left_out"]["first_ids"] == left_out


def test_what_the_reader_notes(inputs, tmp_path, capsys):
    """Of two files, which are one."""
    lines = [
        {"context": "anna lives in rome", "question": "who ?", "answer": "Anna", "answer_start": 0, "id": i % 3}
        for i in range(4)
    ]
    lines += [{**lines[0], "question": ""}, {**lines[0], "id": None, "is_impossible": "true"}]
    lines += [{**lines[0], "id": "no", "answer": [], "is_impossible": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.tsv").write_text("qid\tcontext\tquestion\tanswer\tanswer_start\nb\tben lives here\twho ?\there\t0\n")
    (found,) = facts(capsys, inputs, tmp_path)
    assert (found["layout"], found["questions"]) == ("JSON lines, flat rows; TSV, flat rows", 7)
    assert {name: found[name]["count"] for name in check_data.NOTES} == dict.fromkeys(check_data.NOTES, 1)
    assert found["repaired"] == {"count": 4, "first_ids": ["0", "1", "2", "b"], "farthest": 0, "start_is_0": 4}
    shown = screen(capsys, inputs, tmp_path)
    assert (
        "  ! 1 of 7 questions are empty: left out of training, and answered in evaluation; first ids: a.jsonl: row 4"
        in shown
    )
    assert f"{check_data.REPAIRED} (the answer_start of 4 is 0); first ids: 0, 1, 2, b" in shown


def test_files_without_answers_or_without_a_good_one(inputs, tmp_path, capsys):
    to_predict, bad = tiny_questions(tmp_path / "test.json", answers=False), tmp_path / "bad\033[31m.json"
    bad.write_text(json.dumps([{"context": "anna lives", "question": "who ?", "answers": ["ben"]}]))
    first, second = facts(capsys, inputs, to_predict, bad, *FLAGS)
    assert first["repaired"] is first["left_out"] is None and first["windows"]["count"] > 0
    assert second["left_out"]["count"] == 1 and second["windows"] is second["limits"] is None
    assert "\033" not in screen(capsys, inputs, bad, to_predict, *FLAGS)


def test_a_console_without_the_letters_of_a_file(inputs, tmp_path, monkeypatch):
    file = tmp_path / "łódź.json"
    file.write_bytes((inputs / "train.json").read_bytes())
    for flags, shown in (
        (["--json"], json.dumps({"file": str(file)})[:-1]),
        ([], f"{tmp_path}/\\u0142ód\\u017a.json: JSON"),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
        check_data.main([str(file), "--model_name_or_path", str(inputs / "bert"), *flags])
        assert sys.stdout.buffer.getvalue().decode("cp1252").startswith(shown)


def test_each_error_is_one_line(inputs, tmp_path, capsys, monkeypatch):
    def unlink(path, *args, unlink=os.unlink, **how) -> None:
        """As on Windows: of a file that is mapped into memory."""
        if os.path.basename(path) in Path("/proc/self/maps").read_text():
            raise PermissionError(errno.EACCES, "The process cannot access the file", path)
        unlink(path, *args, **how)

    monkeypatch.setattr(os, "unlink", unlink)

    def refusal(*argv, model=inputs / "bert") -> str:
        with pytest.raises(SystemExit) as status:
            check_data.main([*map(str, argv), "--model_name_or_path", str(model)])
        out, err = capsys.readouterr()
        assert (status.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("check_data.py: error: ")
        return err

    assert "none.json: cannot be read" in refusal(tmp_path / "none.json")
    assert "--doc_stride 300 would leave tokens" in refusal(inputs / "dev.json", *FLAGS[:2], "--doc_stride", 300)
    assert "max_answer_length" in refusal(inputs / "dev.json", "--max_answer_length", 0)
    tiny_bert(tmp_path)
    own = with_own_code(tmp_path)
    assert "contains custom code" in refusal(inputs / "dev.json", model=own)
    check_data.main([str(inputs / "dev.json"), "--model_name_or_path", own, "--trust_remote_code"])
    assert "6 questions" in capsys.readouterr().out
    assert "nowhere" in refusal(inputs / "dev.json", model=tmp_path / "nowhere")
