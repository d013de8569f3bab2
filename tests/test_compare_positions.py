"""scripts/compare_positions.sh in small, and its table against figures by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compare_positions

ROOT = Path(__file__).parent.parent
SMALL = "--max_steps 4 --eval_steps 2 --max_train_samples 64 --max_eval_samples 10 --use_cpu".split()


def compare(*argv: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "SEEDS": "3",
        "TRAIN_PARAGRAPHS": "20",
    } | variables
    command = [str(ROOT / "scripts" / "compare_positions.sh"), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_small_comparison(tmp_path):
    out = tmp_path / "out"
    refused = compare(str(out), *SMALL, "--max_stepz", "4")
    assert refused.returncode == 2 and "(nearest: --max_steps)" in refused.stderr
    result = compare(str(out), *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert "1 seed(s), 4 steps" in lines
    for position_type in ("absolute", "relative_key", "relative_key_query"):
        run = out / "seed-3" / position_type
        f1 = json.loads((run / "eval_results.json").read_text())["eval_f1"]
        assert any(line.startswith(f"| {position_type} | {f1:.2f} | - |") for line in lines)
        assert json.loads((run / "config.json").read_text()).get("position_embedding_type", "absolute") == position_type
        assert json.loads((run / "run_state.json").read_text())["settings"]["seed"] == 3
    picture = out / "f1_over_steps.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    # The same command trains nothing again; another budget is refused.
    trained = (out / "seed-3" / "absolute" / "model.safetensors").stat().st_mtime_ns
    again = compare(str(out), *SMALL)
    assert again.returncode == 0 and again.stdout.splitlines()[-6:] == lines[-6:]
    assert (out / "seed-3" / "absolute" / "model.safetensors").stat().st_mtime_ns == trained
    # Another seed's leftovers are no part of this comparison.
    (out / "seed-4").mkdir()
    assert compare(str(out), *SMALL).stdout.splitlines()[-6:] == lines[-6:]
    refused = compare(str(out), *SMALL, "--learning_rate", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "holds a comparison with other flags" in refused.stderr


def test_matplotlib_is_asked_for_in_one_line(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    result = compare(str(tmp_path / "out"), *SMALL, PYTHONPATH=str(tmp_path))
    message = "compare_positions: error: matplotlib is missing: python -m pip install matplotlib\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
    assert not (tmp_path / "out").exists()


def write_run(folder: Path, f1: float, steps: int = 20) -> None:
    folder.mkdir(parents=True)
    (folder / "eval_results.json").write_text(json.dumps({"eval_f1": f1, "eval_exact": f1 - 10}))
    history = [{"step": 5, "loss": 1.0}, {"step": 10, "eval_f1": f1 / 2}, {"step": 20, "eval_f1": f1}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))


def test_table_and_picture(tmp_path, capsys):
    for seed, f1 in [(0, 40.0), (2, 43.0), (10, 49.0)]:
        for shift, position_type in enumerate(compare_positions.POSITION_TYPES):
            write_run(tmp_path / f"seed-{seed}" / position_type, f1 + 10 * shift, steps=20 + seed)
    compare_positions.main([str(tmp_path), "0", "2", "10"])
    # Mean (40 + 43 + 49) / 3 = 44; deviations -4, -1, 5; standard deviation sqrt((16 + 1 + 25) / 2) = 4.58.
    assert capsys.readouterr().out.splitlines()[:7] == [
        "3 seed(s), 20 to 30 steps",
        "",
        "| positions | f1 mean | f1 sd | f1 lowest | f1 highest | exact mean |",
        "|---|---|---|---|---|---|",
        "| absolute | 44.00 | 4.58 | 40.00 | 49.00 | 34.00 |",
        "| relative_key | 54.00 | 4.58 | 50.00 | 59.00 | 44.00 |",
        "| relative_key_query | 64.00 | 4.58 | 60.00 | 69.00 | 54.00 |",
    ]
    assert (tmp_path / "f1_over_steps.png").read_bytes().startswith(b"\x89PNG")
    runs = compare_positions.read_runs(tmp_path, ["0", "2", "10"])
    assert runs["absolute"][2].curve == {
        10: 24.5,
        20: 49.0,
        30: 49.0,
    }


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    def refusal() -> str:
        with pytest.raises(SystemExit) as exit_status:
            compare_positions.main([str(tmp_path), "0"])
        assert exit_status.value.code == 2
        return capsys.readouterr().err

    for position_type in ("absolute", "relative_key"):
        write_run(tmp_path / "seed-0" / position_type, 50.0)
    assert "seed-0/relative_key_query holds no finished run" in refusal()
    write_run(tmp_path / "seed-0" / "relative_key_query", 50.0, steps=30)
    assert "holds runs of 20, 30 steps: not one budget" in refusal()
