"""scripts/compare_positions.sh in small, and its tables against figures by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compare_positions

ROOT = Path(__file__).parent.parent
RELATIVE = ("relative_key", "relative_key_query")
SMALL = (
    "--max_steps 4 --eval_steps 2 --max_train_samples 64 --max_eval_samples 10 --use_cpu --early_stopping_patience 3"
).split()


def compare(*argv: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"PATH": path, "OMP_NUM_THREADS": "1", "SEEDS": "3", "TRAIN_PARAGRAPHS": "20", "TIMES": "1 3"}
    command = [str(ROOT / "scripts" / "compare_positions.sh"), *argv]
    return subprocess.run(command, env={**os.environ, **small, **variables}, capture_output=True, text=True)


@pytest.mark.slow
def test_a_small_comparison(tmp_path):
    out = tmp_path / "out"
    refused = compare(str(out), *SMALL, "--max_stepz", "4")
    assert refused.returncode == 2 and "(nearest: --max_steps)" in refused.stderr
    result = compare(str(out), *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    lines, run = result.stdout.splitlines(), out / "seed-3"
    assert "1 seed(s), 4 steps" in lines
    f1 = {
        str(file.parent.relative_to(run)): json.loads(file.read_text())["eval_f1"]
        for file in run.rglob("eval_results.json")
    }
    for name in ("absolute", *RELATIVE):
        assert any(line.startswith(f"| {name} | {f1[name]:.2f} | - |") for line in lines)
        assert json.loads((run / name / "config.json").read_text()).get("position_embedding_type", "absolute") == name
        short, long = f1[f"{name}/texts_x1/windows"], f1[f"{name}/texts_x3/windows"]
        assert f"| {name} | many short windows | {short:.1f} | {long:.1f} |" in lines
        whole = "cannot" if name == "absolute" else f"{f1[f'{name}/texts_x3/one_window']:.1f}"
        assert f"| {name} | one long window | {short:.1f} | {whole} |" in lines
    assert len(f1) == 3 + 3 * 2 + len(RELATIVE)
    for folder in run.glob("*/texts_x*/*"):
        settings = json.loads((folder / "qa_settings.json").read_text())
        length = 48 * int(folder.parent.name.removeprefix("texts_x"))
        assert settings["validation_file"].endswith(f"toy_squad_20/validation_{length}.json")
        assert settings["max_seq_length"] == (length if folder.name == "one_window" else 48)
    for picture in ("f1_over_steps.png", "f1_over_length.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    # The same command makes again what was interrupted, and nothing else; other flags are refused.
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.suffix in (".safetensors", ".json")}
    asked_again = run / "relative_key" / "texts_x3" / "one_window"
    (asked_again / "eval_results.json").unlink()
    again = compare(str(out), *SMALL)
    assert again.returncode == 0 and again.stdout.splitlines()[-9:] == lines[-9:]
    assert {path.parent for path, time in written.items() if path.stat().st_mtime_ns != time} == {asked_again}
    refused = compare(str(out), *SMALL, "--learning_rate", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "holds a comparison with other flags" in refused.stderr


def test_matplotlib_and_times_are_refused_in_one_line(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    for variables, message in (
        ({"PYTHONPATH": str(tmp_path)}, "matplotlib is missing: python -m pip install matplotlib"),
        ({"TIMES": "2 0"}, 'TIMES holds 0: give whole numbers from 1, such as "1 2 4"'),
        ({"TIMES": "1.5"}, 'TIMES holds 1.5: give whole numbers from 1, such as "1 2 4"'),
    ):
        result = compare(str(tmp_path / "out"), *SMALL, **variables)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr and not (tmp_path / "out").exists()


def write_run(folder: Path, f1: float, steps: int = 20) -> None:
    folder.mkdir(parents=True)
    (folder / "eval_results.json").write_text(json.dumps({"eval_f1": f1, "eval_exact": f1 - 10}))
    history = [{"step": 5, "loss": 1.0}, {"step": 10, "eval_f1": f1 / 2}, {"step": 20, "eval_f1": f1}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))


def test_tables_and_pictures(tmp_path, capsys):
    """Each type 10 better than the one before, one long window 5 better than short ones; 4 worse a length."""
    for seed, f1 in [(0, 40.0), (2, 43.0), (10, 49.0)]:
        for shift, position_type in enumerate(compare_positions.POSITION_TYPES):
            run = tmp_path / f"seed-{seed}" / position_type
            write_run(run, f1 + 10 * shift, steps=20 + seed)
            for number, factor in enumerate([1, 2, 8]):
                for way, better in [("windows", 0), ("one_window", 5)]:
                    if way == "windows" or factor > 1 and position_type != "absolute":
                        write_run(run / f"texts_x{factor}" / way, f1 + 10 * shift + better - 4 * number)
    compare_positions.main([str(tmp_path), "0", "2", "10", "--times", "1", "2", "8"])
    # Mean (40 + 43 + 49) / 3 = 44; deviations -4, -1, 5; standard deviation sqrt((16 + 1 + 25) / 2) = 4.58.
    assert (
        capsys.readouterr().out
        == f"""\
3 seed(s), 20 to 30 steps

| positions | f1 mean | f1 sd | f1 lowest | f1 highest | exact mean |
|---|---|---|---|---|---|
| absolute | 44.00 | 4.58 | 40.00 | 49.00 | 34.00 |
| relative_key | 54.00 | 4.58 | 50.00 | 59.00 | 44.00 |
| relative_key_query | 64.00 | 4.58 | 60.00 | 69.00 | 54.00 |

f1 over steps: {tmp_path}/f1_over_steps.png

| positions | read in | x1 | x2 | x8 |
|---|---|---|---|---|
| absolute | many short windows | 44.0 ± 4.6 | 40.0 ± 4.6 | 36.0 ± 4.6 |
| absolute | one long window | 44.0 ± 4.6 | cannot | cannot |
| relative_key | many short windows | 54.0 ± 4.6 | 50.0 ± 4.6 | 46.0 ± 4.6 |
| relative_key | one long window | 54.0 ± 4.6 | 55.0 ± 4.6 | 51.0 ± 4.6 |
| relative_key_query | many short windows | 64.0 ± 4.6 | 60.0 ± 4.6 | 56.0 ± 4.6 |
| relative_key_query | one long window | 64.0 ± 4.6 | 65.0 ± 4.6 | 61.0 ± 4.6 |

f1 over length: {tmp_path}/f1_over_length.png
"""
    )
    assert compare_positions.read_curve(tmp_path / "seed-10" / "absolute") == {10: 24.5, 20: 49.0, 30: 49.0}


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    def refusal() -> str:
        with pytest.raises(SystemExit) as exit_status:
            compare_positions.main([str(tmp_path), "0"])
        assert exit_status.value.code == 2
        return capsys.readouterr().err

    for position_type in ("absolute", "relative_key"):
        write_run(tmp_path / "seed-0" / position_type, 50.0)
    assert "seed-0/relative_key_query lacks eval_results.json: run compare_positions.sh again" in refusal()
    write_run(tmp_path / "seed-0" / "relative_key_query", 50.0, steps=30)
    assert "[[20], [20], [30]] steps, by position type and seed: not one budget" in refusal()
