"""scripts/setup.sh: what it installs, and where, with an interpreter that only notes what pip is asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# pip is noted; everything else is done by the Python of this test.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then echo "${{@:3}}" >>"$PIP_LOG"; else exec {sys.executable} "$@"; fi
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A repository with setup.sh in it, and beside it an environment."""
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    (repository / "scripts" / "setup.sh").write_text((ROOT / "scripts" / "setup.sh").read_text())
    (repository / "requirements.txt").write_text("# what a user needs\nnumpy>=1.0\npytest>=2,<99\n")
    (repository / "requirements-dev.txt").write_text("pytest>=1\n")
    (repository / "constraints.txt").write_text("numpy==2.0.0\n")
    make_environment(tmp_path / "environment")
    return tmp_path


def make_environment(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (folder / "bin" / name).write_text(PYTHON)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "activate").write_text(f'export VIRTUAL_ENV={folder} PATH={folder}/bin:"$PATH"')


def source(place: Path, active: Path | None, *requirements: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """setup.sh's end, and what it has asked pip for, where these requirements are added."""
    environment = {"PATH": "/usr/bin:/bin", "PIP_LOG": str(place / "pip.log")}
    if active is not None:
        environment |= {"VIRTUAL_ENV": str(active), "PATH": f"{active}/bin:/usr/bin:/bin"}
    with open(place / "repository" / "requirements.txt", "a") as file:
        file.writelines(f"{requirement}\n" for requirement in requirements)
    command = ["bash", "-c", "set -euo pipefail; source scripts/setup.sh requirements.txt"]
    done = subprocess.run(command, cwd=place / "repository", env=environment, capture_output=True, text=True)
    log = place / "pip.log"
    return done, log.read_text().splitlines() if log.exists() else []


def test_an_active_environment_that_has_everything_is_left_alone(place):
    done, asked = source(place, place / "environment")
    assert (done.returncode, asked) == (0, []), done.stderr


def test_what_an_active_environment_lacks_is_installed_without_constraints(place):
    done, asked = source(place, place / "environment", "no-such-package>=1.5,<3")
    assert (done.returncode, asked) == (0, ["install --quiet no-such-package<3,>=1.5"]), done.stderr
    assert "no-such-package<3,>=1.5" in done.stderr


def test_a_version_that_does_not_fit_is_said_and_not_changed(place):
    done, asked = source(place, place / "environment", "no-such-package", "packaging>=9999")
    assert (done.returncode, asked) == (1, [])
    message = r"setup.sh: error: the active environment \S+ has packaging [\d.]+, but packaging>=9999 is needed: .+\n"
    assert re.fullmatch(message, done.stderr)


@pytest.mark.parametrize("active", [False, True])
def test_its_own_environment_gets_the_exact_versions_once(active, place):
    own = place / "repository" / ".venv"
    make_environment(own)
    for _ in range(2):
        done, asked = source(place, own if active else None)
        assert done.returncode == 0, done.stderr
    assert asked == ["install --quiet -r requirements.txt -r requirements-dev.txt -c constraints.txt"]
    (place / "repository" / "constraints.txt").write_text("numpy==2.1.0\n")
    assert len(source(place, own)[1]) == 2


def test_versions_are_said_alike_everywhere():
    """The ranges, the two lists of exact versions, and what the program says when a part of the Trainer is missing."""
    from trainer_qa import NEWEST_TESTED

    def versions(file: str, operator: str) -> dict[str, str]:
        return dict(re.findall(rf"^(\w+){operator}([\d.]+)", (ROOT / file).read_text(), flags=re.MULTILINE))

    ranges = versions("requirements.txt", ">=")
    lowest, newest = versions("constraints-lowest.txt", "=="), versions("constraints.txt", "==")
    assert NEWEST_TESTED == newest["transformers"]
    assert ranges.keys() == lowest.keys() and newest.keys() <= ranges.keys()
    for package in ranges.keys() - {"torch"}:
        assert lowest[package].removeprefix(ranges[package]) in ("", ".0"), package
