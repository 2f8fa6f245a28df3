# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the pinned requirements. Safe to run twice.
# Leaves $PYTHON set. Needs Python 3.11 or later with venv, or uv.

fail() { echo "error: $*" >&2; exit 2; }

setup_env() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    PYTHON="$PWD/.venv/bin/python"
    local stamp=.venv/.installed wanted
    wanted=$(cat requirements.txt pyproject.toml | cksum)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

    if command -v uv >/dev/null 2>&1; then
        echo "setting up .venv with uv"
        [ -x "$PYTHON" ] || uv venv --quiet --python '>=3.11' .venv || fail "uv could not make .venv"
        uv pip install --quiet --python "$PYTHON" -r requirements.txt || fail "installing requirements.txt failed"
        uv pip install --quiet --python "$PYTHON" --no-deps -e . || fail "installing the project failed"
    else
        local python
        python=$(command -v python3) || fail "python3 is missing; on Debian: sudo apt-get install python3 python3-venv"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "Python 3.11 or later is needed, this is $("$python" --version); install one, or uv (https://docs.astral.sh/uv)"
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "the venv module is missing; on Debian: sudo apt-get install python3-venv"
        echo "setting up .venv with $("$python" --version)"
        [ -x "$PYTHON" ] || "$python" -m venv .venv || fail "could not make .venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt || fail "installing requirements.txt failed"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -e . || fail "installing the project failed"
    fi
    echo "$wanted" > "$stamp"
}

setup_env
