#!/usr/bin/env bash
# Pretrains DeepSeek-V3 on 64 nodes of 8 Ascend A2 NPUs, the AllToAll of its experts hidden. Started on every node.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-64}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the DeepSeek-V3 tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-3840}"

PRESET=deepseek-v3
ABOUT="DeepSeek-V3, 671B parameters.
Sizes and environment of the official A2 recipe (MindSpeed-LLM deepseek3: 512 NPUs, TP 4,
PP 8, EP 32, ETP 1, GBS 3840). Ours: --fluid-overlap and Megatron's 1F1B where it has --moe-fb-overlap with DualPipeV;
the last stage has 5 layers where it pads to 64; no multi-token prediction."

# Latent attention with --transformer-impl local is MindSpeed's: stock DotProductAttention refuses its sizes.
MODEL=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512
    --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
    --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 10000 --no-rope-fusion
    --rotary-scaling-factor 1.0 # Megatron's latent attention defaults to YaRN by 40; by 1 it is plain RoPE
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 163840
    --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
    --moe-layer-freq "([0]*3+[1]*58)" # the first three layers are dense
)
PARALLEL=(
    --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 8
    --decoder-last-pipeline-num-layers 5 # 61 = 7 x 8 + 5; the last stage also has the head and the loss
    --expert-model-parallel-size 32      # 8 experts on each NPU; spans 4 nodes
    --expert-tensor-parallel-size 1      # experts whole, as the official recipe
)
MOE=(
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.001
    --moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-topk-scaling-factor 2.5
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001
    --moe-router-dtype fp32 # 256 scores in bf16 tie
)
RECOMPUTE=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) # 64 layers in flight
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH" # 3840 in the official recipe
    --train-iters 10000 --lr 1e-5 --min-lr 1e-7 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=(
    HCCL_BUFFSIZE=400                                # MiB, as the official recipe; the AllToAll of a busy rank is 135
    HCCL_OP_BASE_FFTS_MODE=TRUE                      # official recipe for A2: collectives as FFTS+ tasks
    "HCCL_ALGO=alltoall=level0:NA;level1:pipeline"   # official recipe: between nodes the AllToAll is a pipeline
)

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
