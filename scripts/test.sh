#!/usr/bin/env bash
# Sets up .venv and runs the linter and the tests; arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "$@"
