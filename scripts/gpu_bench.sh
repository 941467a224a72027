#!/usr/bin/env bash
# The benches on CUDA GPUs, each part with a time limit of its own: at most 250 s for all.
#
#   bash scripts/gpu_bench.sh OUT_DIR [PART...]        PART: ffn-sweep parallel-sweep overlap layer (default: all)
#
# One GPU runs the sweeps and the layer, two or four (a rank and expert parallelism over each) also overlap. PRESET (mixtral-8x7b) and CUT (more flags, such as
# "--hidden 2048 --moe-ffn 1408 --experts 64 --topk 6") say which model, LAYER_FLAGS and OVERLAP_FLAGS what else those two
# get; LAYER_LIMIT (75) how many seconds a layer may take; NCCL's variables are the caller's and stand in each result. Needs fluid_npu importable by python3. Leaves OUT_DIR/gpu-bench.txt, and the texts and JSON in
# OUT_DIR/gpu-bench.tar.gz. A part that fails or runs out of time does not stop the next; exit code 1 then.
set -uo pipefail
out="${1:?usage: gpu_bench.sh OUT_DIR [PART...]}"
shift
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(ffn-sweep parallel-sweep overlap layer)
read -ra cut <<<"${CUT:-}"
read -ra layer_flags <<<"--rounds 10 ${LAYER_FLAGS:-}"
read -ra overlap_flags <<<"--rounds 10 --workloads W0 W2 ${OVERLAP_FLAGS:-}"
preset="${PRESET:-mixtral-8x7b}"
mkdir -p "$out"
record="$out/gpu-bench.txt"
results="$(mktemp -d)"
failed=0
gpus="$(nvidia-smi --query-gpu=name --format=csv,noheader | wc -l)"
ranks=$((gpus >= 4 ? 4 : gpus >= 2 ? 2 : 1))
common=(--device cuda --dtype bf16 --out "$results")
model=(--preset "$preset" ${cut[@]+"${cut[@]}"} --nproc "$ranks" --ep "$ranks")

part() {
    local limit="$1" start=$SECONDS
    shift
    echo "== fluid-npu $*" | sed -e "s|$results|OUT|g" | tee -a "$record"
    # INT first: the launcher then stops its ranks.
    timeout --signal=INT --kill-after=10 "$limit" python3 -m fluid_npu "$@" >"$results/last.txt" 2>&1 ||
        { failed=1; echo "FAILED or over $limit s" | tee -a "$record"; }
    # The record travels with the repository: no paths of this machine in it.
    tail -n 60 "$results/last.txt" | sed -e "s|$results|OUT|g" | tee -a "$record"
    echo "-- $((SECONDS - start)) s" | tee -a "$record"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$record"
for name in "${parts[@]}"; do
    case "$name" in
        ffn-sweep) part 55 bench ffn-sweep "${common[@]}" --rounds 10 ;;
        parallel-sweep) part 45 bench parallel-sweep "${common[@]}" --rounds 10 ;;
        overlap)
            if ((gpus < 2)); then
                echo "overlap: left out, one GPU has no AllToAll" | tee -a "$record"
            else
                part 60 bench overlap "${common[@]}" "${model[@]}" --layers 1 "${overlap_flags[@]}"
            fi
            ;;
        layer) part "${LAYER_LIMIT:-75}" bench layer "${common[@]}" "${model[@]}" --part moe "${layer_flags[@]}" ;;
        *) echo "gpu_bench.sh: no part '$name'; give ffn-sweep, parallel-sweep, overlap or layer" >&2; exit 2 ;;
    esac
done
rm -f "$results/last.txt"
for file in "$results"/*.txt "$results"/*.json; do
    if [[ -e "$file" ]]; then sed -i -e "s|$results|OUT|g" "$file"; fi
done
tar -C "$results" -czf "$out/gpu-bench.tar.gz" .
rm -rf "$results"
exit "$failed"
