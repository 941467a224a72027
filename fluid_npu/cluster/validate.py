"""The rules that a job must keep: divisibility, batches, pipeline, experts, dtype, overlap, recompute.

Each rule is a function from a Plan to Problems; where a rule is Megatron's own, its docstring says where it stands
(paths below megatron/ of tag core_v0.16.1, unless said otherwise). Environment and files have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fluid_npu.cluster.plan import Plan
from fluid_npu.cluster.problem import ERROR, WARNING, Problem
from fluid_npu.train.presets import PresetError

Rule = Callable[[Plan], Iterator[Problem]]

_TP, _PP, _CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
_EP, _ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
_VPP = "--num-layers-per-virtual-pipeline-stage"


def check(plan: Plan) -> list[Problem]:
    """Every problem of the plan, in the order of the rules."""
    problems = [problem for rule in RULES for problem in rule(plan)]
    if not any(problem.level == ERROR for problem in problems):
        problems += model_figures(plan)
    return problems


def machines(plan: Plan) -> list[Problem]:
    """What torchrun needs to know of the machines."""
    cluster, found = plan.cluster, []
    for name, count in (("NNODES", cluster.nodes), ("NPUS_PER_NODE", cluster.per_node)):
        if count < 1:
            found.append(_problem("cluster", name, count, "must be at least 1", f"set {name}=1"))
    if not 0 <= cluster.node_rank < max(cluster.nodes, 1):
        rule = f"must be from 0 to {cluster.nodes - 1}, another on every node"
        found.append(_problem("cluster", "NODE_RANK", cluster.node_rank, rule, "set NODE_RANK=0 on the first node"))
    if cluster.nodes > 1 and cluster.master_addr in ("localhost", "127.0.0.1", "::1", ""):
        rule = f"the other {cluster.nodes - 1} nodes cannot reach it"
        fix = "set MASTER_ADDR to node 0's address"
        found.append(_problem("cluster", "MASTER_ADDR", cluster.master_addr or "(empty)", rule, fix))
    if not 1024 <= cluster.master_port <= 65535:
        fix = "set MASTER_PORT=6000"
        found.append(_problem("cluster", "MASTER_PORT", cluster.master_port, "must be from 1024 to 65535", fix))
    if cluster.memory_gib <= 0 or cluster.imbalance < 1:
        rule = "DEVICE_MEMORY_GIB must be above 0 and --imbalance at least 1"
        value = f"{cluster.memory_gib:g}, {cluster.imbalance:g}"
        found.append(_problem("cluster", "--device-memory, --imbalance", value, rule, "use 64 and 1.2"))
    return found


def positive(plan: Plan) -> Iterator[Problem]:
    """Sizes that are counted must be at least 1."""
    for flag in (_TP, _PP, _CP, _EP, _ETP, "--micro-batch-size", "--global-batch-size", "--num-layers", "--seq-length"):
        value = plan.args.get(flag, 1)
        if value < 1:
            yield _problem("size", flag, value, "must be at least 1", f"use {flag} 1")


def world(plan: Plan) -> Iterator[Problem]:
    """TP, PP and CP make up one replica, ETP, EP and PP one of the experts (core/parallel_state.py)."""
    world_size = plan.cluster.world
    ranks = f"the {plan.cluster.nodes} nodes x {plan.cluster.per_node} devices = {world_size} ranks"
    replica = plan.tp * plan.pp * plan.cp
    if world_size % replica:
        rule = f"TP x PP x CP = {plan.tp} x {plan.pp} x {plan.cp} = {replica} must divide {ranks}"
        yield _problem(
            "world", _PP, plan.pp, rule, f"use a multiple of {replica} ranks, or smaller {_TP}, {_PP}, {_CP}"
        )
    experts = plan.etp * plan.ep * plan.pp
    if world_size % experts:
        rule = f"ETP x EP x PP = {plan.etp} x {plan.ep} x {plan.pp} = {experts} must divide {ranks}"
        yield _problem("world", _EP, plan.ep, rule, f"use a multiple of {experts} ranks, or a smaller {_EP} or {_ETP}")


def heads(plan: Plan) -> Iterator[Problem]:
    """Attention is cut by heads, the MLP by its width (core/transformer/transformer_config.py, attention.py)."""
    args, tp = plan.args, plan.tp
    cut = {flag: args.get(flag, 1) for flag in ("--num-attention-heads", "--hidden-size")}
    if "--group-query-attention" in args and "--multi-latent-attention" not in args:
        cut["--num-query-groups"] = args.get("--num-query-groups", 1)
    if "--ffn-hidden-size" in args:
        cut["--ffn-hidden-size"] = args.get("--ffn-hidden-size")
    if "--moe-shared-expert-intermediate-size" in args:
        cut["--moe-shared-expert-intermediate-size"] = args.get("--moe-shared-expert-intermediate-size")
    for flag, value in cut.items():
        if value % tp:
            yield _problem("heads", _TP, tp, f"must divide {flag} {value}", f"use {_TP} {_divisor(value, tp)}")
    moe_ffn = args.get("--moe-ffn-hidden-size", args.get("--ffn-hidden-size", 1))
    if moe_ffn % plan.etp:
        fit = _divisor(moe_ffn, plan.etp)
        yield _problem("heads", _ETP, plan.etp, f"must divide --moe-ffn-hidden-size {moe_ffn}", f"use {_ETP} {fit}")


def layers(plan: Plan) -> Iterator[Problem]:
    """Layers are dealt evenly, unless the ends say how many they take (training/arguments.py)."""
    first, last = (f"--decoder-{end}-pipeline-num-layers" for end in ("first", "last"))
    ends = {flag: plan.args.get(flag) for flag in (first, last) if flag in plan.args}
    middle = plan.pp - len(ends)
    rest = plan.split_layers - sum(ends.values())
    fix = f"use {_PP} {_divisor(plan.split_layers, plan.pp)}, or say {first} N or {last} N"
    if ends and (rest < 0 or (middle > 0 and rest % middle) or (middle <= 0 and rest)):
        rule = f"leaves {rest} of --num-layers {plan.size('--num-layers')} for {middle} stages between the ends"
        flag, value = next(iter(ends.items()))
        fit = value + (rest % middle if middle > 0 else rest)
        yield _problem("layers", flag, value, rule, f"use {flag} {fit}")
    elif not ends and plan.split_layers % plan.pp:
        rule = f"must divide the {plan.split_layers} layers to deal (--num-layers and what counts as one)"
        yield _problem("layers", _PP, plan.pp, rule, fix)
    if ends and plan.split_layers != plan.size("--num-layers"):
        rule = "cannot be given together with --account-for-embedding-in-pipeline-split or -loss-"
        yield _problem("layers", next(iter(ends)), next(iter(ends.values())), rule, "remove one of the two")


def virtual_stages(plan: Plan) -> Iterator[Problem]:
    """The interleaved schedule (training/arguments.py; core/pipeline_parallel/schedules.py for the micro-batches)."""
    if _VPP not in plan.args:
        return
    chunk, per_rank = plan.size(_VPP), plan.split_layers // plan.pp
    if plan.pp < 2:
        yield _problem("layers", _VPP, chunk, f"needs {_PP} of at least 2", f"remove {_VPP}")
    elif "--decoder-first-pipeline-num-layers" in plan.args or "--decoder-last-pipeline-num-layers" in plan.args:
        fix = "use --num-virtual-stages-per-pipeline-rank N instead"
        yield _problem("layers", _VPP, chunk, "cannot be given together with uneven ends", fix)
    elif per_rank % chunk:
        fix = f"use {_VPP} {_divisor(per_rank, chunk)}"
        yield _problem("layers", _VPP, chunk, f"must divide the {per_rank} layers of a stage", fix)
    if plan.vpp > 1 and plan.micro_batches % plan.pp:
        rule = f"gives {plan.micro_batches} micro-batches; interleaved stages need a multiple of {_PP} {plan.pp}"
        batch = plan.micro_batch * plan.dp * plan.pp
        fix = f"use a multiple of {batch}"
        yield _problem("batch", "--global-batch-size", plan.global_batch, rule, fix)


def experts(plan: Plan) -> Iterator[Problem]:
    """Every expert-parallel rank holds as many experts (core/transformer/moe/moe_layer.py)."""
    count = plan.args.get("--num-experts")
    if count is None:
        if plan.ep > 1:
            yield _problem("experts", _EP, plan.ep, "there are no experts without --num-experts", f"remove {_EP}")
        return
    if count % plan.ep:
        fix = f"use {_EP} {_divisor(count, plan.ep)}"
        yield _problem("experts", _EP, plan.ep, f"must divide --num-experts {count}", fix)
    topk = plan.args.get("--moe-router-topk", 2)
    if topk > count:
        yield _problem("experts", "--moe-router-topk", topk, f"must be at most --num-experts {count}", f"use {count}")
    if plan.ep > 1 and plan.tp > 1 and "--sequence-parallel" not in plan.args:
        rule = f"with {_EP} {plan.ep} Megatron needs --sequence-parallel (training/arguments.py)"
        yield _problem("experts", _TP, plan.tp, rule, "add --sequence-parallel")


def batch(plan: Plan) -> Iterator[Problem]:
    """A step is a whole number of micro-batches on every rank (core/num_microbatches_calculator.py)."""
    step = plan.micro_batch * plan.dp
    if plan.global_batch % step:
        rule = f"must be a multiple of micro-batch x data-parallel ranks = {plan.micro_batch} x {plan.dp} = {step}"
        fix = f"use --global-batch-size {-(-plan.global_batch // step) * step}"
        yield _problem("batch", "--global-batch-size", plan.global_batch, rule, fix)
    elif plan.micro_batches < plan.pp:
        rule = f"gives {plan.micro_batches} micro-batches for {plan.pp} pipeline stages: most of the time is bubble"
        fix = f"use --global-batch-size {step * plan.pp * 4}"
        yield _problem("batch", "--global-batch-size", plan.global_batch, rule, fix, level=WARNING)


def sequence(plan: Plan) -> Iterator[Problem]:
    """Sequence parallelism cuts by TP, context parallelism by 2 CP (core/utils.py, get_batch_on_this_cp_rank)."""
    length = plan.sequence
    parts = plan.tp if "--sequence-parallel" in plan.args else 1
    parts *= 2 * plan.cp if plan.cp > 1 else 1
    if length % parts:
        rule = f"must be a multiple of {parts} (TP of sequence parallelism, and 2 CP)"
        fix = f"use --seq-length {-(-length // parts) * parts}"
        yield _problem("sequence", "--seq-length", length, rule, fix)
    positions = plan.args.get("--max-position-embeddings", length)
    if positions < length:
        rule = f"must be at least --seq-length {length}"
        yield _problem("sequence", "--max-position-embeddings", positions, rule, f"use {length}")
    local = plan.args.get("--transformer-impl") == "local" and "--context-parallel-algo" not in plan.args
    if plan.cp > 1 and local and "--moe-grouped-gemm" not in plan.args:
        rule = "Megatron's attention of --transformer-impl local refuses it (transformer/dot_product_attention.py)"
        fix = f"add --moe-grouped-gemm (our attention), use {_CP} 1, or MindSpeed's (--context-parallel-algo)"
        yield _problem("sequence", _CP, plan.cp, rule, fix, level=WARNING)


def dtype(plan: Plan) -> Iterator[Problem]:
    """One of bf16 and fp16; Megatron up to 0.15 takes no experts with fp16 (0.12.1 training/arguments.py:855)."""
    args = plan.args
    if "--fp16" in args and plan.ep > 1 and args.line.startswith("0.12."):
        rule = f"Megatron {args.line} takes no expert parallelism with fp16"
        yield _problem("dtype", "--fp16", "", rule, "use --bf16")
    if "--bf16" in args and "--fp16" in args:
        yield _problem("dtype", "--fp16", "", "cannot be given together with --bf16", "remove one of the two")
    elif "--bf16" not in args and "--fp16" not in args:
        rule = "neither is given: the run would be fp32, at a quarter of the matrix speed of an A2"
        yield _problem("dtype", "--bf16, --fp16", "", rule, "add --bf16", level=WARNING)
    if "--overlap-param-gather" in args and not {"--use-distributed-optimizer", "--overlap-grad-reduce"} <= set(
        args.values
    ):
        rule = "needs --use-distributed-optimizer and --overlap-grad-reduce (training/arguments.py)"
        yield _problem("dtype", "--overlap-param-gather", "", rule, "add both")


def overlap(plan: Plan) -> Iterator[Problem]:
    """What hiding the AllToAll needs; as ``fluid_npu.adaptor.megatron_lm.checks`` refuses it at the launch."""
    args, chosen = plan.args, f"--fluid-overlap {plan.overlap}"
    if plan.overlap == "off":
        return
    dispatcher = args.get("--moe-token-dispatcher-type", "allgather")
    if dispatcher != "alltoall":
        rule = f"{chosen} hides an AllToAll, and this dispatcher has none that it knows"
        fix = "use --moe-token-dispatcher-type alltoall, or --fluid-overlap off"
        yield _problem("overlap", "--moe-token-dispatcher-type", dispatcher, rule, fix)
    if plan.ep == 1:
        fix = f"use a larger {_EP}, or --fluid-overlap off"
        yield _problem("overlap", _EP, 1, f"there is no AllToAll to hide for {chosen}", fix)
    if "--moe-grouped-gemm" not in args:
        rule = f"{chosen} defers the weight gradients of grouped experts"
        yield _problem("overlap", "--moe-grouped-gemm", "", rule, "add it, or use --fluid-overlap off")
    for other in _OTHER_ENGINES & set(args.values):
        rule = f"another engine that moves the same AllToAlls and weight gradients as {chosen}"
        yield _problem("overlap", other, "", rule, f"remove {other}")


_OTHER_ENGINES = {
    "--overlap-moe-expert-parallel-comm",
    "--delay-wgrad-compute",
    "--overlap-dispatch-backward-with-experts-wgrad",
    *("--moe-alltoall-overlap-comm", "--moe-allgather-overlap-comm", "--moe-fb-overlap", "--moe-alltoall-mc2"),
}


def grouped(plan: Plan) -> Iterator[Problem]:
    """What grouped experts are without; the same checks as at the launch."""
    args = plan.args
    if "--moe-grouped-gemm" not in args:
        for flag in {"--gemm-gradient-accumulation-fusion", "--fluid-carry-over"} & set(args.values):
            yield _problem("overlap", flag, "", "is about grouped experts", "add --moe-grouped-gemm")
        return
    if "--disable-bias-linear" not in args:
        yield _problem(
            "overlap", "--moe-grouped-gemm", "", "grouped experts have no biases", "add --disable-bias-linear"
        )
    if "--moe-use-legacy-grouped-gemm" in args:
        rule = "ours take the place of the legacy experts"
        yield _problem("overlap", "--moe-use-legacy-grouped-gemm", "", rule, "remove it")
    if "--gemm-gradient-accumulation-fusion" in args and "--grad-reduce-in-bf16" in args:
        rule = "the fused dW adds into fp32 main_grad, which --grad-reduce-in-bf16 replaces"
        yield _problem("overlap", "--gemm-gradient-accumulation-fusion", "", rule, "remove one of the two")


def recompute(plan: Plan) -> Iterator[Problem]:
    """Which recompute flags belong together (core/transformer/transformer_config.py)."""
    args = plan.args
    granularity, method = args.get("--recompute-granularity"), args.get("--recompute-method")
    number, modules = args.get("--recompute-num-layers"), args.get("--recompute-modules")
    if granularity == "full" and method is None:
        fix = "add --recompute-method uniform --recompute-num-layers 1"
        yield _problem("recompute", "--recompute-granularity", "full", "needs --recompute-method", fix)
    if granularity == "selective" and (method or number):
        flag = "--recompute-method" if method else "--recompute-num-layers"
        yield _problem("recompute", flag, method or number, "belongs to --recompute-granularity full", f"remove {flag}")
    if modules and granularity != "selective":
        fix = "add --recompute-granularity selective, or remove it"
        yield _problem("recompute", "--recompute-modules", " ".join(modules), "belongs to granularity selective", fix)
    most = max((len(stage) for stage in plan.stages), default=0) // plan.vpp
    if number is not None and most and number > most:
        rule = f"a pipeline stage (of each virtual part) has {most} layers"
        yield _problem("recompute", "--recompute-num-layers", number, rule, f"use --recompute-num-layers {most}")


def model_figures(plan: Plan) -> Iterator[Problem]:
    """The figures of the model fit each other, as fluid_npu's presets check it."""
    try:
        plan.model.total_params()
    except (PresetError, ValueError) as error:
        flag, _, rule = str(error).partition(": ")
        rule, _, fix = rule.rpartition("; ")
        yield Problem(kind="model", flag=flag, value="", rule=rule or str(error), fix=fix)


RULES: tuple[Rule, ...] = (
    *(positive, world, heads, layers, virtual_stages, experts),
    *(batch, sequence, dtype, overlap, grouped, recompute),
)


def _problem(kind: str, flag: str, value: object, rule: str, fix: str, level: str = ERROR) -> Problem:
    return Problem(kind=kind, flag=flag, value=str(value), rule=rule, fix=fix, level=level)


def _divisor(whole: int, wanted: int) -> int:
    """The largest divisor of ``whole`` that is at most ``wanted``."""
    return max(number for number in range(1, max(wanted, 1) + 1) if whole % number == 0)
