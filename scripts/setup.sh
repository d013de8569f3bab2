# Sourced by the scripts beside it, with the lists of packages that they need: source setup.sh requirements.txt ...
# Makes the repository's root the working folder. An active environment is the user's: what the lists ask for and it
# lacks is installed there, and nothing that it has is changed. Without one, .venv is made, with everything that
# users and tests need in the exact versions of constraints.txt. VENV and CONSTRAINTS name another environment and list.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv}"
constraints="${CONSTRAINTS:-constraints.txt}"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv" # half of one has no pip
    source "$venv/bin/activate"
fi
if [ "${VIRTUAL_ENV:-}" -ef "$venv" ]; then
    # Asking pip takes seconds, so it is asked only when the lists have changed.
    wanted="$(cat requirements.txt requirements-dev.txt "$constraints")"
    if [ "$(cat "$venv/installed.txt" 2>/dev/null)" != "$wanted" ]; then
        python -m pip install --quiet -r requirements.txt -r requirements-dev.txt -c "$constraints"
        printf '%s\n' "$wanted" >"$venv/installed.txt"
    fi
else
    python -c "import packaging" 2>/dev/null || python -m pip install --quiet packaging
    lacking="$(
        python - "$@" <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

lines = [line for name in sys.argv[1:] for line in Path(name).read_text().splitlines() if line and line[0] != "#"]
for requirement in map(Requirement, lines):
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        print(requirement)
        continue
    if not requirement.specifier.contains(here, prereleases=True):
        sys.exit(
            f"setup.sh: error: the active environment {sys.prefix} has {requirement.name} {here}, but {requirement} is "
            "needed: change it there, or deactivate the environment and let this command make one of its own"
        )
END
    )"
    if [ -n "$lacking" ]; then
        echo "Installing into $(python -c 'import sys; print(sys.prefix)'):" $lacking >&2
        mapfile -t lacking <<<"$lacking"
        python -m pip install --quiet "${lacking[@]}"
    fi
fi
