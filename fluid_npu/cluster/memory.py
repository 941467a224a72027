"""Memory of one device: weights, gradients, optimizer, activations of the micro-batches in flight, buffers.

Sources: bytes per parameter are those of Megatron's distributed optimizer (its docs/source/api-guide/
dist_optimizer.md: bf16 parameters with fp32 gradients take 18 bytes, 6 + 12/d when sharded over d ranks). Activations
are the tensors that each operator keeps for its backward, after Korthikanti et al. 2022 ("Reducing Activation
Recomputation in Large Transformer Models"), with their 4h MLP replaced by the experts' rows. Micro-batches in flight
follow get_pp_rank_microbatches() of megatron/core/pipeline_parallel/schedules.py. HCCL keeps twice HCCL_BUFFSIZE for
each communicator. docs/CLUSTERS.md says how far the estimate is from what was measured.

Shapes: T tokens of a rank, R rows after dispatch, H hidden, F expert ffn, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fluid_npu.cluster import activations
from fluid_npu.cluster.parameters import held_by_stage
from fluid_npu.cluster.plan import Plan
from fluid_npu.cluster.problem import Problem

GIB = 2**30
MIB = 2**20
#: What CANN, torch_npu and the allocator's fragments take. Our choice: nothing public says it, and none was measured.
RESERVE_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one device of a pipeline stage, by purpose."""

    stage: int
    dense_params: int
    expert_params: int
    parts: Mapping[str, int]
    in_flight: int
    """Layers times micro-batches whose activations are alive at the peak."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(plan: Plan, env: Mapping[str, str]) -> list[Estimate]:
    """One Estimate for each pipeline stage."""
    return [_stage(plan, stage, env) for stage in range(plan.pp)]


def check(plan: Plan, estimates: Sequence[Estimate]) -> list[Problem]:
    """The fullest stage must fit into the device."""
    worst = max(estimates, key=lambda one: one.total)
    have = plan.cluster.memory_gib
    if worst.total <= have * GIB:
        return []
    largest = max(worst.parts, key=lambda name: worst.parts[name])
    rule = f"pipeline stage {worst.stage} needs about {worst.total / GIB:.1f} GiB, most of it {largest}"
    return [Problem(kind="memory", flag="DEVICE_MEMORY_GIB", value=f"{have:g}", rule=rule, fix=_fix(plan, largest))]


def _fix(plan: Plan, largest: str) -> str:
    if largest == "optimizer" and "--use-distributed-optimizer" in plan.args:
        return f"use more nodes (its states are shared by {plan.edp} copies of an expert), or recompute more"
    return _FIXES[largest]


_FIXES = {
    "weights": "raise --pipeline-model-parallel-size or --expert-model-parallel-size",
    "gradients": "raise --pipeline-model-parallel-size or --expert-model-parallel-size",
    "optimizer": "add --use-distributed-optimizer, or more nodes",
    "activations": "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1, "
    "a smaller --micro-batch-size, or a larger --tensor-model-parallel-size",
    "working set": "use a smaller --micro-batch-size or a larger --tensor-model-parallel-size",
    "HCCL buffers": "lower HCCL_BUFFSIZE",
    "reserve": "use a device with more memory",
}


def exchange_bytes(plan: Plan) -> int:
    """Bytes that the busiest rank receives in one dispatch: its rows of hidden states and probabilities."""
    return activations.rows(plan) * (plan.size("--hidden-size") * activations.width(plan) + 4)


def parameter_bytes(plan: Plan) -> tuple[int, int, float]:
    """Bytes of one parameter as (weight, gradient, optimizer states before they are sharded)."""
    if activations.width(plan) == 4:
        return 4, 4, 8.0  # fp32 weights are their own master copy: Adam's two moments remain
    return 2, 2 if "--grad-reduce-in-bf16" in plan.args else 4, 12.0


def layers_in_flight(plan: Plan, stage: int) -> int:
    """Layers times micro-batches alive when the first backward starts."""
    layers = len(plan.stages[stage])
    if plan.vpp == 1:
        return layers * min(plan.pp - stage, plan.micro_batches)
    chunks = (plan.pp - stage - 1) * 2 + (plan.vpp - 1) * plan.pp + 1
    return -(-layers * min(chunks, plan.micro_batches * plan.vpp) // plan.vpp)


def _stage(plan: Plan, stage: int, env: Mapping[str, str]) -> Estimate:
    held = held_by_stage(plan, stage)
    weight, gradient, states = parameter_bytes(plan)
    sharded = "--use-distributed-optimizer" in plan.args
    dense_copies, expert_copies = (plan.dp * plan.cp, plan.edp) if sharded else (1, 1)
    parts = {
        "weights": weight * held.total,
        "gradients": gradient * held.total,
        "optimizer": int(states * held.dense / dense_copies + states * held.expert / expert_copies),
        "activations": _kept(plan, stage),
        "working set": _working_set(plan, stage),
        "HCCL buffers": _communicators(plan) * 2 * int(env.get("HCCL_BUFFSIZE", 200)) * MIB,
        "reserve": int(RESERVE_GIB * GIB),
    }
    return Estimate(
        stage=stage,
        dense_params=held.dense,
        expert_params=held.expert,
        parts=parts,
        in_flight=layers_in_flight(plan, stage),
    )


def _kept(plan: Plan, stage: int) -> int:
    """Activations between forward and backward."""
    layers = plan.stages[stage]
    if not layers:
        return 0
    total = sum(activations.kept_by_layer(plan, layer, index) for index, layer in enumerate(layers))
    return total * layers_in_flight(plan, stage) // len(layers)


def _working_set(plan: Plan, stage: int) -> int:
    """The largest of: one layer's backward (with what full recompute makes anew), and the loss on the last stage."""
    model = plan.model
    layers = plan.stages[stage]
    moe = any(layer >= model.first_dense_layers for layer in layers)
    largest = activations.backward_peak(plan, moe) if layers else 0
    if plan.args.get("--recompute-granularity") == "full" and layers:
        blocks = plan.size("--recompute-num-layers") if plan.args.get("--recompute-method") == "uniform" else 1
        largest += blocks * activations.full_layer(plan, moe)
    return max(largest, activations.loss_peak(plan) if stage == plan.pp - 1 else 0)


def _communicators(plan: Plan) -> int:
    """Groups of more than one rank that exchange data: all, TP, PP, DP, CP, EP, ETP, expert DP."""
    sizes = (plan.cluster.world, plan.tp, plan.pp, plan.dp, plan.cp, plan.ep, plan.etp, plan.edp)
    return sum(size > 1 for size in sizes)
