#!/usr/bin/env bash
# Pretrains DeepSeek-V2-Lite on one node of 8 Ascend A2 NPUs, the AllToAll of its experts hidden.
set -euo pipefail

# ---- Edit here, or set in the environment.
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"               # another on every node
MASTER_ADDR="${MASTER_ADDR:-localhost}"   # node 0
MASTER_PORT="${MASTER_PORT:-6000}"
MEGATRON="${MEGATRON:-}"                  # Megatron-LM checkout, tag core_v0.12.1 beside MindSpeed
DATA="${DATA:-}"                          # prefix of data.bin and data.idx
TOKENIZER="${TOKENIZER:-}"                # folder of the DeepSeek-V2 tokenizer
OUT="${OUT:-}"                            # shared folder
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
GLOBAL_BATCH="${GLOBAL_BATCH:-64}"

PRESET=deepseek-v2-lite
ABOUT="DeepSeek-V2-Lite, 15.7B parameters.
Sizes of the official 8-NPU recipe (MindSpeed-LLM deepseek2_lite: TP 1, PP 1, EP 8,
grouped GEMM, an overlapped AllToAll). Ours: the alltoall dispatcher where it has alltoall_seq (gone from Megatron 0.13
on), --fluid-overlap where it has --moe-alltoall-overlap-comm, batch size, learning rate."

# Latent attention with --transformer-impl local is MindSpeed's: stock DotProductAttention refuses its sizes.
MODEL=(
    --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --num-attention-heads 16
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
    --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 10000 --no-rope-fusion
    --rotary-scaling-factor 1.0 # Megatron's latent attention defaults to YaRN by 40; by 1 it is plain RoPE
    --seq-length "$SEQ_LENGTH" --max-position-embeddings 163840
    --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816
    --moe-layer-freq "([0]*1+[1]*26)" # the first layer is dense
)
PARALLEL=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8 # 8 experts on each NPU of the node: the AllToAll stays on HCCS
    --expert-tensor-parallel-size 1
)
MOE=(
    --moe-router-pre-softmax --moe-router-topk-scaling-factor 1.0 # weights are not renormalised over the chosen
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.001
    --moe-router-dtype fp32 # 64 probabilities in bf16 tie
)
RECOMPUTE=(--recompute-granularity full --recompute-method block --recompute-num-layers 14) # half of the layers
TRAINING=(
    --micro-batch-size 1 --global-batch-size "$GLOBAL_BATCH"
    --train-iters 10000 --lr 1e-5 --min-lr 1e-6 --lr-warmup-fraction 0.01
)
RECIPE_ENVIRONMENT=() # the largest AllToAll is 116 MiB: HCCL's 200 MiB hold it

# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
main "$@"
