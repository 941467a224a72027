# shellcheck shell=bash
# Sourced by scripts/pretrain_*.sh after their top part: environment, common arguments, --dry-run, --local, start.
#
# A script sets PRESET, ABOUT (what it trains, and whose recipe), the variables of its top part, and the arrays
# MODEL, PARALLEL, MOE, RECOMPUTE, TRAINING and RECIPE_ENVIRONMENT (NAME=VALUE); each may be empty.
# docs/CLUSTERS.md is the manual.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    # The active environment's; else the one that scripts/quickstart.sh made.
    if [[ -z "${VIRTUAL_ENV:-}" && -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
NNODES="${NNODES:?set by the script}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
NPUS_PER_NODE="${NPUS_PER_NODE:-8}"
DEVICE_MEMORY_GIB="${DEVICE_MEMORY_GIB:-64}"
MEGATRON="${MEGATRON:-}"
MEGATRON_VERSION="${MEGATRON_VERSION:-}"
DATA="${DATA:-}"
TOKENIZER="${TOKENIZER:-}"
OUT="${OUT:-}"
FLUID_OVERLAP="${FLUID_OVERLAP:-dw}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

usage() {
    cat <<HELP
$ABOUT

usage: bash scripts/$(basename "$0") [--dry-run | --local] [--json] [-- ARGUMENTS OF pretrain_gpt.py]

  Edit the top of the script, or set its variables in the environment, and start it on every node:
    NODE_RANK=0 MASTER_ADDR=node0 bash scripts/$(basename "$0")

  --dry-run   check everything and print the command of every node; nothing is started
  --local     the same arguments with tiny sizes on two CPU processes of this machine
  --json      with --dry-run: the check as JSON, without the commands
  --help      this text
  after --    arguments that replace the script's, or are added

variables (now):
  NNODES=$NNODES NODE_RANK=$NODE_RANK NPUS_PER_NODE=$NPUS_PER_NODE DEVICE_MEMORY_GIB=$DEVICE_MEMORY_GIB
  MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT
  MEGATRON=$MEGATRON          a Megatron-LM checkout with our launch line: fluid-npu megatron-lm apply
  MEGATRON_VERSION=$MEGATRON_VERSION  whose flags to expect where the checkout does not say it
  DATA=$DATA              prefix of the .bin and .idx files
  TOKENIZER=$TOKENIZER         folder or file of the tokenizer
  OUT=$OUT               checkpoints, TensorBoard events and our report; one shared folder
  FLUID_OVERLAP=$FLUID_OVERLAP      off, dw or auto
  PYTHON=$PYTHON      the interpreter that has fluid_npu
Exit codes: 0 done, 2 the check found an error, 3 only files are missing, else torchrun's.
HELP
}

# ---- Environment. A value that is set already stays. Sources: docs/CLUSTERS.md, "Environment".

ENVIRONMENT=()
set_default() {
    ENVIRONMENT+=("$1")
    export "$1=${!1-$2}"
}

# What only one model's recipe has: NAME=VALUE, set by the script. First, so that it counts.
for pair in "${RECIPE_ENVIRONMENT[@]}"; do set_default "${pair%%=*}" "${pair#*=}"; done
# Megatron asserts 1 with tensor parallelism. An NPU has no such queues; the order of issue is the host's.
set_default CUDA_DEVICE_MAX_CONNECTIONS 1
# Uneven splits change sizes at every step: growing segments keep the allocator from fragmenting.
set_default PYTORCH_NPU_ALLOC_CONF expandable_segments:True
# Operators are queued and their workspaces too: the host runs ahead, which overlap needs. Costs some memory.
set_default TASK_QUEUE_ENABLE 2
# 1 would make the host wait for every operator: nothing would overlap.
set_default ASCEND_LAUNCH_BLOCKING 0
# Each process on the cores beside its NPU.
set_default CPU_AFFINITY_CONF 1
# The queue optimisation for operators that are not contiguous; in MindSpeed's environment script.
set_default COMBINED_ENABLE 1
# No list of permitted hosts: the nodes are the scheduler's.
set_default HCCL_WHITELIST_DISABLE 1
# Seconds to connect: large jobs start their processes far apart. At most 7200.
set_default HCCL_CONNECT_TIMEOUT 3600
# Seconds of a collective: the first step compiles, checkpoints are written meanwhile.
set_default HCCL_EXEC_TIMEOUT 3600
# Above HCCL_EXEC_TIMEOUT, else torch_npu gives up before HCCL says what was stuck.
set_default HCCL_EVENT_TIMEOUT 3668
# MiB, twice for each communicator; HCCL's default. Scripts whose AllToAll is larger set more.
set_default HCCL_BUFFSIZE 200
# Buffers of a collective in flight are kept by weak references and freed when it is waited for (torch_npu's default).
set_default MULTI_STREAM_MEMORY_REUSE 1
# One thread for each process: the cores are the task queue's.
set_default OMP_NUM_THREADS 1

# ---- Arguments of pretrain_gpt.py that all scripts share.

COMMON=(
    --distributed-backend nccl   # becomes hccl: torch_npu.contrib.transfer_to_npu, which MindSpeed imports
    --transformer-impl local     # Transformer Engine does not exist for an NPU
    --bf16
    --attention-dropout 0.0 --hidden-dropout 0.0
    --use-flash-attn             # MindSpeed takes npu_fusion_attention; without it the scores would be kept
    --no-masked-softmax-fusion   # CUDA kernels of Megatron
    --attention-softmax-in-fp32
    --no-gradient-accumulation-fusion  # apex's CUDA kernel; the experts have our own, see MOE
    --use-distributed-optimizer  # optimizer states over the data-parallel ranks
    --overlap-grad-reduce --overlap-param-gather
    --init-method-std 0.02 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --lr-decay-style cosine
    --log-interval 1 --log-throughput --save-interval 1000 --eval-interval 1000 --eval-iters 10
    --distributed-timeout-minutes 60
)

# The AllToAll and what hides it; the same in every script.
FLUID=(
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm                     # one grouped GEMM for the experts of a rank: FluidGroupedMLP
    --gemm-gradient-accumulation-fusion    # dW of the experts straight into fp32 main_grad
    --fluid-overlap "$FLUID_OVERLAP"       # dW runs while the AllToAlls of the backward fly
)

INPUT=(--tokenizer-type HuggingFaceTokenizer --split "990,8,2")
if [[ -n "$TOKENIZER" ]]; then INPUT+=(--tokenizer-model "$TOKENIZER"); fi
if [[ -n "$DATA" ]]; then
    read -ra prefixes <<<"$DATA" # several, with weights: 0.3 first 0.7 second
    INPUT+=(--data-path "${prefixes[@]}")
fi
if [[ -n "$OUT" ]]; then
    INPUT+=(--save "$OUT/checkpoints" --load "$OUT/checkpoints" --tensorboard-dir "$OUT/tensorboard")
    INPUT+=(--fluid-report "$OUT/fluid-report")
fi

# ---- The command of a node.

# Takes the flags of the arguments, with their values, out of ARGUMENTS: what follows -- replaces what the script says.
drop_replaced() {
    local kept=() word keep=1 given=" "
    for word in "$@"; do
        if [[ "$word" == --* ]]; then given+="${word%%=*} "; fi
    done
    for word in "${ARGUMENTS[@]}"; do
        if [[ "$word" == --* ]]; then
            if [[ "$given" == *" $word "* ]]; then keep=0; else keep=1; fi
        fi
        if ((keep)); then kept+=("$word"); fi
    done
    ARGUMENTS=("${kept[@]}")
}

# Sets COMMAND to what the node of rank $1 runs.
command_of_node() {
    COMMAND=(
        torchrun --nnodes "$NNODES" --node-rank "$1" --nproc-per-node "$NPUS_PER_NODE"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
        "${MEGATRON:-MEGATRON}/pretrain_gpt.py" "${ARGUMENTS[@]}"
    )
}

check_job() {
    "$PYTHON" -m fluid_npu cluster check --preset "$PRESET" --nnodes "$NNODES" --nproc-per-node "$NPUS_PER_NODE" \
        --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --device-memory "$DEVICE_MEMORY_GIB" --megatron "$MEGATRON" --megatron-version "$MEGATRON_VERSION" \
        "$@" -- "${ARGUMENTS[@]}"
}

print_commands() {
    local rank name
    printf '\nenvironment of every node:\n'
    for name in "${ENVIRONMENT[@]}"; do printf '  export %s=%q\n' "$name" "${!name}"; done
    for ((rank = 0; rank < NNODES; rank++)); do
        command_of_node "$rank"
        printf '\nnode %s:\n ' "$rank"
        printf ' %q' "${COMMAND[@]}"
        printf '\n'
    done
}

dry_run() {
    local code=0
    check_job "$@" || code=$?
    if [[ "$*" != *--json* ]]; then print_commands; fi
    exit "$code"
}

start() {
    local code=0
    check_job || code=$?
    if ((code != 0)); then fail "nothing was started: the check above found what to correct"; fi
    command -v torchrun >/dev/null || fail "torchrun is not on the PATH; activate the environment that has torch"
    command_of_node "$NODE_RANK"
    exec "${COMMAND[@]}"
}

main() {
    local mode=start json=()
    while (($#)); do
        case "$1" in
            --help | -h)
                usage
                exit 0
                ;;
            --dry-run) mode=dry_run ;;
            --local) mode=local ;;
            --json) json=(--json) ;;
            --)
                shift
                break
                ;;
            *) fail "$1: unknown; allowed: --dry-run, --local, --json, --help; pretrain_gpt.py's arguments follow --" ;;
        esac
        shift
    done
    if ((${#json[@]})) && [[ "$mode" != dry_run ]]; then fail "--json: belongs to --dry-run"; fi
    ARGUMENTS=("${MODEL[@]}" "${PARALLEL[@]}" "${MOE[@]}" "${FLUID[@]}" "${RECOMPUTE[@]}")
    ARGUMENTS+=("${TRAINING[@]}" "${COMMON[@]}" "${INPUT[@]}")
    drop_replaced "$@"
    ARGUMENTS+=("$@")
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    case "$mode" in
        dry_run) dry_run "${json[@]}" ;;
        local)
            exec "$PYTHON" -m fluid_npu cluster local --preset "$PRESET" --megatron "$MEGATRON" \
                --megatron-version "$MEGATRON_VERSION" ${OUT:+--out "$OUT"} -- "${ARGUMENTS[@]}"
            ;;
        start) start ;;
    esac
}
