#!/usr/bin/env bash
# Sets up what the tests need and runs all of them; further arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest -q -rs "$@"
