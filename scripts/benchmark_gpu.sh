#!/usr/bin/env bash
# Measures on one NVIDIA GPU, in under 9 minutes, what experiments/results/speed says of one: updates of a dense model of
# 1.7B and of a MoE of 500M in bfloat16 against the matrix product, decoding at batch 64 against the bandwidth, and the
# MoE backends in the quickstart and in moe-150m. One JSON file a table, into a folder (default runs/speed_gpu).
# Without such a GPU: tiny models on the CPU, into a folder cpu beside them, and a line that says what was not measured.
# PYTHON: the interpreter (default .venv's).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
export PYTHONPATH=$PWD
out=${1:-runs/speed_gpu}
ends=$(($(date +%s) + ${SECONDS_IN_ALL:-530}))
failed=0

measure() {  # NAME CASE CONFIG ARGUMENTS...
    local name=$1 what=$2 config=$3 left=$((ends - $(date +%s)))
    shift 3
    if [ "$left" -lt 20 ]; then echo "== $name: not measured, the time is up"; failed=1; return; fi
    echo "== $name"
    timeout "$left" "$PYTHON" scripts/benchmark.py "$what" --config="configs/$config" "$@" --json="$out/$name.json" ||
        { echo "== $name: not measured, exit code $?"; failed=1; }
}

platform=$("$PYTHON" -c 'import jax; print(jax.default_backend())' 2>/dev/null)
if [ "$platform" = gpu ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    measure gpu_update_1.7b update benchmark.py:qwen3-1.7b --repeats=5
    measure gpu_update_500m update benchmark.py:moe-500m --repeats=5 --vary=model.moe_backend=ragged,blocked
    measure gpu_decode_1.7b rollout benchmark.py:qwen3-1.7b --repeats=3
    measure gpu_decode_500m rollout benchmark.py:moe-500m --repeats=3
    measure gpu_step_quickstart step gspo_running_sum.py --repeats=5 --vary=model.moe_backend=ragged,blocked
    measure gpu_update_150m update benchmark.py:moe-150m --repeats=5 --vary=model.moe_backend=ragged,blocked
else
    echo "no NVIDIA GPU is found by jax (backend ${platform:-none}): tiny models on the CPU instead."
    echo "Not measured: update of 1.7B and 500M, decoding at batch 64, MoE backends on a GPU."
    out=$out/cpu
    small=(--small --repeats=2)
    measure gpu_update_1.7b update benchmark.py:tiny "${small[@]}" --config.model.num_experts=0 --config.model.d_ff=32 --config.model.dtype=bfloat16
    measure gpu_update_500m update benchmark.py:tiny "${small[@]}" --vary=model.moe_backend=ragged,blocked
    measure gpu_decode_1.7b rollout benchmark.py:tiny "${small[@]}" --config.model.dtype=bfloat16
    measure gpu_step_quickstart step gspo_running_sum.py "${small[@]}" --vary=model.moe_backend=ragged,blocked
fi
echo
"$PYTHON" scripts/benchmark.py table "$out" || failed=1
exit "$failed"
