# Sourced by the scripts beside it: the repository's root as working folder, a virtual environment, the packages.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
# Asking pip takes seconds, so it is asked only when the lists of packages have changed.
installed="$(python -c 'import sys; print(sys.prefix)')/.installed_for_run_squad"
wanted="$(cat requirements.txt requirements-dev.txt constraints.txt)"
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    python -m pip install --quiet -r requirements.txt -r requirements-dev.txt -c constraints.txt
    printf '%s\n' "$wanted" >"$installed"
fi
