"""Whether an MoE layer's forward and backward can be recorded as a whole, and what is in the way.

Asked for by ``cuda_graph``; off by default. What is refused either waits for the host, or leaves work or state outside
the layer that a replay would not touch; 'auto' then leaves the layer as it is. All of it follows from the configuration
and the device, which are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.graphs import GraphRecorder, graph_recorder
from fluid_npu.mcore.agreed_room import AgreedRoom
from fluid_npu.mcore.chunk_choice import AUTO
from fluid_npu.mcore.dispatch_choice import RECORDED_DISPATCHES
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.lines.aux_losses import HAS_TRACKER, tensors_outside
from fluid_npu.mcore.recorded_together import RecordedTogether
from fluid_npu.schedule.graphed import GraphedLayer

#: Options of Megatron that a recording does not cover, the value that switches them off, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "moe_input_jitter_eps": (None, "every replay would draw the same random numbers"),
    "pipeline_model_parallel_size": (1, "several forwards wait for their backwards at a time"),
    "tensor_model_parallel_size": (1, "its collectives have not been recorded yet"),
}

#: What selective recompute may name: nothing of the layer, or what draws no random numbers.
_KEPT_ALONE = frozenset(("moe_act", "core_attn", "mla_up_proj"))


def check_graph(asked: bool | str) -> bool | str:
    """The value itself. Raises ValueError for another one."""
    if asked is not True and asked is not False and asked != AUTO:
        raise ValueError(f"cuda_graph={asked!r}: allowed are True, False and {AUTO!r}")
    return asked


def graphed(layer: Any, forward: Callable[[Tensor], Tensor], asked: bool | str = True) -> GraphedLayer | None:
    """What calls ``forward``, the layer's own, until it can be replayed; None where no recording is made.

    ``asked``: as ``check_graph``. What 'auto' chose is announced. Raises ValueError naming everything that is in the
    way where True was asked.
    """
    if asked is False:
        return None
    recorder: Callable[[], GraphRecorder] | None = None
    problems = list(_obstacles(layer))
    if not problems:
        recorder, reason = graph_recorder(_device_of(layer))
        problems += [reason if asked == AUTO else f"{reason}; leave cuda_graph out"] if recorder is None else []
    if asked == AUTO:
        found = "; ".join(problems) or "nothing is in the way: the host launches forward and backward by one call each"
        Choice(not problems, found).announce("recorded MoE layers")
    if recorder is None:
        if asked == AUTO:
            return None
        raise ValueError(f"cuda_graph=True: {'; '.join(problems)}")
    # A layer is named when it is numbered, after it is built: the first one may be announced without.
    scheduler, name = lambda: layer.backward_scheduler, layer.label or "an MoE layer"
    dispatcher = layer.token_dispatcher
    if dispatcher.dispatch_form.value == "once-per-rank" and dispatcher.room is None:
        dispatcher.room = AgreedRoom(dispatcher.groups.ep)
    together, room = RecordedTogether(dispatcher.groups.ep), dispatcher.room
    return GraphedLayer(layer, forward, scheduler, recorder, name, outside=tensors_outside, agree=together, room=room)


def _device_of(layer: Any) -> torch.device:
    device: torch.device = layer.experts.weight1.device
    return device


def _obstacles(layer: Any) -> Iterator[str]:
    config = layer.config
    if not layer.steps:
        yield f"moe_token_dispatcher_type={config.moe_token_dispatcher_type!r} is Megatron's own; use alltoall"
        return
    if not isinstance(layer.experts, FluidGroupedMLP):
        yield f"experts are {type(layer.experts).__name__}; set moe_grouped_gemm=True"
    form = layer.token_dispatcher.dispatch_form
    if form.value not in RECORDED_DISPATCHES:
        yield (
            f"with dispatch={form.value!r} ({form.reason}) the host waits for sizes; use dispatch='static' or "
            "'once-per-rank'"
        )
    elif layer.token_dispatcher.groups.etp_size > 1:
        yield f"expert_tensor_parallel_size={layer.token_dispatcher.groups.etp_size} exchanges rows again; use 1"
    if layer.chunks.value > 1 and form.value == "static":
        yield f"the layer runs in {layer.chunks.value} chunks; use chunks=1 or dispatch='once-per-rank'"
    if layer._binder.interleave_batches:
        yield "interleave_batches=True has two halves of a micro-batch under way at a time; leave it out"
    if layer.backward_scheduler.carry_over:
        yield "carry_over=True leaves dW for another layer; leave it out"
    transport = layer.backward_scheduler.transport
    if not getattr(transport, "recordable", False):
        name = getattr(transport, "name", "the transport")
        yield (
            f"{name} counts its exchanges on the host, so a replay would repeat the first; use collective, "
            "high-priority or few-ctas"
        )
    kind, modules = config.recompute_granularity, config.recompute_modules or []
    if kind == "full" or (kind == "selective" and not _KEPT_ALONE.issuperset(modules)):
        yield f"recompute_granularity={kind!r} of {modules} keeps random states on the host; unset it"
    losses = config.moe_router_load_balancing_type
    if losses not in ("none", "aux_loss", "seq_aux_loss"):
        yield f"moe_router_load_balancing_type={losses!r} has not been recorded yet; use aux_loss, seq_aux_loss or none"
    elif (losses != "none" or config.moe_z_loss_coeff) and not HAS_TRACKER:
        yield "this Megatron-Core logs auxiliary losses through an object that is not known here; set them to none"
    for option, (off, why) in _REFUSED.items():
        value = getattr(config, option, off)
        if value not in (off, None, 0.0):
            yield f"{option}={value!r}: {why}; set it to {off!r}"
