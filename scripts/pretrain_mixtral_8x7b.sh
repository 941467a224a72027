#!/usr/bin/env bash
# Pretrains Mixtral 8x7B on 4 nodes of 8 Ascend A2 NPUs, the AllToAll of its experts hidden. Started on every node.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-4}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the Mixtral tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"

PRESET=mixtral-8x7b
ABOUT="Mixtral 8x7B, 46.7B parameters. The recipe is ours: the official scripts have EP 1 with grouped GEMM (TP 8, CP 4,
64 NPUs), or EP 8 without it (256 A3 dies), so that there is no AllToAll to hide, or nothing that hides it."

MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --no-rope-fusion
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 32768
    --num-experts 8 --moe-router-topk 2
)
PARALLEL=(
    --tensor-model-parallel-size 2 --sequence-parallel # as the A3 recipe; halves a device's tokens and rows
    --pipeline-model-parallel-size 4                   # 8 layers of 8: the optimizer of one expert fits
    --expert-model-parallel-size 8                     # one expert on each NPU of a node: the AllToAll stays on HCCS
    --expert-tensor-parallel-size 1                    # experts whole: smaller GEMMs would have less to hide behind
)
MOE=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.02) # coefficient of the official script
RECOMPUTE=(--recompute-granularity selective --recompute-modules moe_act) # 1/3 of the experts' memory
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" # 128 in the A3 recipe
    --train-iters 10000 --lr 1e-5 --min-lr 1e-6 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=() # the largest AllToAll is 39 MiB: HCCL's 200 MiB hold it

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
