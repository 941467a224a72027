#!/usr/bin/env bash
# Long checks, with a dated record under benchmarks/nightly-YYYY-MM-DD.txt. Run scripts/test.sh first.
#
#   bash scripts/nightly.sh [--torch 2.7.1] [--steps 300] [--only NAME ...]
#
#   python-3.10, python-3.12   other Pythons, where installed: every file compiles, modules without torch import
#   adaptor, lines, mcore ...  tests marked nightly, one part for each folder of tests/ that has some
#   memory                     a training run of --steps steps must stay flat
#   torch                      with --torch VERSION: the tests in a second environment (.venv-torch-VERSION) with that torch,
#                              without tests/sim, whose simulator is built for torch 2.13
# --only runs the named parts alone; a second run of a day is added to the record. Every part runs even when one before it
# failed; the exit code is 1 when any failed. What did not run is recorded so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

mapfile -t folders < <(grep -rl --include='test_*.py' 'mark\.nightly' tests | cut -d/ -f2 | sort -u)
parts=(python-3.10 python-3.12 "${folders[@]}" memory torch)
other_torch=""
steps=300
only=()
while (($#)); do
    case "$1" in
        --torch | --steps | --only)
            [[ $# -ge 2 ]] || fail "$1 needs a value"
            case "$1" in
                --torch) other_torch="$2" ;;
                --steps) steps="$2" ;;
                --only)
                    [[ " ${parts[*]} " == *" $2 "* ]] || fail "--only $2: no such part; there are ${parts[*]}"
                    only+=("$2")
                    ;;
            esac
            shift 2
            ;;
        *) fail "unknown argument $1; allowed: --torch VERSION, --steps N, --only NAME" ;;
    esac
done
if [[ " ${only[*]} " == *" torch "* && -z "$other_torch" ]]; then fail "--only torch needs --torch VERSION"; fi

if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
else
    found="$(find_python)" || exit 1
    make_venv .venv "$found" || exit 1
    python="$PWD/.venv/bin/python"
fi
install_into "$python" dev || exit 1
export OMP_NUM_THREADS=1

record="benchmarks/nightly-$(date -u +%Y-%m-%d).txt"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0
mkdir -p benchmarks

note() { printf '%s\n' "$@" | tee -a "$record"; }

asked() { [[ ${#only[@]} -eq 0 || " ${only[*]} " == *" $1 "* ]]; }

# Runs a part, records its verdict and the last lines of its output: part NAME TITLE COMMAND...
part() {
    local name="$2" start=$SECONDS verdict=passed
    asked "$1" || return 0
    shift 2
    say "$name"
    if ! "$@" >"$work/output" 2>&1; then
        verdict=FAILED
        failed=1
    fi
    note "" "$name: $verdict after $((SECONDS - start)) s"
    # The record travels with the repository: no paths of this machine in it.
    tail -n "${TAIL:-3}" "$work/output" | sed -e "s|${HOME:-/nonexistent}/|~/|g" -e "s|$work/||g" -e "s|$PWD/||g" -e "s|${VIRTUAL_ENV:-/nonexistent}/||g" | sed 's/^/    /' | tee -a "$record"
}

other_python() {
    local interpreter="$1"
    "$interpreter" -m compileall -q -f fluid_npu tests scripts patches || return 1
    "$interpreter" -E -s -c '
import sys
sys.path.insert(0, ".")
import fluid_npu, fluid_npu.train.presets, fluid_npu.report.summary_text
from fluid_npu.cli import build_parser
build_parser().format_help()
assert "torch" not in sys.modules
print("imports without torch:", sys.version.split()[0])'
}

memory_run() {
    "$python" -m fluid_npu train --preset h64 --vocab-size 4096 --steps "$steps" --overlap dw --out "$work/run" --checkpoint-every "$steps" || return 1
    "$python" - "$work/run/metrics.jsonl" <<'PY'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
named = [key for key in rows[-1] if "memory" in key or "rss" in key]
if not named:
    sys.exit("metrics.jsonl has no memory figure")
early, late = rows[len(rows) // 3][named[0]], rows[-1][named[0]]
print(f"{named[0]}: {early:.1f} at step {rows[len(rows) // 3]['step']}, {late:.1f} at step {rows[-1]['step']}")
sys.exit(late > 1.02 * early + 8)
PY
}

# The nightly tests of a folder; their figures (lines that begin with a number) go into the record.
nightly_tests() {
    local code=0
    "$python" -m pytest -q -W ignore -m nightly -rPfE "tests/$1" >"$work/all" 2>&1 || code=$?
    grep -E "^([0-9]+ (ranks|tests|operators)|FAILED|ERROR)" "$work/all" | cut -c1-300
    tail -n 3 "$work/all"
    return "$code"
}

with_torch() {
    local version="$1" folder=".venv-torch-$1" interpreter
    for interpreter in python3.11 python3.10; do
        if command -v "$interpreter" >/dev/null && python_fits "$interpreter"; then
            make_venv "$folder" "$(command -v "$interpreter")"
            (FLUID_TORCH="torch==$version" install_into "$folder/bin/python" dev) || return 1
            "$folder/bin/python" -c 'import torch; print("torch", torch.__version__)'
            "$folder/bin/python" -m pytest -q -rfE "${without_simulator[@]}"
            return
        fi
    done
    echo "not run: needs python3.11 or python3.10"
    return 1
}

say "the other lines of megatron-core, for tests/lines and tests/mcore"
"$python" scripts/megatron_lines.py install || exit 1
if [[ -f "$record" ]]; then note ""; fi
{
    printf 'scripts/nightly.sh, %s UTC, commit %s\n' "$(date -u '+%Y-%m-%d %H:%M')" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    printf 'machine: %s, %s cores\n' "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)" "$(getconf _NPROCESSORS_ONLN)"
    "$python" -c '
import platform
from importlib.metadata import version as v
print("versions: python", platform.python_version(), *(f"{name} {v(name)}" for name in ("torch", "megatron-core", "numpy")))'
} >>"$record"

for version in 3.10 3.12; do
    if command -v "python$version" >/dev/null && python_fits "python$version"; then
        TAIL=1 part "python-$version" "python $version" other_python "python$version"
    elif asked "python-$version"; then
        note "" "python $version: not run, not installed"
    fi
done
for folder in "${folders[@]}"; do
    TAIL=60 part "$folder" "nightly tests of tests/$folder" nightly_tests "$folder"
done
TAIL=1 part memory "memory over $steps steps" memory_run
if [[ -n "$other_torch" ]]; then
    TAIL=4 part torch "tests with torch $other_torch" with_torch "$other_torch"
elif asked torch; then
    note "" "another torch: not run, --torch was not given"
fi
if ((${#only[@]})); then note "" "parts of this run: ${only[*]}"; fi
note "" "result: $( ((failed)) && echo FAILED || echo passed)"
exit "$failed"
