#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over every test case of our Triton kernels on one CUDA GPU. At most LIMIT s (240).
#
#   [LIMIT=240] bash scripts/gpu_sanitize.sh OUT_DIR [TOOL...]        TOOL: memcheck racecheck (default: both)
#
# Needs fluid_npu importable by python3. memcheck: reads and writes outside of what was allocated (torch's cache of memory is off, so
# that each tensor has its own bounds); racecheck: threads of a block that use shared memory without waiting for each
# other. Cases run in several processes side by side. Leaves OUT_DIR/gpu-sanitize.txt; exit code 1 for any finding, a case
# that failed, or no time left.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${1:?usage: gpu_sanitize.sh OUT_DIR [TOOL...]}"
shift
tools=("$@")
[[ ${#tools[@]} -gt 0 ]] || tools=(memcheck racecheck)
limit="${LIMIT:-240}" shares=6
mkdir -p "$out"
record="$out/gpu-sanitize.txt"
: >"$record"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
failed=0
sanitizer="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)"
[[ -n "$sanitizer" ]] || { echo "gpu_sanitize.sh: no compute-sanitizer; install the CUDA toolkit" >&2; exit 2; }
export FLUID_ROW_KERNELS=triton FLUID_GROUPED_GEMM=triton PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
unset TRITON_INTERPRET

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
"$sanitizer" --version | tail -n 1 | tee -a "$record"
for tool in "${tools[@]}"; do
    processes=()
    for ((share = 0; share < shares; share++)); do
        timeout --kill-after=5 $((limit / ${#tools[@]})) "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
            python3 -m tests.support.triton_cases "$share/$shares" >"$work/$tool-$share.txt" 2>&1 &
        processes+=("$!")
    done
    for share in "${!processes[@]}"; do
        code=0
        wait "${processes[$share]}" || code=$?
        ((code == 0)) || { failed=1; echo "$tool, share $share of $shares: exit code $code (9: findings, 124: out of time)" | tee -a "$record"; }
    done
    passed="$(cat "$work/$tool"-*.txt | grep -c '"failure": null')"
    echo "== compute-sanitizer --tool $tool: $passed cases passed, $SECONDS s" | tee -a "$record"
    grep -h '^{' "$work/$tool"-*.txt | grep -v '"failure": null' | cut -c1-600 | tee -a "$record"
    # The record travels with the repository: no paths of this machine in it.
    grep -h '^=========' "$work/$tool"-*.txt | sort | uniq -c | sort -rn | head -n 60 | sed -e "s|$PWD|.|g" | cut -c1-200 | tee -a "$record"
done
exit "$failed"
