"""scripts/ask.py: the same answers as the evaluation's, however text and questions come in, and its screen output."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import read, tiny_bert, tiny_questions, with_own_code
from transformers import BertConfig, BertForQuestionAnswering

import run_squad
from qa.files import QAError
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from scripts import ask

ROOT = Path(run_squad.__file__).parent
WINDOWS = "--max_seq_length 24 --doc_stride 8 --n_best_size 7 --max_answer_length 5".split()
TEXT = "anna lives in paris and works as a baker .\r\nben lives in rome , every day ben goes to market by bus ."
QUESTIONS = ["who lives in rome ?", "where does anna live ?"]
MODELS = {"absolute": BertForQuestionAnswering, "relative_key_query": RelativeBertForQuestionAnswering}
KEYS = ["answer", "probability", "start", "end", "n_best"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A BERT of each position type, untrained, with weights so large that position type and question change answers."""
    models = {}
    for position_type, model_class in MODELS.items():
        models[position_type] = tiny_bert(tmp_path_factory.mktemp(position_type), position_type, seed=1)
        model = model_class.from_pretrained(models[position_type])
        for name, weight in model.named_parameters():
            if "LayerNorm" not in name:
                weight.data *= 20 if "attention" in name else 4
        model.save_pretrained(models[position_type])
    return models


@pytest.fixture
def model(models):
    return models["relative_key_query"]


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return str(file)


def ask_json(capsys, *argv: str) -> list[dict]:
    capsys.readouterr()
    ask.main([*argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def give_stdin(monkeypatch, content: str | bytes) -> None:
    content = content.encode() if isinstance(content, str) else content
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_a_model_of_one_token_type_is_asked_without(models, tmp_path, text_file, capsys):
    folder = shutil.copytree(models["absolute"], tmp_path / "one_type")
    BertForQuestionAnswering(BertConfig.from_pretrained(folder, type_vocab_size=1)).save_pretrained(folder)
    (answer,) = ask_json(capsys, str(folder), "--context_file", text_file, "--question", QUESTIONS[0], *WINDOWS)
    assert answer["answer"] in " ".join(TEXT.split())


@pytest.mark.parametrize("position_type, version_2", [("absolute", False), ("relative_key_query", True)])
def test_answers_are_those_of_the_evaluation(position_type, version_2, models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(models[position_type], folder)
    file = tiny_questions(tmp_path / "dev.json", paragraphs=3, version_2=version_2)
    evaluation = ["--model_name_or_path", str(folder), "--output_dir", str(folder), "--do_eval", "--use_cpu"]
    evaluation += ["--validation_file", file, *WINDOWS]
    if version_2:
        run_squad.main([*evaluation, "--version_2_with_negative"])
        odds = json.loads((folder / "eval_null_odds.json").read_text()).values()
        evaluation += ["--version_2_with_negative", "--null_score_diff_threshold", str(sorted(odds)[3] - 0.001)]
    run_squad.main(evaluation)
    expected = json.loads((folder / "eval_nbest_predictions.json").read_text())
    answers = json.loads((folder / "eval_predictions.json").read_text())
    if version_2:
        assert 0 < list(answers.values()).count("") < len(answers), "the test needs questions with and without answer"

    for article in json.loads(Path(file).read_text())["data"]:
        (paragraph,) = article["paragraphs"]
        text = tmp_path / "text.txt"
        text.write_text(paragraph["context"])
        for qa in paragraph["qas"]:
            (got,) = ask_json(capsys, str(folder), "--context_file", str(text), "--question", qa["question"])
            assert list(got) == KEYS and got["answer"] == answers[qa["id"]]
            assert got["n_best"] == [pytest.approx(entry, abs=1e-4) for entry in expected[qa["id"]]]
            same = [c for c in expected[qa["id"]] if (c["start"], c["end"]) == (got["start"], got["end"])]
            assert got["probability"] == pytest.approx(sum(c["probability"] for c in same), abs=1e-5)


def test_settings_of_a_checkpoint_are_those_of_its_run_unless_given(models, tmp_path, text_file, capsys):
    shutil.copytree(models["absolute"], tmp_path / "run" / "checkpoint-10")
    settings = {"max_seq_length": 24, "doc_stride": 8, "n_best_size": 3, "version_2_with_negative": True, "seed": 1}
    (tmp_path / "run" / "qa_settings.json").write_text(json.dumps(settings))
    argv = [str(tmp_path / "run" / "checkpoint-10"), "--context_file", text_file, "--question", QUESTIONS[0]]
    (got,) = ask_json(capsys, *argv)
    assert None in [candidate["start"] for candidate in got["n_best"]]
    (got,) = ask_json(capsys, *argv, "--no-version_2_with_negative", "--n_best_size", "9")
    assert len(got["n_best"]) == 9 and None not in [c["start"] for c in got["n_best"]]


def test_text_and_questions_come_from_a_file_flags_or_standard_input(model, text_file, monkeypatch, capsys):
    from_file = [model, "--context_file", text_file, *WINDOWS]
    expected = [ask_json(capsys, *from_file, "--question", question)[0] for question in QUESTIONS]
    assert expected[0] != expected[1] and TEXT[expected[0]["start"] : expected[0]["end"]] == expected[0]["answer"]
    give_stdin(monkeypatch, f"{QUESTIONS[0]}\n\n  {QUESTIONS[1]}")
    assert ask_json(capsys, *from_file) == expected
    give_stdin(monkeypatch, TEXT)
    assert ask_json(capsys, model, *WINDOWS, "--question", QUESTIONS[0]) == expected[:1]


def test_text_from_standard_input_and_questions_from_the_terminal(model):
    terminal, childs_terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "scripts" / "ask.py"), model, *WINDOWS, "--json"]
    # A new session whose controlling terminal, /dev/tty, is the one that it opens first.
    name = os.ttyname(childs_terminal)
    start = f"import os, sys; os.setsid(); os.open({name!r}, os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(terminal, b"who lives in rome ?\nwhere does anna live ?\n\x04")
    out, err = process.communicate(TEXT, timeout=300)
    os.close(terminal)
    os.close(childs_terminal)
    assert process.returncode == 0, err
    assert [list(json.loads(line)) for line in out.splitlines()] == [KEYS] * 2
    assert "Question" in err and "Traceback" not in err


def test_a_long_text_is_kept_in_no_file(model, tmp_path, monkeypatch, capsys):
    """Windows would not remove one that is mapped into memory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", None)
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 40)
    (got,) = ask_json(capsys, model, "--context_file", str(text), "--question", QUESTIONS[0], *WINDOWS)
    assert text.read_bytes().decode()[got["start"] : got["end"]] == got["answer"]
    assert not (tmp_path / "cache").exists()


def test_a_model_with_code_of_its_own_or_without_architectures(models, tmp_path, text_file, capsys):
    argv = ["--context_file", text_file, "--question", QUESTIONS[0], *WINDOWS]
    expected = ask_json(capsys, models["absolute"], *argv)
    shutil.copytree(models["absolute"], tmp_path / "own")
    config = read(tmp_path, "own", "config.json")
    del config["architectures"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    assert ask_json(capsys, str(tmp_path / "own"), *argv) == expected
    folder = with_own_code(tmp_path / "own")
    assert ask_json(capsys, folder, *argv, "--trust_remote_code") == expected
    with pytest.raises(SystemExit):
        ask.main([folder, *argv])
    assert "contains custom code" in capsys.readouterr().err


def test_a_cuda_build_of_torch_without_a_gpu_is_a_cpu(models, monkeypatch):
    """There torch names cuda as the accelerator that it was built for, whether or not there is one."""

    def built_for_cuda(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    for position_type, model_class in MODELS.items():
        loaded, tokenizer = ask.load(models[position_type])
        assert type(loaded) is model_class and not loaded.training and tokenizer.is_fast
        assert loaded.device.type == "cpu"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_each_console_shows_what_it_has_letters_for(flags, model, tmp_path, monkeypatch):
    context = "Łódź\u2028\x9b…"  # with what could end a line of JSON, and with the terminal's CSI
    (tmp_path / "text.txt").write_text(context, encoding="utf-8")

    def printed(encoding: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
            ask.main([model, "--context_file", str(tmp_path / "text.txt"), "--question", "where ?", *WINDOWS, *flags])
            return sys.stdout.buffer.getvalue().decode(encoding)

    everything = printed("utf-8")
    assert "Łódź" in everything and "…" in everything and "\x9b" not in everything
    if flags:
        (line,) = everything.splitlines()
        assert context in [candidate["text"] for candidate in json.loads(line)["n_best"]]
    for encoding in ("cp1252", "ascii"):
        lacking = printed(encoding)
        if flags:  # JSON is UTF-8, of which ASCII is a part
            assert lacking.isascii() and json.loads(lacking) == json.loads(everything)
        else:
            assert lacking == everything.encode(encoding, "backslashreplace").decode(encoding)


# ---- Errors ----


def test_each_error_is_one_line(model, models, text_file, tmp_path, monkeypatch, capsys):
    absolute = models["absolute"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("Café".encode("latin-1"))
    shutil.copytree(models["absolute"], tmp_path / "no_head")
    BertForQuestionAnswering.from_pretrained(models["absolute"]).bert.save_pretrained(tmp_path / "no_head")
    for name, content in (("not_json", "{"), ("list", "[1]")):
        shutil.copytree(models["absolute"], tmp_path / name)
        (tmp_path / name / "qa_settings.json").write_text(content)
    question = ["--question", "who ?"]
    text = ["--context_file", text_file]
    for argv, message in [
        ([], "the following arguments are required: MODEL_DIR"),
        ([model, *text, *question, "--jsn"], "unrecognized arguments: --jsn"),
        ([str(tmp_path / "none"), *text, *question], "there is no such folder"),
        ([str(tmp_path / "no_head"), *text, *question], "no_head lacks qa_outputs.bias, qa_outputs.weight: it was"),
        ([model, "--context_file", str(tmp_path / "none.txt"), *question], "none.txt: cannot be read: No such file"),
        ([model, "--context_file", str(tmp_path / "empty.txt"), *question], "empty.txt: holds no text"),
        ([model, "--context_file", str(tmp_path / "latin1.txt"), *question], "latin1.txt: byte 3: not UTF-8 text"),
        ([model, *text, "--question", " "], "the question is empty"),
        ([model, *text, "--question", "\udcff?"], "codec can't encode character"),
        ([absolute, *text, *question], "--max_seq_length is 384, but the model has positions for 64"),
        ([absolute, *text, *question], "relative positions (position_embedding_type relative_key"),
        ([model, *text, *question, "--max_seq_length", "24", "--doc_stride", "24"], "--doc_stride 24 would leave"),
        ([model, *text, *question, *WINDOWS, "--n_best_size", "0"], "--n_best_size is 0"),
        ([str(tmp_path / "not_json"), *text, *question], "qa_settings.json: is not a JSON object"),
        ([str(tmp_path / "list"), *text, *question], "qa_settings.json: is not a JSON object"),
        ([model, *text, *question, "--n_best_size", "x"], "--n_best_size: invalid int value: 'x'"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_status:
            ask.main(argv)
        out, err = capsys.readouterr()
        assert (exit_status.value.code, out) == (2, "")
        assert err.startswith("ask.py: error: ") and err.count("\n") == 1
        assert message in err

    def no_terminal(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("builtins.open", no_terminal)
    with pytest.raises(QAError, match="cannot both be on standard input: give --context_file or --question"):
        next(ask.read_questions(stdin_is_read=True))


# ---- Display ----


@pytest.mark.parametrize(
    "context, answer, before, after",
    [
        ("One. Two [three] four. Five.", "three", "Two ", " four."),
        ("[One] two.", "One", "", " two."),
        ("He met Mrs. Best and J. F. [Kennedy]! Then he left.", "Kennedy", "He met Mrs. Best and J. F. ", "!"),
        ('She said: "[No.]" He left.', "No.", 'She said: "', '"'),
        ("All in [1. 2. 3] here. End.", "1. 2. 3", "All in ", " here."),
        ("A title\n\nThe [text] goes on", "text", "The ", " goes on"),
        ("これは本です。[猫]がいる。そう。", "猫", "", "がいる。"),
        (f"x{' y' * 400} [z]{' y' * 400}", "z", f"…{(' y' * 400 + ' ')[-300:].lstrip()}", f"{' y' * 150}…"),
    ],
)
def test_sentence_around(context, answer, before, after):
    start = context.index("[")
    context = context.replace("[", "").replace("]", "")
    assert context[start : start + len(answer)] == answer
    assert ask.sentence_around(context, start, start + len(answer)) == (before, after)


@given(st.text(alphabet='aB. !\n\u3002"', max_size=40), st.integers(0, 40), st.integers(1, 40))
def test_sentence_is_a_part_of_the_text(context, start, length):
    end = min(start + length, len(context))
    if start < end:
        before, after = ask.sentence_around(context, start, end)
        assert context[:start].endswith(before) and context[end:].startswith(after)


def test_show():
    context = "Ivan was a cook. Clara worked\nas a singer."
    candidates = [("singer", 0.5, 35, 41), ("cook", 0.2, 11, 15), ("", 0.15, None, None), ("cook", 0.1, 11, 15)]
    n_best = [{"text": t, "probability": p, "start": s, "end": e} for t, p, s, e in candidates]
    answer = {"answer": "singer", "probability": 0.5, "start": 35, "end": 41, "n_best": n_best}
    assert ask.show(answer, context, in_color=False).splitlines() == [
        "singer  (probability 0.50)",
        "    Clara worked as a [singer].",
        "  Runners-up:",
        "    0.30  cook",
        "    0.15  no answer",
    ]
    assert "a \033[1;7msinger\033[0m." in ask.show(answer, context, in_color=True)
    no_answer = {"answer": "", "probability": 0.15, "start": None, "end": None, "n_best": n_best}
    assert ask.show(no_answer, context, in_color=False).splitlines() == [
        "no answer  (probability 0.15)",
        "  Runners-up:",
        "    0.50  singer",
        "    0.30  cook",
    ]


def test_a_long_runner_up_is_cut():
    n_best = [{"text": text, "probability": 0.5, "start": 0, "end": 2} for text in ("no", "very " * 40 + "long")]
    answer = {"answer": "no", "probability": 0.5, "start": 0, "end": 2, "n_best": n_best}
    assert ask.show(answer, "no", in_color=False).splitlines()[-1] == "    0.50  " + "very " * 15 + "very "


def test_a_text_cannot_command_the_terminal():
    text = "\033[2J\x07\u202e evil"
    answer = {"answer": text, "probability": 1.0, "start": 0, "end": len(text), "n_best": []}
    shown = ask.show(answer, text, in_color=False)
    assert not {"\033", "\x07", "\u202e"} & set(shown) and "evil" in shown
