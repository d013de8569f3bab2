"""The check over versions, in the one that is installed: nothing is installed here."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import check_versions  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    check_versions.save_models(folder)
    return folder


def test_a_line_for_each_version_and_1_if_one_fails(monkeypatch, capsys):
    """This environment stands in for all others."""
    monkeypatch.setattr(check_versions, "environment_python", lambda environments, version: sys.executable)
    installed = transformers.__version__
    assert check_versions.main(["--versions", installed]) == 0
    report = {"transformers": installed, "failures": [], "difference": 0.0, "pipelines": []}
    monkeypatch.setattr(check_versions, "run_check", lambda python, folder: copy.deepcopy(report))
    assert check_versions.main(["--versions", "5.0.0", installed]) == 1
    ok, other, ok_again = capsys.readouterr().out.splitlines()
    assert " ".join(ok.split()).startswith(f"{installed} ok with trust_remote_code, logits differ by ")
    assert other == f"5.0.0    FAILED  the environment has transformers {installed}"
    assert ok_again.split()[:2] == [installed, "ok"]


def test_what_is_wrong_with_the_code_is_found(saved, tmp_path):
    """Each fault in a copy of one model, all checked by one process."""
    name = "relative_key_query as Google names weights"
    faults = (
        ("from torch import nn\n", "import transformers.no_such_module\n", "eager: ModuleNotFoundError: No"),
        ("(rows.flip(0)", "(rows", "sdpa: AssertionError: loaded: start_logits is off by"),
        ("requires_grad_(False)", "requires_grad_(True)", "the parameters without gradient are []"),
        ('kwargs.setdefault("save_original_format", False)', "pass", "saves weights under other names: ['bert"),
        ("(GradientCheckpointingLayer)", "(nn.Module)", "not compatible with gradient checkpointing"),
        ("                hidden_states.append(hidden)", "                pass", "hidden states have shapes"),
        (
            "return start_logit + end_logit",
            "return start_logit - end_logit",
            "sdpa: AssertionError: the pipeline answers",
        ),
    )
    for number, (code, broken, _) in enumerate(faults):
        folder = shutil.copytree(saved / name, tmp_path / f"fault_{number}")
        (file,) = [file for file in folder.glob("*.py") if code in file.read_text()]
        file.write_text(file.read_text().replace(code, broken))
    failures = check_versions.run_check(sys.executable, tmp_path)["failures"]
    for number, (_, _, failure) in enumerate(faults):
        assert any(each.startswith(f"fault_{number}") and failure in each for each in failures), failures


def test_absolute_positions_would_show(saved):
    """What transformers makes of the weights without the code beside them is far off."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(saved / "relative_key")
    logits = check_versions.results(model)["start_logits"]
    assert (logits - load_file(saved / "relative_key" / "expected.safetensors")["start_logits"]).std() > 0.3


def test_compare():
    expected = {"loss": torch.tensor(1.0), "gradient of a": torch.ones(4)}
    check_versions.compare(expected, expected, "loaded")
    for changed, message in (
        ({"loss": torch.tensor(1.001)}, "loaded: loss is off by 1.0e-03, and 1.1e-04 is allowed"),
        ({"loss": torch.tensor(float("nan"))}, "loss is off by nan"),
        ({"gradient of b": torch.ones(4)}, "gradient of b'. are on one side only"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_versions.compare(expected | changed, expected, "loaded")
