"""Kill training at random moments, again and again, and see that nothing is ever lost.

    python scripts/soak_kills.py [--kills 50] [--processes 1 2] [--seed 0]

For each number of processes, and for a checkpoint with today's names and one with Google's (LayerNorm.gamma and beta),
one run is left alone. Then runs of the same command are killed with SIGKILL (all processes
at once, as a lost node) at a random moment and started again, until each has finished; its weights, answers, scores and
history must equal, bit for bit, those of the run left alone. Prints where the kills struck and what was compared, and
exits with status 1 if anything differed.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import launch  # noqa: E402
from test_kill import FLAGS, outcome  # noqa: E402
from tiny import tiny_bert, tiny_questions, with_google_names  # noqa: E402

from qa.run_folder import broken_checkpoints, whole_checkpoints  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills for each of them")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    models = {
        "weight and bias": tiny_bert(folder / "model"),
        "gamma and beta": with_google_names(tiny_bert(folder / "google_model")),
    }
    command = [
        *("--train_file", tiny_questions(folder / "train.json", paragraphs=8)),
        *("--validation_file", tiny_questions(folder / "dev.json", paragraphs=5)),
        *FLAGS,
        *("--disable_tqdm", "True"),
    ]
    rng = random.Random(arguments.seed)
    columns = ("processes", "LayerNorms", "kills", "struck while", "broken checkpoints left", "runs finished")
    print(f"| {' | '.join(columns)} | equal to the run left alone |")
    print("|---" * (len(columns) + 1) + "|")
    equal_everywhere = True
    for processes, names in itertools.product(arguments.processes, models):
        out = folder / f"{processes} {names}"
        row = soak(["--model_name_or_path", models[names], *command], out, processes, arguments.kills, rng)
        counts = (row["kills"], row["struck"], row["broken"], row["runs"], row["equal"])
        print(f"| {processes} | {names} | {' | '.join(map(str, counts))} |", flush=True)
        equal_everywhere &= row["equal"] == row["runs"]
    shutil.rmtree(folder)
    return 0 if equal_everywhere else 1


def soak(command, folder: Path, processes: int, kills: int, rng: random.Random) -> dict:
    alone = folder / "alone"
    finish(command, alone, processes)  # also starts the process that the others are forked from
    shutil.rmtree(alone)
    started = time.monotonic()
    finish(command, alone, processes)
    seconds = time.monotonic() - started
    expected = outcome(alone)

    struck: collections.Counter = collections.Counter()
    broken = runs = equal = 0
    while struck.total() < kills:
        out = folder / f"run-{runs}"
        finished = False
        while not finished and struck.total() < kills:
            finished = not kill_after(rng.uniform(0, seconds), command, out, processes)
            if not finished:
                struck[stage(out)] += 1
                broken += len(broken_checkpoints(out))
                progress(f"{processes} processes: kill {struck.total()} of {kills}, while {stage(out)}")
        if not finished:
            finish(command, out, processes)
        runs += 1
        same = outcome(out) == expected
        equal += same
        if same:
            shutil.rmtree(out)
        else:
            progress(f"{out} differs from {alone}")
    where = ", ".join(f"{name} {count}" for name, count in sorted(struck.items()))
    return {"kills": struck.total(), "struck": where, "broken": broken, "runs": runs, "equal": equal}


def kill_after(seconds: float, command, out: Path, processes: int) -> bool:
    """Starts the command and kills all its processes after that time; False when it had finished before."""
    children, logs = launch.start(*command, "--output_dir", out, processes=processes)
    wait([children[0].sentinel], timeout=seconds)
    for child in children:
        child.kill()
    exit_codes = launch.outcome(children, logs).exit_codes
    shutil.rmtree(logs)
    if set(exit_codes) - {0, -signal.SIGKILL}:
        sys.exit(f"{out}: exit codes {exit_codes}")
    return status(out) != "finished"


def finish(command, out: Path, processes: int) -> None:
    done = launch.run(*command, "--output_dir", out, processes=processes)
    if any(done.exit_codes):
        sys.exit(f"{out}: exit codes {done.exit_codes}\n{done.err[0]}")


def status(out: Path) -> str | None:
    file = out / "run_state.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def stage(out: Path) -> str:
    """What the run in `out` was doing when it was killed, as far as its files tell."""
    if status(out) is None:
        return "starting"
    if status(out) == "trained":
        return "evaluating the trained model"
    newest = max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)
    if broken_checkpoints(out):
        whole = whole_checkpoints(out)
        return (
            "saving"
            if not whole or not whole[-1].endswith(f"-{newest}")
            else "rotating, or going on from a broken save"
        )
    return "training or evaluating"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
