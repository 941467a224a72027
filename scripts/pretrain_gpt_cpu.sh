#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py on this machine's CPU, through fluid_npu: a tiny MoE model on two processes over gloo.
#
#   fluid-npu megatron-lm apply CHECKOUT
#   bash scripts/pretrain_gpt_cpu.sh CHECKOUT [further arguments of pretrain_gpt.py]
#
# CHECKOUT is a git checkout of Megatron-LM at core_v0.12.1, 0.16.1, 0.18.2 or 0.19.0; 0.18 and 0.19 need Python 3.12.
# Uses the active virtual environment, or PYTHON. Settings, from the environment:
#   STOCK=1     Megatron's own experts: without --moe-grouped-gemm; everything else is the same
#   STEPS=20    steps
#   NPROC=2     processes; EP=2 of them share the experts
#   DATA=PREFIX what `fluid-npu data build` wrote, with VOCAB its vocabulary size; default: Megatron's mock data
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

(($# >= 1)) || fail "usage: bash scripts/pretrain_gpt_cpu.sh CHECKOUT [arguments]"
checkout="$1"
shift
[[ -f "$checkout/pretrain_gpt.py" ]] || fail "CHECKOUT $checkout: no pretrain_gpt.py there; give a Megatron-LM git checkout"
python="${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python}"

"$python" -c 'import fluid_npu' 2>/dev/null || fail "$python has no fluid_npu: pip install -e . in its checkout"
"$python" -m fluid_npu megatron-lm status "$checkout" >/dev/null ||
    fail "the launch line is not there: fluid-npu megatron-lm apply $checkout"

# What megatron/training imports and neither fluid_npu nor the megatron-core wheel installs.
missing="$("$python" - <<'PY'
from importlib.util import find_spec
names = {"six": "six", "triton": "triton", "pydantic": "pydantic", "regex": "regex", "sentencepiece": "sentencepiece", "yaml": "pyyaml"}
print(" ".join(package for module, package in names.items() if find_spec(module) is None))
PY
)"
[[ -z "$missing" ]] || fail "Megatron-LM's training code needs more than fluid_npu installs: $python -m pip install $missing"

nproc="${NPROC:-2}"
steps="${STEPS:-20}"
if [[ -n "${DATA:-}" ]]; then
    [[ -n "${VOCAB:-}" ]] || fail "DATA=$DATA needs VOCAB, its vocabulary size; fluid-npu data info $DATA prints it"
    # Ids come from the files; the tokenizer only has to know how many there are (it adds one for the end of a document).
    data=(--data-path "$(realpath "$DATA.bin" | sed 's/\.bin$//')" --split "98,1,1" --tokenizer-type NullTokenizer --vocab-size "$((VOCAB - 1))")
else
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 255)
fi
model=(
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --expert-model-parallel-size "${EP:-2}"
)
training=(
    --micro-batch-size 4 --global-batch-size "$((4 * nproc))" --train-iters "$steps" --lr 1e-2 --min-lr 1e-3
    --lr-decay-style cosine --lr-warmup-iters 2 --clip-grad 1.0 --seed 1234 --log-interval 1 --eval-iters 1
    --eval-interval 100000 --num-workers 0
)
# What Megatron's defaults set to things that only CUDA has. No --use-cpu-initialization: with it Megatron starts every
# expert-parallel rank with the same experts.
cpu=(
    --fluid-device cpu --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-bias-swiglu-fusion
    --no-masked-softmax-fusion --no-persist-layer-norm
)
experts=(--moe-grouped-gemm --fluid-overlap dw)
[[ "${STOCK:-0}" == 0 ]] || experts=()

cd "$checkout"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS=1
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc" pretrain_gpt.py \
    "${model[@]}" "${training[@]}" "${data[@]}" "${cpu[@]}" "${experts[@]}" "$@"
