"""Kill training at random moments, again and again, and see that nothing is ever lost.

    python scripts/soak_kills.py [--kills 50] [--processes 1 2] [--seed 0]

For each number of processes one run is left alone. Then runs of the same command are killed with SIGKILL (all processes
at once, as a lost node) at a random moment and started again, until each has finished; its weights, answers, scores and
history must equal, bit for bit, those of the run left alone. Prints where the kills struck and what was compared, and
exits with status 1 if anything differed.
"""

import argparse
import collections
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

from qa.checkpoints import complete_checkpoints, incomplete_checkpoints  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    command = [
        *("--model_name_or_path", with_google_names(tiny_bert(folder / "model"))),
        *("--train_file", tiny_questions(folder / "train.json", paragraphs=8)),
        *("--validation_file", tiny_questions(folder / "dev.json", paragraphs=5)),
        *FLAGS,
        *("--disable_tqdm", "True"),
    ]
    rng = random.Random(arguments.seed)
    print("| processes | kills | struck while | runs finished | equal to the run left alone |\n|---|---|---|---|---|")
    equal_everywhere = True
    for processes in arguments.processes:
        struck, runs, equal = soak(command, folder / str(processes), processes, arguments.kills, rng)
        where = ", ".join(f"{name} {count}" for name, count in sorted(struck.items()))
        print(f"| {processes} | {struck.total()} | {where} | {runs} | {equal} |", flush=True)
        equal_everywhere &= equal == runs
    shutil.rmtree(folder)
    return 0 if equal_everywhere else 1


def soak(command, folder: Path, processes: int, kills: int, rng: random.Random) -> tuple[collections.Counter, int, int]:
    """Returns (what the kills struck, how many runs have finished, how many of these equal the run left alone)."""
    alone = folder / "alone"
    launch.finish(command, alone, processes)  # also starts the process that the others are forked from
    shutil.rmtree(alone)
    started = time.monotonic()
    launch.finish(command, alone, processes)
    seconds = time.monotonic() - started

    struck: collections.Counter = collections.Counter()
    runs = equal = 0
    while struck.total() < kills:
        out = folder / f"run-{runs}"
        while struck.total() < kills and kill_after(rng.uniform(0, seconds), command, out, processes):
            struck[stage(out)] += 1
            print(f"{processes} processes: kill {struck.total()} of {kills}, {stage(out)}", file=sys.stderr, flush=True)
        launch.finish(command, out, processes)
        runs += 1
        if outcome(out) == outcome(alone):
            equal += 1
        else:
            print(f"{out} differs from {alone}", file=sys.stderr, flush=True)
    return struck, runs, equal


def kill_after(seconds: float, command, out: Path, processes: int) -> bool:
    """Starts the command and kills all its processes after that time; False when they had finished before."""
    children, logs = launch.start(*command, "--output_dir", out, processes=processes)
    wait([children[0].sentinel], timeout=seconds)
    for child in children:
        child.kill()
    done = launch.outcome(children, logs)
    shutil.rmtree(logs)
    if set(done.exit_codes) - {0, -signal.SIGKILL}:
        sys.exit(f"{out}: exit codes {done.exit_codes}\n{done.err[0]}")
    return -signal.SIGKILL in done.exit_codes


def stage(out: Path) -> str:
    """What the run in `out` was doing when it was killed, as far as its files tell."""
    state = out / "run_state.json"
    if not state.exists():
        return "starting"
    if json.loads(state.read_text())["status"] == "trained":
        return "evaluating the trained model"
    if not incomplete_checkpoints(out):
        return "training or evaluating"
    newest = max(complete_checkpoints(out) + incomplete_checkpoints(out), key=lambda name: int(name.rsplit("-", 1)[1]))
    return "saving" if newest in incomplete_checkpoints(out) else "rotating, or going on from an incomplete save"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
