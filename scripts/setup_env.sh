# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the pinned requirements. Safe to run twice.
# jax is that of the machine: for its GPUs where an NVIDIA driver answers, for its TPU, else for the CPU.
# Leaves $PYTHON set. Needs Python 3.11 or later with venv, or uv.

UV=0.13.9  # fetches and unpacks side by side; installed into .venv where the machine has none

fail() { echo "error: $*" >&2; exit 2; }

# "cuda12", "cuda13", "tpu": the extra of jax that this machine needs; nothing on a CPU. CUDA 13 needs driver 580 and a GPU
# of compute capability 7.5; CUDA 12 driver 525.
accelerator() {
    local driver capability
    IFS=', ' read -r driver capability < <(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null)
    if [[ ! $driver =~ ^[0-9]+\. && -r /proc/driver/nvidia/version ]]; then
        driver=$(grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' /proc/driver/nvidia/version | head -n 1)
    fi
    if [[ $driver =~ ^[0-9]+\. ]]; then
        capability=${capability:-7.5}
        [[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || capability=7.5
        if ((${driver%%.*} >= 580 && ${capability/./} >= 75)); then echo cuda13; else echo cuda12; fi
    elif compgen -G '/dev/accel*' >/dev/null || [ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]; then
        echo tpu
    fi
}

pip_install() {
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# The path of a uv in .venv, which takes a seventh of pip's time; nothing where pip cannot install it.
own_uv() {
    pip_install "uv==$UV" 2>/dev/null && echo .venv/bin/uv
}

# By $1: uv, a path of our own uv, or nothing. What our own one cannot do, since only pip knows this machine's index, pip does.
install_packages() {
    local uv=$1
    shift
    if [ "$uv" = uv ]; then
        uv pip install --quiet --python "$PYTHON" "$@"
    else
        { [ -n "$uv" ] && "$uv" pip install --quiet --python "$PYTHON" "$@" 2>/dev/null; } ||
            pip_install "$@"
    fi
}

setup_env() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    PYTHON="$PWD/.venv/bin/python"
    local stamp=.venv/.installed wanted extra jax
    extra=$(accelerator)
    wanted="$(cat requirements.txt pyproject.toml | cksum)${extra:+ $extra}"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    jax=$(sed -nE "s/^jax(==[^ ]+).*/jax${extra:+[$extra]}\1/p" requirements.txt)
    [ -z "$extra" ] || echo "this machine has ${extra/tpu/a TPU}: installing $jax" | sed -E 's/has cuda([0-9]+)/has an NVIDIA driver for CUDA \1/'

    local uv=uv
    if command -v uv >/dev/null 2>&1; then
        echo "setting up .venv with uv"
        [ -x "$PYTHON" ] || uv venv --quiet --seed --python '>=3.11' .venv || fail "uv could not make .venv"
    else
        local python
        python=$(command -v python3) || fail "python3 is missing; on Debian: sudo apt-get install python3 python3-venv"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "Python 3.11 or later is needed, this is $("$python" --version); install one, or uv (https://docs.astral.sh/uv)"
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "the venv module is missing; on Debian: sudo apt-get install python3-venv"
        echo "setting up .venv with $("$python" --version)"
        [ -x "$PYTHON" ] || "$python" -m venv .venv || fail "could not make .venv"
        uv=$(own_uv) || uv=
    fi
    install_packages "$uv" -r requirements.txt "$jax" || fail "installing requirements.txt failed"
    install_packages "$uv" --no-deps -e . || fail "installing the project failed"
    echo "$wanted" > "$stamp"
}

setup_env
