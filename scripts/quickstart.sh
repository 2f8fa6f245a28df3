#!/usr/bin/env bash
# Sets up .venv and runs the main comparison: one cold start, then GRPO, GRPO with routing replay, and GSPO from it on the
# same prompts and keys, where routers move. About 6 minutes on 2 CPU cores with the installation.
# Arguments go to the experiment: bash scripts/quickstart.sh --workdir=runs/other
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
workdir=(--workdir=runs/quickstart)
for argument in "$@"; do [[ $argument == --workdir* ]] && workdir=(); done
# One heap that keeps its memory, as gspo/run/machine.py asks of glibc too, and in huge pages, which only the environment can ask for.
malloc=arena_max=1:hugetlb=1:mmap_threshold=4294967296:trim_threshold=17179869184
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.${malloc//:/:glibc.malloc.}}
exec "$PYTHON" experiments/compare.py --config=configs/quickstart.py "${workdir[@]}" "$@"
