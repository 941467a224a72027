# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: finds a Python, makes .venv, installs into it.
#
#   PYTHON       the interpreter to use (3.10, 3.11 or 3.12); default: the first that works, 3.11 preferred
#   FLUID_TORCH  pip's requirement for torch; default below. An installed torch of the right range is kept.
#   FLUID_MEGATRON  the same for megatron-core: without it pip would take the newest, which a CPU build of torch cannot import.

FLUID_TORCH="${FLUID_TORCH:-torch==2.13.0}"
FLUID_MEGATRON="${FLUID_MEGATRON:-megatron-core==0.16.1}"

say() { printf '\n==> %s\n' "$*"; }

fail() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# Succeeds when the interpreter $1 runs and is a version that fluid_npu supports.
python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Prints the interpreter to use.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        python_fits "$PYTHON" || fail "PYTHON=$PYTHON does not run or is not Python 3.10, 3.11 or 3.12; set PYTHON to one that is"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 found; install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python"
}

# Makes the virtual environment $1 with the interpreter $2 unless it is there already.
make_venv() {
    local folder="$1" python="$2"
    if [[ -x "$folder/bin/python" ]] && python_fits "$folder/bin/python"; then
        return
    fi
    if [[ -e "$folder" ]]; then
        fail "$folder exists but has no working Python 3.10 to 3.12; remove it (rm -r $folder) and run this again"
    fi
    say "making the virtual environment $folder with $("$python" --version)"
    if ! "$python" -m venv "$folder"; then
        rm -rf "$folder"
        fail "'$python -m venv $folder' failed; on Debian and Ubuntu: apt install python3-venv (or pythonX.Y-venv)"
    fi
}

# Prints what an installation depends on: it is repeated when this changes.
install_key() {
    local python="$1" extras="$2"
    "$python" --version
    printf '%s %s\n' "$extras" "$FLUID_TORCH"
    cat pyproject.toml setup.py
}

# Installs fluid_npu (editable) with the extras $2 into the environment of the interpreter $1, unless it is there.
install_into() {
    local python="$1" extras="$2" stamp key
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/fluid-npu-installed-$extras"
    key="$(install_key "$python" "$extras")"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$key" ]] && "$python" -c 'import fluid_npu.version' 2>/dev/null; then
        return
    fi
    if ! "$python" -c 'import torch' >/dev/null 2>&1; then
        say "installing $FLUID_TORCH"
        printf '%s\n' "If pip takes a CUDA build (nvidia-* packages below), this downloads several GB. For the small CPU build" \
            "stop here, install it into the environment yourself, and run this again: an installed torch is kept."
        "$python" -m pip install --disable-pip-version-check "$FLUID_TORCH" \
            || fail "pip could not install $FLUID_TORCH; is there a network, and space on the disk? FLUID_TORCH=... chooses another version (2.6 to 2.13)"
    fi
    if ! "$python" -c 'from importlib.metadata import version; version("megatron-core")' >/dev/null 2>&1; then
        "$python" -m pip install --disable-pip-version-check --quiet "$FLUID_MEGATRON" \
            || fail "pip could not install $FLUID_MEGATRON; the reason stands above"
    fi
    say "installing fluid_npu and what it needs"
    "$python" -m pip install --disable-pip-version-check --editable ".[$extras]" \
        | { grep --line-buffered -v '^Requirement already satisfied' || true; } \
        || fail "pip could not install fluid_npu; the reason stands above"
    printf '%s\n' "$key" >"$stamp" 2>/dev/null || true # a read-only environment is only asked again next time
}

# pytest arguments where torch is not the one that the simulated NPU is built for.
# shellcheck disable=SC2034 # of those who source this
without_simulator=(--ignore tests/sim --ignore tests/order/test_on_the_simulator.py
    --ignore tests/order/test_training_on_the_simulator.py)
