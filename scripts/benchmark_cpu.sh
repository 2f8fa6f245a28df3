#!/usr/bin/env bash
# Measures everything of experiments/results/speed that a CPU can: one JSON file a table, into a folder (default
# runs/speed). About 40 minutes on 2 quiet cores, of which the comparison with TRL and Tunix takes 25; nothing else
# should run. With names, only these: bash scripts/benchmark_cpu.sh runs/speed mid long_prompt
# PEERS_ENVS: where the environments of the peers are. PYTHON: the interpreter (default .venv's).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD
out=${1:-runs/speed}
shift || true
wanted=" $* "
cores=$(nproc)
mkdir -p "$out"

measure() {  # NAME CASE CONFIG ARGUMENTS...
    local name=$1 what=$2 variant=$3
    shift 3
    case "$wanted" in "  " | *" $name "*) ;; *) return 0 ;; esac
    echo "== $name"
    "$PYTHON" scripts/benchmark.py "$what" --config="configs/benchmark.py:$variant" "$@" --json="$out/$name.json"
}

peers() {  # NAME CORES
    case "$wanted" in "  " | *" $1 "*) ;; *) return 0 ;; esac
    [ "$2" -le "$cores" ] || return 0
    echo "== $1"
    "$PYTHON" scripts/benchmark_peers/compare.py --repeat=5 --cores="$2" --envs="${PEERS_ENVS:-$HOME/.cache/gspo/peers}" \
        --json="$out/$1.json"
}

# 1. against TRL and Tunix; first steps
peers peers_2_cores 2
peers peers_1_core 1
measure compile_moe compile moe --repeats=3
measure compile_dense compile dense --repeats=3
measure step_moe step moe
measure step_dense step dense
# 2. prompts of 512 tokens, each once for its group or with every completion
measure long_prompt update long_prompt --repeats=5 --vary=share_prompts=True,False
# 3. a model of middle size against the matrix product
measure mid update mid --repeats=3
# 4. time per token as completions grow; completions of mixed length, all at once and some at a time
measure growth rollout moe --repeats=3 --vary=max_completion_length=64,1024
measure mixed rollout mixed --repeats=5 --vary=max_num_seqs=0,16,32
# 5. memory of an update with a large vocabulary
measure vocab update vocab --repeats=1
# smaller pieces
measure backends moe moe
measure objectives objectives moe
measure replay replay moe
