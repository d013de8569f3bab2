"""scripts/export_onnx.py: files that answer as the model does, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert, tiny_questions
from transformers import AutoTokenizer, BertModel, DistilBertConfig, DistilBertForQuestionAnswering

from scripts import export_onnx

WINDOWS = "--max_seq_length 32 --doc_stride 8".split()


def distilbert(folder: Path) -> str:
    """A model that takes no token types, with a tokenizer that gives them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(folder))
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertForQuestionAnswering(config).save_pretrained(folder)
    return str(folder)


def relative_bert(folder: Path) -> str:
    return tiny_bert(folder, "relative_key_query")


@pytest.mark.parametrize("make_model", [relative_bert, pytest.param(distilbert, marks=pytest.mark.slow)])
def test_files_answer_as_the_model_does(make_model, tmp_path, capsys):
    for package in export_onnx.PACKAGES:
        pytest.importorskip(package)
    model = make_model(tmp_path / "model")
    questions = ["--validation_file", tiny_questions(tmp_path / "dev.json")]
    file, int8_file = f"{tmp_path}/new/dev.onnx", f"{tmp_path}/new/dev_int8.onnx"
    export_onnx.main([model, *WINDOWS, "--output", file, "--int8", *questions])
    size, int8_size, *scores = capsys.readouterr().out.splitlines()

    difference = re.fullmatch(rf"{file}: 0\.\d MB, logits differ from the model's by at most (\S+)", size)[1]
    int8_difference = re.fullmatch(rf"{int8_file}: 0\.\d MB, logits .* by at most (\S+)", int8_size)[1]
    assert float(difference) < 1e-5 < float(int8_difference) < 0.1
    patterns = [rf"{name}: f1 (\d+\.\d\d), \d+\.\d windows a second" for name in (model, file, int8_file)]
    f1s = [re.fullmatch(pattern, line)[1] for pattern, line in zip(patterns, scores, strict=True)]
    assert f1s[0] == f1s[1]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["dev.onnx", "dev_int8.onnx"]


def test_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    def refusal(*argv: str) -> str:
        with pytest.raises(SystemExit) as status:
            export_onnx.main([*WINDOWS, *argv])
        out, err = capsys.readouterr()
        assert (status.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("export_onnx.py: error: ")
        return err

    monkeypatch.setattr(export_onnx, "PACKAGES", ("json", "no_such_package"))
    assert "not installed: no_such_package; install with: python -m pip install no_such_package" in refusal("model")
    monkeypatch.setattr(export_onnx, "PACKAGES", ())
    model = tiny_bert(tmp_path / "model")
    assert "--max_seq_length is -5, must be at least 1" in refusal(model, "--max_seq_length", "-5")
    for name in ("model.onnx", "dev_int8.onnx"):
        Path(model, name).write_text("theirs")
    assert "model.onnx exists: replace it with --overwrite" in refusal(model)
    assert "dev_int8.onnx exists" in refusal(model, "--output", f"{model}/dev.onnx", "--int8")

    monkeypatch.setattr(export_onnx, "write_onnx", lambda model, batch, file: file.write_text(""))
    monkeypatch.setattr(export_onnx, "run_of_file", lambda file: lambda batch: torch.full((2, 1, 1), torch.nan))
    assert "model.onnx: its logits would differ from the model's by nan" in refusal(model, "--overwrite")
    assert Path(model, "model.onnx").read_text() == "theirs" and len(list(Path(model).glob("*onnx*"))) == 2
    BertModel.from_pretrained(model).save_pretrained(tmp_path / "no_head")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "no_head")
    assert "lacks qa_outputs" in refusal(f"{tmp_path}/no_head")
