#!/usr/bin/env bash
# Sets up .venv and runs the main comparison: one cold start, then GRPO and GSPO from it on the same prompts and keys.
# About 6 minutes on 2 CPU cores. Arguments go to the experiment: bash scripts/quickstart.sh --workdir=runs/other
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
workdir=(--workdir=runs/quickstart)
for argument in "$@"; do [[ $argument == --workdir* ]] && workdir=(); done
exec "$PYTHON" experiments/compare.py --config=configs/quickstart.py "${workdir[@]}" "$@"
