"""From a chunked plan to the pipeline that runs it: what FluidMoELayer does with more than one chunk."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher
from fluid_npu.ops.payload import payload_width, wire_dtype
from fluid_npu.schedule.deferred import DeferredWeights
from fluid_npu.schedule.pipeline import Chunk, PendingExperts, Pipeline
from fluid_npu.schedule.scheduler import BackwardScheduler


def obstacle(
    config: TransformerConfig, dispatcher: FluidTokenDispatcher, experts: Any, local_first: bool = False
) -> str | None:
    """What keeps a layer in one piece, or with ``local_first`` local rows from being one more; None for nothing."""
    if not isinstance(experts, FluidGroupedMLP):
        return f"experts are {type(experts).__name__}, and FluidGroupedMLP alone runs in chunks"
    form = dispatcher.dispatch_form.value
    if form == "once-per-node" or (form == "static" and not local_first):
        return f"dispatch={form!r} sends all tokens in one piece; use dispatch='once-per-rank'"
    if dispatcher.groups.etp_size > 1:
        return f"expert_tensor_parallel_size={dispatcher.groups.etp_size}: its exchanges are not chunked; use 1"
    if dispatcher.payload is not None:
        return "an fp8 payload is not coded in chunks; use --a2a-payload-dtype same"
    if config.moe_apply_probs_on_input:
        return "moe_apply_probs_on_input=True is not part of the pipeline; unset it"
    return None


def launch(
    plan: ChunkedPlan,
    x_TH: Tensor,
    probs_TE: Tensor,
    dispatcher: FluidTokenDispatcher,
    experts: FluidGroupedMLP,
    deferred: DeferredWeights | None,
) -> PendingExperts:
    """Starts the dispatch of every chunk."""
    wire = wire_dtype(x_TH.dtype, probs_TE.dtype)
    hidden = x_TH.shape[1]
    scheduler = dispatcher.sink
    assert isinstance(scheduler, BackwardScheduler), "FluidMoELayer gives its dispatcher a scheduler"
    w1_LHF, w2_LFH = experts.constants()
    pipeline = Pipeline(
        chunks=[_chunk(number, plan, x_TH, wire, dispatcher, experts) for number in range(len(plan.chunks))],
        gather=plan.gather(hidden, wire),
        merge=plan.merge(),
        in_one=plan.in_one,
        shared=plan.shared,
        w1_LHF=w1_LHF,
        w2_LFH=w2_LFH,
        deferred=deferred,
        sink=scheduler,
        name=dispatcher.label,
    )
    return pipeline.launch(x_TH, probs_TE.to(wire))


def _chunk(
    number: int,
    plan: ChunkedPlan,
    x_TH: Tensor,
    wire: torch.dtype,
    dispatcher: FluidTokenDispatcher,
    experts: FluidGroupedMLP,
) -> Chunk:
    part: ChunkPlan = plan.chunks[number]
    hidden = x_TH.shape[1]
    row_bytes = hidden * x_TH.element_size()
    stay = int(plan.chunks[0].here)
    which = "local rows" if part.here else f"chunk {number + 1 - stay} of {len(plan.chunks) - stay}"
    label = f"{dispatcher.label} {which}".strip()
    there = None if part.here else part.route(dispatcher.groups, label, _payload_bytes(x_TH))
    return Chunk(
        label=label,
        rows=part.rows,
        experts=part.experts,
        dispatch=there,
        combine=None if part.here else part.route(dispatcher.groups, label, row_bytes, back=True),
        pack=part.pack(hidden, wire),
        unpack=part.sends.unpack(hidden, wire),
        collect=part.sends.collect(),
        spread=part.spread(plan.tokens_shape),
        mlp=experts.chunk(part.tokens_per_expert),
    )


def _payload_bytes(x_TH: Tensor) -> int:
    """Of one payload row."""
    return payload_width(x_TH.shape[1], x_TH.dtype) * x_TH.element_size()
