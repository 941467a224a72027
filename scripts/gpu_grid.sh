#!/usr/bin/env bash
# The MoE layer and the overlap of four models on two or four CUDA GPUs, over kinds of network, within DEADLINE seconds.
#
#   [DEADLINE=560] [MODELS="mixtral-8x7b ..."] [PARTS="layer overlap"] bash scripts/gpu_grid.sh OUT_DIR [REGIME...]
#
# REGIME: nvlink (as it is), nvlink-1-connection and nvlink-32-connections (CUDA_DEVICE_MAX_CONNECTIONS), p2p-off
# (NCCL_P2P_DISABLE=1: through host memory), p2p-off-1-cta (that and NCCL_MAX_CTAS=1); default: nvlink and the last two.
# Models: mixtral-8x7b, fine-grained (h2048 f1408 E64 top-6), deepseek-v2-lite, olmoe-1b-7b. Runs gpu_bench.sh for each,
# whose LAYER_FLAGS, LAYER_LIMIT and OVERLAP_FLAGS are the caller's. Leaves OUT_DIR/gpu-grid.txt and, as REGIME/MODEL/, texts and JSON
# in OUT_DIR/gpu-grid.tar.gz. What no time was left for is named. Exit code 1 if a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out="${1:?usage: gpu_grid.sh OUT_DIR [REGIME...]}"
shift
regimes=("$@")
[[ ${#regimes[@]} -gt 0 ]] || regimes=(nvlink p2p-off p2p-off-1-cta)
read -ra models <<<"${MODELS:-mixtral-8x7b fine-grained deepseek-v2-lite olmoe-1b-7b}"
deadline="${DEADLINE:-560}"
longest="${LONGEST:-40}" # seconds of one model: none is started with less left
mkdir -p "$out"
record="$out/gpu-grid.txt"
: >"$record"
grid="$(mktemp -d)"
failed=0

network() {
    case "$1" in
        nvlink) ;;
        nvlink-1-connection) echo CUDA_DEVICE_MAX_CONNECTIONS=1 ;;
        nvlink-32-connections) echo CUDA_DEVICE_MAX_CONNECTIONS=32 ;;
        p2p-off) echo NCCL_P2P_DISABLE=1 ;;
        p2p-off-1-cta) echo NCCL_P2P_DISABLE=1 NCCL_MAX_CTAS=1 ;;
        *) echo "gpu_grid.sh: no regime '$1'; give nvlink, nvlink-1-connection, nvlink-32-connections, p2p-off or p2p-off-1-cta" >&2; return 2 ;;
    esac
}

for regime in "${regimes[@]}"; do
    settings="$(network "$regime")" || exit 2
    for model in "${models[@]}"; do
        if ((SECONDS + longest > deadline)); then
            echo "left out, no time: $regime $model" | tee -a "$record"
            failed=1
            continue
        fi
        preset="$model" cut="--micro-batch-size 1"
        if [[ $model == fine-grained ]]; then
            preset=mixtral-8x7b cut+=" --hidden 2048 --moe-ffn 1408 --experts 64 --topk 6 --heads 16 --kv-heads 16"
        fi
        echo "==== $regime, $model: ${settings:-no settings} ($SECONDS s)" | tee -a "$record"
        read -ra variables <<<"$settings"
        read -ra parts <<<"${PARTS:-layer overlap}"
        env "${variables[@]+"${variables[@]}"}" PRESET="$preset" CUT="$cut" \
            bash scripts/gpu_bench.sh "$grid/$regime/$model" "${parts[@]}" || failed=1
        cat "$grid/$regime/$model/gpu-bench.txt" >>"$record"
        tar -C "$grid/$regime/$model" -xzf "$grid/$regime/$model/gpu-bench.tar.gz"
        rm -f "$grid/$regime/$model/gpu-bench.tar.gz" "$grid/$regime/$model/gpu-bench.txt"
    done
done
tar -C "$grid" -czf "$out/gpu-grid.tar.gz" .
rm -rf "$grid"
echo "gpu_grid.sh: $SECONDS s" | tee -a "$record"
exit "$failed"
