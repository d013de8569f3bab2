"""Runs run_squad.py and ask.py against a hub, in processes that start at once: forked from one that has imported them.

The libraries read HF_ENDPOINT and HF_HOME once, when they are imported; so this one process belongs to one hub.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of standard error, progress bars aside."""
        lines = [line.split("\r")[-1] for line in self.err.splitlines()]
        return [line for line in lines if line.strip() and "it/s]" not in line and " examples/s]" not in line]


class Programs:
    def __init__(self, environment: dict[str, str]):
        self.home = environment["HF_HOME"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])
        command = [sys.executable, "-c", "import online; online.serve()"]
        environment = environment | {"PYTHONPATH": path}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True)

    def start(self, program: str, *argv) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="online-"))
        self._process.stdin.write(json.dumps([program, [str(arg) for arg in argv], str(folder)]) + "\n")
        self._process.stdin.flush()
        return folder

    def outcome(self, folder: Path) -> Outcome:
        end = time.monotonic() + 120
        while not (folder / "done").exists():
            assert time.monotonic() < end, (folder / "err").read_text()
            time.sleep(0.02)
        return Outcome(int((folder / "done").read_text()), (folder / "out").read_text(), (folder / "err").read_text())

    def run(self, program: str, *argv) -> Outcome:
        return self.outcome(self.start(program, *argv))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve() -> None:
    import ask

    import run_squad
    from qa import hub

    hub.WAIT = 1
    for line in sys.stdin:
        program, argv, folder = json.loads(line)
        if os.fork() == 0:
            _run({"ask": ask.main, "run_squad": run_squad.main}[program], argv, Path(folder))


def _run(main, argv: list[str], folder: Path) -> None:
    for number, name in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    status = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    (folder / "writing").write_text(str(status))
    os.replace(folder / "writing", folder / "done")
    os._exit(0)
