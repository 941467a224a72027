#!/usr/bin/env bash
# The transports of an AllToAll on two CUDA GPUs of one node: every byte compared, then times. At most 120 s.
#
#   bash scripts/gpu_transports.sh OUT_DIR
#
# Needs fluid_npu and pytest importable by python3. Leaves OUT_DIR/gpu-transports.txt and OUT_DIR/transports.json. What
# fails is reported and the rest goes on; exit code 1 then. NVLink multicast stays off.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${1:?usage: gpu_transports.sh OUT_DIR}"
mkdir -p "$out"
record="$out/gpu-transports.txt"
: >"$record"
failed=0
start=$SECONDS
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS=1

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
timeout --kill-after=3 70 python3 -m pytest -q -p no:cacheprovider tests/comm/test_on_cuda_transports.py -m cuda \
    --durations=5 >"$out/tests.txt" 2>&1 || { failed=1; echo "FAILED or over 70 s: tests" | tee -a "$record"; }
tail -n 40 "$out/tests.txt" | cut -c1-600 | tee -a "$record"
echo "-- tests: $((SECONDS - start)) s" | tee -a "$record"

timeout --kill-after=3 47 python3 -m torch.distributed.run --standalone --nproc-per-node 2 scripts/time_transports.py \
    --out "$out/transports.json" --budget 30 >"$out/speed.txt" 2>&1 ||
    { failed=1; echo "FAILED or over time: speed" | tee -a "$record"; }
tail -n 70 "$out/speed.txt" | cut -c1-600 | tee -a "$record"
echo "-- all: $((SECONDS - start)) s" | tee -a "$record"
# The record travels with the repository: no paths of this machine in it.
sed -i -e "s|$out|OUT|g" -e "s|$PWD|.|g" "$record"
rm -f "$out/tests.txt" "$out/speed.txt"
exit "$failed"
