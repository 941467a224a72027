#!/usr/bin/env bash
# The first run on real NPUs: what is here, the operators' contracts, parity with stock Megatron, 20 steps measured.
#
#   bash scripts/first_run_on_npu.sh [--quick] [--nproc N] [--out DIR]
#
#   --quick    fewer cases and steps: a few minutes, and what CI runs on the simulated NPU
#   --nproc N  NPUs to use (2)
#   --out DIR  where the report goes (first-run-npu-DATE); it must not exist
#
# Needs fluid_npu with its dev extra, torch_npu and a sourced CANN: source .../ascend-toolkit/set_env.sh. Without an
# NPU: fluid-npu sim exec -- bash scripts/first_run_on_npu.sh --quick
# Every part runs even when one before it failed. DIR.tar.gz is what to send back: report.txt to read, report.json, and
# the output of each part. Paths of this machine, user names and host names are taken out of it.
# Exit code 0: all parts passed; 1: one failed; 2: it could not start.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

refuse() {
    printf '\nerror: %s\n' "$*" >&2
    exit 2
}

quick=0
nproc=2
out="first-run-npu-$(date -u +%Y-%m-%d)"
while (($#)); do
    case "$1" in
        --quick) quick=1 ;;
        --nproc | --out)
            [[ $# -ge 2 ]] || refuse "$1 needs a value"
            if [[ "$1" == --nproc ]]; then nproc="$2"; else out="$2"; fi
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) refuse "unknown argument $1; allowed: --quick, --nproc N, --out DIR" ;;
    esac
    shift
done
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || refuse "--nproc $nproc: must be a number above 0"
((nproc % 2 == 0)) || refuse "--nproc $nproc: must be even, for an expert-parallel size of 2"
[[ ! -e "$out" && ! -e "$out.tar.gz" ]] || refuse "--out $out: it or $out.tar.gz exists; remove it or choose another"

if [[ -n "${VIRTUAL_ENV:-}" ]]; then python="$VIRTUAL_ENV/bin/python"; else python="$(find_python)" || exit 2; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" FLUID_NPU_TESTS=1
seen="$("$python" - <<'PY' 2>&1
from fluid_npu.device import get_device
from fluid_npu.device.npu import load_torch_npu

print("device:", get_device("npu").value.describe())
print("NPUs:", load_torch_npu().npu.device_count())
PY
)" || refuse "no NPU can be used: $(tail -n 1 <<<"$seen")
On a machine without one: fluid-npu sim exec -- bash scripts/first_run_on_npu.sh --quick"
count="$(sed -n 's/^NPUs: //p' <<<"$seen")"
((count >= nproc)) || refuse "--nproc $nproc: this machine has $count NPUs"

mkdir -p "$out" || refuse "--out $out: the folder cannot be made"
rows="$out/parts.tsv"
failed=0

# Takes out what names this machine.
clean() {
    sed -e "s|$PWD|REPOSITORY|g" -e "s|${out%/}/|OUT/|g" -e "s|${HOME:-/nonexistent}|HOME|g" -e "s|${VIRTUAL_ENV:-/nonexistent}|VENV|g" \
        -e "s|$(hostname)|HOST|g" -e "s|${USER:-/nonexistent-user}@|USER@|g"
}

# Runs a part and keeps its output: part NAME COMMAND...
part() {
    local name="$1" start=$SECONDS verdict=passed code=0
    shift
    say "$name: $*" | clean
    "$@" >"$out/$name.raw" 2>&1 || code=$?
    if ((code)); then
        verdict=FAILED
        failed=1
    fi
    clean <"$out/$name.raw" >"$out/$name.txt"
    rm "$out/$name.raw"
    printf '%s\t%s\t%s\t%s\n' "$name" "$verdict" "$code" "$((SECONDS - start))" >>"$rows"
    tail -n 5 "$out/$name.txt"
    printf '%s: %s after %s s\n' "$name" "$verdict" "$((SECONDS - start))"
}

# What the machine says of itself; tools that are not there are named.
machine() {
    printf 'date: %s UTC\ncommit: %s\n' "$(date -u '+%Y-%m-%d %H:%M')" "$(git rev-parse HEAD 2>/dev/null || echo unknown)"
    printf 'simulated: %s\n%s\n' "${FLUID_SIM:-0}" "$(grep -E '^(device|NPUs):' <<<"$seen")"
    uname -srm
    npu-smi info 2>/dev/null || echo "npu-smi: not here"
    cat "${ASCEND_HOME_PATH:-/nonexistent}"/version.cfg 2>/dev/null || echo "CANN version.cfg: not here"
    env | grep -E '^(HCCL|ASCEND|NPU|TASK_QUEUE|PYTORCH_NPU|OMP)' | sort
    "$python" -m pip list 2>/dev/null | grep -iE '^(torch|megatron|mindspeed|fluid|apex|numpy|triton)'
}

tests=("$python" -m pytest -q -rf -p no:cacheprovider)
fluid=("$python" -m fluid_npu)
layer=tests/mcore/test_moe_layer.py
part machine machine
part doctor "${fluid[@]}" doctor
if ((quick)); then
    part operators "${tests[@]}" tests/sim/npu/test_operators.py -k "adds_into_fp32 or reads_counts or swiglu"
    part contracts "${tests[@]}" tests/sim/npu/test_contracts.py -k "gmm and (totals or counts)"
    part parity "${fluid[@]}" parity --device npu --preset h64 --layers 1 --steps 2 --nproc "$nproc"
    part train "${fluid[@]}" train --device npu --preset h64 --layers 1 --vocab-size 4096 --steps 20 --nproc "$nproc" \
        --overlap dw --twin-every 2 --out "$out/run"
else
    part operators "${tests[@]}" tests/sim/npu/test_operators.py -k "not no_simulated_operator" # that one reads a log
    part collectives "${tests[@]}" tests/sim/npu/test_hccl.py
    part layer "${tests[@]}" --device npu "$layer" tests/mcore/test_token_dispatcher.py tests/ops tests/comm tests/schedule
    part model "${tests[@]}" --device npu tests/mcore/test_gpt_model.py
    part parity-fp32 "${fluid[@]}" parity --device npu --preset h64 --steps 20 --nproc "$nproc"
    # One step: over several, bf16 routing drifts apart and the comparison is of different experts.
    part parity-bf16 "${fluid[@]}" parity --device npu --preset mixtral-tiny --steps 1 --dtype bf16 --nproc "$nproc"
    part train "${fluid[@]}" train --device npu --preset mixtral-tiny --dtype bf16 --steps 60 --nproc "$nproc" \
        --overlap dw --twin-every 2 --out "$out/run"
    part bench "${fluid[@]}" bench train-step --device npu --dtype bf16 --steps 20 --nproc "$nproc" --out "$out/bench"
    # Last: a call that is forbidden may leave the device unusable. What passes here, the hardware refuses as documented.
    part contracts "${tests[@]}" tests/sim/npu/test_contracts.py
fi
for file in run/summary.json run/metrics.jsonl bench/train-step.json; do
    if [[ -f "$out/$file" ]]; then clean <"$out/$file" >"$out/${file#*/}"; fi
done
rm -rf "$out/run" "$out/bench"

"$python" - "$rows" "$quick" "$nproc" >"$out/report.json" <<'PY'
import json
import sys

path, quick, nproc = sys.argv[1:]
rows = [line.rstrip("\n").split("\t") for line in open(path)]
parts = [{"name": n, "verdict": v, "exit_code": int(c), "seconds": int(s)} for n, v, c, s in rows]
print(json.dumps({"quick": quick == "1", "nproc": int(nproc), "parts": parts}, indent=2))
PY
{
    cat "$out/machine.txt"
    while IFS=$'\t' read -r name verdict code seconds; do
        printf '\n== %s: %s, exit code %s, %s s\n' "$name" "$verdict" "$code" "$seconds"
        [[ "$name" == machine ]] || tail -n 25 "$out/$name.txt"
    done <"$rows"
} >"$out/report.txt"
rm "$rows"
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" || refuse "--out $out: the archive cannot be written"
printf '\nSend back %s.tar.gz; to read: %s/report.txt\n' "$out" "$out"
exit "$failed"
