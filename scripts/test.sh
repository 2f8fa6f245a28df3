#!/usr/bin/env bash
# Sets up .venv and runs the linter and the tests, on as many processes as there are cores, four at most: each keeps the
# programs of its tests, and one that compiles those of all may die in the unwinder of its JIT. Slow tests are left out;
# with --all they run too.
# Other arguments go to pytest: bash scripts/test.sh tests/model -k router
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then arguments+=(-m ''); else arguments+=("$argument"); fi
done
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest --numprocesses=auto --maxprocesses=4 ${arguments[@]+"${arguments[@]}"}
