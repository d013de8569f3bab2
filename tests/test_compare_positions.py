"""scripts/compare_positions.sh in small, and its table against figures by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compare_positions

ROOT = Path(__file__).parent.parent
SMALL = (
    "--max_steps 4 --eval_steps 2 --max_train_samples 64 --max_eval_samples 10 --use_cpu --early_stopping_patience 3"
).split()


def compare(*argv: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "SEEDS": "3",
        "TRAIN_PARAGRAPHS": "20",
        "TIMES": "",
    } | variables
    command = [str(ROOT / "scripts" / "compare_positions.sh"), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_small_comparison(tmp_path):
    out = tmp_path / "out"
    refused = compare(str(out), *SMALL, "--max_stepz", "4")
    assert refused.returncode == 2 and "(nearest: --max_steps)" in refused.stderr
    for times in ("2 0", "1.5"):
        refused = compare(str(tmp_path / "none"), *SMALL, TIMES=times)
        message = f"error: TIMES holds {times.split()[-1]}: give whole numbers from 1"
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and message in refused.stderr
        assert not (tmp_path / "none").exists()
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


@pytest.mark.slow
def test_a_small_comparison_of_longer_texts(tmp_path):
    """The first table's runs are asked, not trained anew; what is finished is not asked again."""
    out = tmp_path / "out"
    first = compare(str(out), *SMALL)
    assert first.returncode == 0, first.stderr[-3000:]
    assert not (out / "f1_over_length.png").exists()
    trained = {path: path.stat().st_mtime_ns for path in out.glob("seed-3/*/model.safetensors")}
    assert len(trained) == 3
    result = compare(str(out), *SMALL, TIMES="1 3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert result.stderr.count("Relative positions grow from 48 tokens to 144") == 2
    assert result.stderr.count("grow") == 2

    run = out / "seed-3"
    f1 = {
        (file.parts[-4], file.parts[-3], file.parts[-2]): json.loads(file.read_text())["eval_f1"]
        for file in run.glob("*/texts_x*/*/eval_results.json")
    }
    relative = ("relative_key", "relative_key_query")
    expected = {(name, f"texts_x{factor}", "windows") for name in ("absolute", *relative) for factor in (1, 3)}
    assert f1.keys() == expected | {(name, "texts_x3", "one_window") for name in relative}
    lines = result.stdout.splitlines()
    table = lines[lines.index("| positions | read in | x1 | x3 |") :]
    for name in ("absolute", *relative):
        short, long = f1[name, "texts_x1", "windows"], f1[name, "texts_x3", "windows"]
        assert f"| {name} | many short windows | {short:.1f} | {long:.1f} |" in table
        whole = "cannot" if name == "absolute" else f"{f1[name, 'texts_x3', 'one_window']:.1f}"
        assert f"| {name} | one long window | {short:.1f} | {whole} |" in table
    for folder in run.glob("*/texts_x*/*"):
        settings = json.loads((folder / "qa_settings.json").read_text())
        factor = int(folder.parent.name.removeprefix("texts_x"))
        assert settings["validation_file"].endswith(f"toy_squad_20/validation_{48 * factor}.json")
        assert settings["max_seq_length"] == (48 * factor if folder.name == "one_window" else 48)
        assert len(json.loads((folder / "eval_predictions.json").read_text())) == 10
    assert (out / "f1_over_length.png").read_bytes().startswith(b"\x89PNG")

    # An evaluation that was interrupted is made again, and no other.
    answers = {path: path.stat().st_mtime_ns for path in run.glob("*/texts_x*/*/eval_predictions.json")}
    asked_again = run / "relative_key" / "texts_x3" / "one_window"
    (asked_again / "eval_results.json").unlink()
    again = compare(str(out), *SMALL, TIMES="1 3")
    assert again.returncode == 0 and again.stdout.splitlines()[-9:] == lines[-9:]
    changed = {path.parent for path in answers if path.stat().st_mtime_ns != answers[path]}
    assert changed == {asked_again}


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


def test_table_and_picture_of_longer_texts(tmp_path, capsys):
    """Each type 10 better than the one before, one long window 5 better than short ones; 4 worse a length."""
    for seed, f1 in [(0, 40.0), (2, 43.0), (10, 49.0)]:
        for shift, position_type in enumerate(compare_positions.POSITION_TYPES):
            run = tmp_path / f"seed-{seed}" / position_type
            write_run(run, f1)
            for number, factor in enumerate([1, 2, 8]):
                for way, better in [("windows", 0), ("one_window", 5)]:
                    if way == "windows" or factor > 1 and position_type != "absolute":
                        (run / f"texts_x{factor}" / way).mkdir(parents=True)
                        scores = {"eval_f1": f1 + 10 * shift + better - 4 * number, "eval_exact": 1.0}
                        (run / f"texts_x{factor}" / way / "eval_results.json").write_text(json.dumps(scores))
    compare_positions.main([str(tmp_path), "0", "2", "10", "--times", "1", "2", "8"])
    output = capsys.readouterr().out
    assert output.startswith("3 seed(s), 20 steps\n")
    # Mean 44 and standard deviation 4.58 as in the table above.
    assert (
        output.split("f1_over_steps.png\n\n")[1].split("\n\n")[0]
        == """\
| positions | read in | x1 | x2 | x8 |
|---|---|---|---|---|
| absolute | many short windows | 44.0 ± 4.6 | 40.0 ± 4.6 | 36.0 ± 4.6 |
| absolute | one long window | 44.0 ± 4.6 | cannot | cannot |
| relative_key | many short windows | 54.0 ± 4.6 | 50.0 ± 4.6 | 46.0 ± 4.6 |
| relative_key | one long window | 54.0 ± 4.6 | 55.0 ± 4.6 | 51.0 ± 4.6 |
| relative_key_query | many short windows | 64.0 ± 4.6 | 60.0 ± 4.6 | 56.0 ± 4.6 |
| relative_key_query | one long window | 64.0 ± 4.6 | 65.0 ± 4.6 | 61.0 ± 4.6 |"""
    )
    picture = tmp_path / "f1_over_length.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert output.endswith(f"f1 over length: {picture}\n")

    compare_positions.main([str(tmp_path), "2", "--times", "2"])
    one_seed = "| absolute | many short windows | 39.0 |\n| absolute | one long window | cannot |\n"
    assert one_seed in capsys.readouterr().out
    (tmp_path / "seed-10" / "relative_key" / "texts_x8" / "one_window" / "eval_results.json").unlink()
    with pytest.raises(SystemExit) as exit_status:
        compare_positions.main([str(tmp_path), "2", "10", "--times", "8"])
    assert exit_status.value.code == 2
    assert "seed-10/relative_key/texts_x8/one_window holds no evaluation" in capsys.readouterr().err


def test_absolute_positions_cannot_read_one_long_window(tmp_path):
    """What the table says of them."""
    toy = tmp_path / "toy"
    make_toy_squad = [sys.executable, ROOT / "scripts" / "make_toy_squad.py", toy, "--train_paragraphs", "20"]
    subprocess.run([*make_toy_squad, "--validation_lengths", "96", "--max_position_embeddings", "48"], check=True)
    asked = [
        "--validation_file",
        toy / "validation_96.json",
        "--do_eval",
        "--max_seq_length",
        "96",
        "--doc_stride",
        "24",
    ]
    command = [sys.executable, ROOT / "run_squad.py", "--model_name_or_path", toy / "absolute", *asked]
    done = subprocess.run([*command, "--output_dir", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--max_seq_length is 96, but the model has positions for 48 tokens only" in done.stderr


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
