#!/usr/bin/env bash
# Pretrains Qwen3-235B-A22B on 32 nodes of 8 Ascend A2 NPUs, the AllToAll of its experts hidden. Started on every node.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-32}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the Qwen3 tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-1024}"

PRESET=qwen3-235b-a22b
ABOUT="Qwen3-235B-A22B, 235B parameters.
Sizes of the official A3 recipe (MindSpeed-LLM qwen3_moe: 16 nodes of 16 dies, TP 1,
PP 4, VPP 8, EP 32, GBS 1024, grouped GEMM, an overlapped AllToAll); on A3: NNODES=16 NPUS_PER_NODE=16. Ours: the
alltoall dispatcher where it has alltoall_seq (gone from Megatron 0.13 on), --fluid-overlap, the 94 layers dealt with
embedding and loss counted as layers, recompute."

MODEL=(
    --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288
    --num-attention-heads 64 --kv-channels 128 --group-query-attention --num-query-groups 4 --qk-layernorm
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --no-rope-fusion
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 40960
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 1536
)
PARALLEL=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split # 94 + 2 = 4 x 24
    --num-layers-per-virtual-pipeline-stage 3                                      # VPP 8: 24 = 8 x 3
    --expert-model-parallel-size 32 # 4 experts on each device; 4 nodes of A2, 2 of A3
    --expert-tensor-parallel-size 1
)
MOE=(
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001
    --moe-router-dtype fp32 # 128 probabilities in bf16 tie
)
RECOMPUTE=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) # 101 in flight
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" # 1024 in the official recipe
    --train-iters 10000 --lr 1e-5 --min-lr 1e-6 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=(
    HCCL_BUFFSIZE=400         # MiB: the AllToAll of a busy rank is 308
    HCCL_IF_BASE_PORT=48890   # official recipe: HCCL's own range of ports
)

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
