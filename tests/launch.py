"""Runs run_squad.py in real processes that start at once, because they are forked from one that has imported it."""

import gc
import multiprocessing
import os
import pydoc
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class At:
    """A moment in a run: before the `call`-th call of `function` (a dotted name) on process `rank`, or after it."""

    function: str
    call: int = 1
    after: bool = False
    rank: int = 0
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int]  # by rank; minus the signal's number for a process that was killed
    out: list[str]  # what each rank wrote to standard output
    err: list[str]


def run(*argv: str, processes: int = 1, at: At | None = None, patch: str | None = None, timeout: float = 120, **env):
    """Runs `run_squad.py argv` to its end. A process killed at `at` takes the others with it, as a lost node does.

    `patch` is the dotted name of a function that is called before the run, to put something out of order.
    """
    children, folder = start(*argv, processes=processes, at=at, patch=patch, **env)
    deadline = time.monotonic() + timeout
    alive = list(children)
    while alive:
        done = wait([child.sentinel for child in alive], timeout=max(deadline - time.monotonic(), 0))
        if not done:
            for child in alive:
                child.kill()
            raise TimeoutError(f"not finished after {timeout} s:\n" + outcome(children, folder).err[0])
        alive = [child for child in alive if child.sentinel not in done]
        if any(child.exitcode == -signal.SIGKILL for child in children):
            for child in alive:
                child.kill()
    return outcome(children, folder)


def finish(command, out: Path, processes: int = 1, **how) -> Outcome:
    """Runs a command that must succeed, into `out`; of its processes only the main one may say anything."""
    done = run(*command, "--output_dir", out, processes=processes, **how)
    assert done.exit_codes == [0] * processes, done.err[0][-2000:]
    assert not any(done.out[1:] + done.err[1:]), f"only the main process speaks: {done.out[1:]} {done.err[1:]}"
    return done


def fail(command, out: Path, status: int = 2, processes: int = 1, **how) -> str:
    """Runs a command that must fail on all processes alike; returns its last line, the one that it says why in."""
    done = run(*command, "--output_dir", out, processes=processes, **how)
    assert done.exit_codes == [status] * processes, done.err[0][-2000:]
    assert "Traceback" not in "".join(done.err)
    assert not any(done.out[1:] + done.err[1:]), f"only the main process speaks: {done.out[1:]} {done.err[1:]}"
    line = done.err[0].strip().splitlines()[-1]
    assert line.startswith("run_squad.py: ")
    return line


def start(*argv: str, processes: int = 1, at: At | None = None, patch: str | None = None, **env):
    folder = Path(tempfile.mkdtemp(prefix="run_squad-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        for kind in ("out", "err"):
            Path(folder, f"{rank}.{kind}").touch()
        ranks = {} if processes == 1 else _ranks(rank, processes, port)
        child = _context().Process(target=_run, args=([*map(str, argv)], {**ranks, **env}, folder, rank, at, patch))
        child.start()
        children.append(child)
    return children, folder


def outcome(children, folder: Path) -> Outcome:
    for child in children:
        child.join()
    out, err = (
        [Path(folder, f"{rank}.{kind}").read_text() for rank in range(len(children))] for kind in ("out", "err")
    )
    return Outcome([child.exitcode for child in children], out, err)


def _ranks(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_squad", "launch"])
    # The server reads these once, when it starts.
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(dict.fromkeys(path)), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return context


def _run(argv: list[str], env: dict[str, str], folder: Path, rank: int, at: At | None, patch: str | None) -> None:
    os.environ.update(env)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    import run_squad

    gc.freeze()  # the Trainer collects garbage when it starts; all that was imported need not be looked through again
    if patch is not None:
        pydoc.locate(patch)()
    if at is not None and at.rank == rank:
        signal_at(at)
    run_squad.main(argv)


def signal_at(at: At) -> None:
    """Sends this process the signal at that moment."""
    owner_name, name = at.function.rsplit(".", 1)
    owner = pydoc.locate(owner_name)
    original = getattr(owner, name)
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        this = calls
        if this == at.call and not at.after:
            os.kill(os.getpid(), at.signal)
        result = original(*args, **kwargs)
        if this == at.call and at.after:
            os.kill(os.getpid(), at.signal)
        return result

    setattr(owner, name, counted)
