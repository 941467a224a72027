"""Training steps of one MoE layer, as ever or recorded, on a CPU or a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.moe import HIDDEN, Case, _built, all_weights, load, make_config


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A run: SGD on main_grad after each step, other tokens and so other routes in every micro-batch."""

    steps: int = 3
    micro_batches: int = 2
    tokens: int = 24
    topk: int = 3
    overlap: str = "dw"
    dispatch: str = "static"
    chunks: int | str = "auto"
    """With ``overlap`` 'full'."""
    chunks_of: str = "auto"
    graph: bool = False
    recompute: bool = False
    shared: bool = False
    aux: bool = False
    local_first: bool = False
    """With ``overlap`` 'full'."""
    high_priority: bool = False
    """NCCL on a stream of high priority instead of the job's group."""
    fuse: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rate: float = 0.05
    """Of the descent."""
    ep: int = 2
    kept: bool = True
    """Whether the result has the tensors."""


def run_steps(run: Steps, watch: AbstractContextManager[Any] | None = None, watch_from: int = 1) -> dict[str, Any]:
    """Outputs, input gradients and weights by name, the scheduler's statistics, and whether the layer was recorded.

    ``watch`` is around each forward and backward from step ``watch_from`` on.
    """
    import torch.distributed as dist

    layer = _layer(run)
    result: dict[str, torch.Tensor] = {}
    for step in range(run.steps):
        for micro in range(run.micro_batches):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
            x, g = (torch.randn(run.tokens, 1, HIDDEN, generator=generator).to(run.dtype) for _ in range(2))
            x, g = x.to(run.device).requires_grad_(), g.to(run.device)
            with watch if watch is not None and step >= watch_from else nullcontext():
                out, _ = layer(x)
                out.backward(g)
            if run.kept:
                result[f"out {step} {micro}"], result[f"dx {step} {micro}"] = out.detach(), x.grad
        _descend(layer, run.rate)
        if run.kept:
            result.update({f"{name} {step}": p.detach().clone() for name, p in layer.named_parameters()})
    recorded = layer.graphed is not None and layer.graphed.recorded
    held = layer.graphed.held_bytes if layer.graphed is not None else 0
    return {"tensors": result, "stats": layer.backward_scheduler.get_stats(), "recorded": recorded, "held": held}


def _layer(run: Steps) -> Any:
    from megatron.core import parallel_state

    from fluid_npu.comm.transports import high_priority_transport
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    config: dict[str, Any] = {"moe_router_dtype": "fp32"}
    if run.recompute:
        config |= {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    if run.aux:
        config |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 1e-2}
    if run.shared:
        config |= {"moe_shared_expert_intermediate_size": 16}
    case = Case(ep=run.ep, topk=run.topk, fuse=run.fuse, dtype=run.dtype, config=config)
    made = make_config(case)
    spec = get_fluid_moe_layer_spec(
        made,
        overlap=run.overlap,
        dispatch=run.dispatch,
        chunks=run.chunks,
        cuda_graph=run.graph,
        chunks_of=run.chunks_of,
        local_first=run.local_first,
        transport=high_priority_transport() if run.high_priority else None,
    )
    layer = _built(spec.submodules.mlp, made).to(run.device)
    layer.set_layer_number(1)
    load(layer, all_weights(case), case, parallel_state.get_expert_model_parallel_rank())
    for parameter in layer.parameters():
        if run.fuse:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
    return layer


def _descend(layer: Any, rate: float) -> None:
    """p -= rate * grad, from main_grad where it was added there; gradients are zeroed in place."""
    for parameter in layer.parameters():
        added = getattr(parameter, "grad_added_to_main_grad", False)
        grad = parameter.main_grad if added else parameter.grad
        with torch.no_grad():
            parameter -= rate * grad.to(parameter.dtype)
        if added:
            parameter.main_grad.zero_()
            parameter.grad_added_to_main_grad = False
        parameter.grad = None
