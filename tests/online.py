"""Runs run_squad.py and ask.py against a hub, in processes that start at once: forked from one that has imported them.

The libraries read HF_ENDPOINT and HF_HOME once, when they are imported; so this one process belongs to one hub.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The lines of standard error, progress bars aside."""
        lines = [line.split("\r")[-1] for line in self.err.splitlines()]
        return [line for line in lines if line and "it/s]" not in line and " examples/s]" not in line]


class Programs:
    def __init__(self, environment: dict[str, str]):
        self.home = environment["HF_HOME"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import online; online.serve()"],
            stdin=subprocess.PIPE,
            env={**environment, "PYTHONPATH": path},
            text=True,
        )

    def start(self, program: str, *argv, **environment: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="online-"))
        order = {"program": program, "argv": [str(arg) for arg in argv], "env": environment, "folder": str(folder)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return folder

    def outcome(self, folder: Path, timeout: float = 120) -> Outcome:
        end = time.monotonic() + timeout
        while not (folder / "done").exists():
            assert time.monotonic() < end, (folder / "err").read_text()
            time.sleep(0.05)
        status, seconds = json.loads((folder / "done").read_text())
        return Outcome(status, (folder / "out").read_text(), (folder / "err").read_text(), seconds)

    def run(self, program: str, *argv, **environment: str) -> Outcome:
        return self.outcome(self.start(program, *argv, **environment))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def serve() -> None:
    import ask

    import run_squad

    mains = {"ask": ask.main, "run_squad": run_squad.main}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(mains[order["program"]], order["argv"], order["env"], Path(order["folder"]))


def _run(main, argv: list[str], environment: dict[str, str], folder: Path) -> None:
    start = time.monotonic()
    os.environ.update(environment)
    for number, name in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    status = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "writing").write_text(json.dumps([status, time.monotonic() - start]))
    os.replace(folder / "writing", folder / "done")
    os._exit(0)
