#!/usr/bin/env bash
# What can be checked on a machine with two CUDA GPUs: kernels, parity and training over NCCL, the step's time.
#
#   bash scripts/gpu_check.sh OUT_DIR
#
# Needs fluid_npu importable by python3. Leaves OUT_DIR/gpu-check.txt and the JSON of the benchmark beside it. Every
# part runs even when one before it failed; the exit code is 1 when any failed.
set -uo pipefail
out="${1:?usage: gpu_check.sh OUT_DIR}"
mkdir -p "$out"
record="$out/gpu-check.txt"
failed=0

part() {
    echo "== $*" | sed -e "s|$out|OUT|g" | tee -a "$record"
    local start=$SECONDS
    "$@" >"$out/last.txt" 2>&1 || { failed=1; echo "FAILED" | tee -a "$record"; }
    # The record travels with the repository: no paths of this machine in it.
    tail -n 45 "$out/last.txt" | sed -e "s|$out|OUT|g" | tee -a "$record"
    echo "-- $((SECONDS - start)) s" | tee -a "$record"
}

cli=(python3 -m fluid_npu)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
part python3 -m pytest -q -p no:cacheprovider -m "not nightly" tests/device tests/ops
part "${cli[@]}" parity --device cuda --preset h64 --steps 20
# One step: over several, bf16 routing drifts apart and the comparison is of different experts.
part "${cli[@]}" parity --device cuda --preset mixtral-tiny --steps 1 --dtype bf16
part "${cli[@]}" train --device cuda --dtype bf16 --preset mixtral-tiny --steps 60 --overlap dw --out "$out/run" --json
part "${cli[@]}" bench train-step --device cuda --dtype bf16 --cases h64 h256 --out "$out/bench"
cp "$out/bench/train-step.json" "$out/gpu-train-step.json" 2>/dev/null
rm -rf "$out/run" "$out/bench" "$out/last.txt"
exit "$failed"
