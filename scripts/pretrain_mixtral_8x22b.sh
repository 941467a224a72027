#!/usr/bin/env bash
# Pretrains Mixtral 8x22B on 16 nodes of 8 Ascend A2 NPUs, the AllToAll of its experts hidden. Started on every node.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-16}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the Mixtral tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"

PRESET=mixtral-8x22b
ABOUT="Mixtral 8x22B, 141B parameters. The recipe is ours: the official scripts (64 or 128 NPUs, TP 8, PP 4, EP 1, full
recompute) have no AllToAll and no grouped GEMM. With 8 nodes it fits with full recompute: docs/CLUSTERS.md."

MODEL=(
    --num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384
    --num-attention-heads 48 --group-query-attention --num-query-groups 8
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --no-rope-fusion
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 65536
    --num-experts 8 --moe-router-topk 2
)
PARALLEL=(
    --tensor-model-parallel-size 4 --sequence-parallel # a quarter of the tokens, and so of the rows, for a device
    --pipeline-model-parallel-size 8                   # 7 layers each
    --expert-model-parallel-size 8                     # one expert on each NPU of a node: the AllToAll stays on HCCS
    --expert-tensor-parallel-size 1                    # experts whole: smaller GEMMs would have less to hide behind
)
MOE=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001) # coefficient of the official script
RECOMPUTE=(--recompute-granularity selective --recompute-modules moe_act) # not full: no AllToAll twice
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH"
    --train-iters 10000 --lr 1e-5 --min-lr 1e-6 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=() # the largest AllToAll is 30 MiB: HCCL's 200 MiB hold it

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
