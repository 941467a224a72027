#!/usr/bin/env bash
# The GPU kernels on one CUDA GPU: values against float64, then speed beside the alternatives. At most 150 s.
#
#   bash scripts/gpu_kernels.sh OUT_DIR
#
# Needs fluid_npu and pytest importable by python3. Leaves OUT_DIR/gpu-kernels.txt, OUT_DIR/kernels.json and
# OUT_DIR/gemm-profile.json (decisions for FLUID_GEMM_PROFILE). A kernel that does not compile is reported with its error
# and the rest goes on; exit code 1 then. First, side by side: the tests, and processes that only compile, so that what
# is timed afterwards, alone, is in Triton's cache.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${1:?usage: gpu_kernels.sh OUT_DIR}"
mkdir -p "$out"
record="$out/gpu-kernels.txt"
: >"$record"
failed=0
start=$SECONDS
test_limit=65 compilers=5 budget=70

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
for ((share = 0; share < compilers; share++)); do
    timeout "$test_limit" python3 -m fluid_npu.bench.kernels "$out" --warm "$share/$compilers" >"$out/warm-$share.txt" 2>&1 &
done
words=(grouped_mm dw_ "row_blocks or permute" "activation or rms_norm or nothing or experts")
tests=()
for index in "${!words[@]}"; do
    timeout "$test_limit" python3 -m pytest -q -p no:cacheprovider tests/device/test_triton_kernels.py -m cuda \
        -k "${words[$index]}" >"$out/test-$index.txt" 2>&1 &
    tests+=("$!")
done
for index in "${!tests[@]}"; do
    wait "${tests[$index]}" || { failed=1; echo "FAILED or over $test_limit s: tests of ${words[$index]}" | tee -a "$record"; }
    tail -n 25 "$out/test-$index.txt" | tee -a "$record"
done
wait
grep -hv ': ok$' "$out"/warm-*.txt | cut -c1-400 | tail -n 30 | tee -a "$record"
echo "-- tests and compilation: $((SECONDS - start)) s" | tee -a "$record"

timeout --kill-after=5 $((budget + 12)) python3 -m fluid_npu.bench.kernels "$out" --budget "$budget" >"$out/speed.txt" 2>&1 ||
    { failed=1; echo "FAILED or over time: speed" | tee -a "$record"; }
cat "$out/speed.txt" | tee -a "$record"
echo "-- all: $((SECONDS - start)) s" | tee -a "$record"
# The record travels with the repository: no paths of this machine in it.
sed -i -e "s|$out|OUT|g" -e "s|$PWD|.|g" "$record"
rm -f "$out"/warm-*.txt "$out"/test-*.txt "$out/speed.txt"
exit "$failed"
