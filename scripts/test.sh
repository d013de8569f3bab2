#!/usr/bin/env bash
# Sets up what the tests need, and runs the linter and all tests but those marked slow; further arguments go to pytest
# (-m slow runs those).
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest -q -rs -m "not slow" "$@"
