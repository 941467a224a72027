#!/usr/bin/env bash
# Pretrains Qwen3-30B-A3B on 2 nodes of 8 Ascend A2 NPUs, the AllToAll of its experts hidden. Started on every node.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-2}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the Qwen3 tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-256}"

PRESET=qwen3-30b-a3b
ABOUT="Qwen3-30B-A3B, 30.5B parameters.
Sizes of the official A2 recipe (MindSpeed-LLM qwen3_moe: 16 NPUs, TP 1, PP 2, EP 8,
GBS 256, grouped GEMM, gradient accumulation fusion). Ours: the alltoall dispatcher where it has alltoall_seq (gone from
Megatron 0.13 on), --fluid-overlap (it overlaps nothing), recompute, learning rate."

MODEL=(
    --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
    --num-attention-heads 32 --kv-channels 128 --group-query-attention --num-query-groups 4 --qk-layernorm
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --no-rope-fusion
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 40960
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
)
PARALLEL=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 8 # 16 experts on each NPU; the AllToAll stays inside a node, on HCCS
    --expert-tensor-parallel-size 1
)
MOE=(
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001
    --moe-router-dtype fp32 # 128 probabilities in bf16 tie
)
RECOMPUTE=(--recompute-granularity full --recompute-method block --recompute-num-layers 18) # 6 of 24 layers keep all
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" # 256 in the official recipe
    --train-iters 10000 --lr 1e-5 --min-lr 1e-6 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=() # the largest AllToAll is 154 MiB: HCCL's 200 MiB hold it

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
