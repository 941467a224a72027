#!/usr/bin/env bash
# What only CUDA GPUs can check, on two of them: the tests marked cuda, compute-sanitizer over our kernels, and a soak.
#
#   bash scripts/gpu_tests.sh OUT_DIR [PART...]        PART: tests sanitize soak (default: all, at most 560 s)
#
# Needs fluid_npu and pytest importable by python3. The tests run in four processes side by side, those of one GPU on one each.
# Leaves OUT_DIR/gpu-tests.txt and what each part printed in OUT_DIR/gpu-tests.tar.gz. A part that fails or runs out of time
# does not stop the next; exit code 1 then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${1:?usage: gpu_tests.sh OUT_DIR [PART...]}"
shift
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(tests sanitize soak)
mkdir -p "$out"
record="$out/gpu-tests.txt"
: >"$record"
work="$(mktemp -d)"
failed=0
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
soaked=(ours-overlapped ours-once ours-static ours-static-graph ours-static-local-first-graph ours-once-local-first-graph ours-peer ours-2-chunks)

# Files of tests, by who may run beside whom: one GPU, the other, both, both.
shares=("tests/device/test_triton_kernels.py"
    "tests/device/test_cuda_kernels.py tests/device/test_cuda_attention.py tests/ops tests/order/test_on_cuda.py"
    "tests/device/test_cuda_graph.py"
    "tests/device/test_cuda_context.py tests/device/test_device_splits.py tests/comm/test_on_cuda_transports.py")
gpus=(0 1 "0,1" "0,1")
while read -r file; do
    case " ${shares[*]} " in
        *" $file "* | *" $(dirname "$file") "*) ;;
        *) echo "gpu_tests.sh: $file has tests for CUDA and is in no share; add it" >&2; exit 2 ;;
    esac
done < <(grep -rlE --include='test_*.py' 'mark\.cuda' tests)

cuda_tests() {
    local processes=() share code files
    for share in "${!shares[@]}"; do
        read -ra files <<<"${shares[$share]}"
        CUDA_VISIBLE_DEVICES="${gpus[$share]}" timeout --kill-after=5 220 python3 -m pytest -q -p no:cacheprovider -m cuda \
            --durations=5 "${files[@]}" >"$work/tests-$share.txt" 2>&1 &
        processes+=("$!")
    done
    for share in "${!processes[@]}"; do
        code=0
        wait "${processes[$share]}" || code=$?
        echo "-- ${shares[$share]}: exit code $code" | tee -a "$record"
        ((code == 0)) || failed=1
        tail -n 12 "$work/tests-$share.txt" | cut -c1-300 | tee -a "$record"
    done
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
for name in "${parts[@]}"; do
    start=$SECONDS
    echo "== $name" | tee -a "$record"
    case "$name" in
        tests) cuda_tests ;;
        sanitize)
            LIMIT=220 bash scripts/gpu_sanitize.sh "$work" >"$work/sanitize.txt" 2>&1 || failed=1
            cut -c1-300 "$work/sanitize.txt" | tail -n 40 | tee -a "$record"
            ;;
        soak)
            timeout --kill-after=5 110 python3 scripts/soak.py --device cuda --dtype bf16 --impl "${soaked[@]}" >"$work/soak.txt" 2>&1 ||
                { failed=1; echo "FAILED or over 110 s" | tee -a "$record"; }
            tail -n 20 "$work/soak.txt" | cut -c1-400 | tee -a "$record"
            ;;
        *) echo "gpu_tests.sh: no part '$name'; give tests, sanitize or soak" >&2; exit 2 ;;
    esac
    echo "-- $name: $((SECONDS - start)) s" | tee -a "$record"
done
# The record travels with the repository: no paths of this machine in it.
sed -i -e "s|$work|OUT|g" -e "s|$out|OUT|g" -e "s|$PWD|.|g" "$record" "$work"/*.txt
tar -C "$work" -czf "$out/gpu-tests.tar.gz" .
rm -rf "$work"
exit "$failed"
