"""Grouped experts under Megatron's dispatchers, and our dispatcher in Megatron's layer, against stock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.support.device import can_fuse, here
from tests.support.moe import HIDDEN, Case, all_weights, fluid_layer, inputs, load, make_config, relative, stock_layer


def forward_backward(case: Case) -> dict[str, torch.Tensor]:
    """Output, input gradient and weight gradients (``grad`` or ``main_grad``) of one layer on this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    layer = stock_layer(case) if case.impl == "stock" else fluid_layer(case)
    load(layer, all_weights(case), case, parallel_state.get_expert_model_parallel_rank())
    for number, parameter in enumerate(layer.shared_experts.parameters() if layer.shared_experts is not None else ()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = here(torch.randn(parameter.shape, generator=generator) * 0.2)
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    x, g = (here(value) for value in inputs(case, dist.get_rank(), 0))
    x.requires_grad_()
    out, _ = layer(x)
    (out * g).sum().backward()
    return {"out": out.detach(), "dx": x.grad, **_weight_gradients(layer)}


def _weight_gradients(layer: Any) -> dict[str, torch.Tensor]:
    from fluid_npu.mcore.convert import named_views

    def gradient(parameter: Any) -> torch.Tensor:
        return parameter.main_grad if parameter.grad_added_to_main_grad else parameter.grad.float()

    return {name: view(gradient(parameter)).clone() for name, parameter, view in named_views(layer)}


def errors_by_kind(kinds: list[str], tp: int, shared: int | None = None) -> dict[str, dict[str, float]]:
    """Relative errors of ours to stock by dispatcher and tensor. Ranks: EP 2; with ``tp`` 2 the same two ranks."""
    found = {}
    for kind in kinds:
        extra: dict[str, Any] = {"moe_token_dispatcher_type": kind, "moe_router_dtype": "fp32"}
        if tp > 1:
            extra.update(tensor_model_parallel_size=tp, sequence_parallel=True)
        if shared is not None:
            extra["moe_shared_expert_intermediate_size"] = shared
        case = Case(ep=2, config=extra, fuse=shared is None or can_fuse())
        stock = forward_backward(replace(case, impl="stock"))
        ours = forward_backward(case)
        assert stock.keys() == ours.keys()
        found[kind] = {name: relative(ours[name], stock[name]) for name in stock}
    return found


def make_dispatcher(case: Case) -> Any:
    """A FluidTokenDispatcher of this rank."""
    from megatron.core import parallel_state

    from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher

    local = case.experts // case.ep
    first = parallel_state.get_expert_model_parallel_rank() * local
    return FluidTokenDispatcher(
        local, list(range(first, first + local)), config=make_config(case), dispatch=case.dispatch
    )


def in_stock_layer(case: Case) -> dict[str, Any]:
    """Megatron's own MoELayer with SequentialMLP, once with its dispatcher and once with ours."""
    layer = stock_layer(case)
    results = []
    for dispatcher in (layer.token_dispatcher, make_dispatcher(case)):
        layer.token_dispatcher = dispatcher
        layer.zero_grad()
        x = here(torch.randn(case.tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(4))).requires_grad_()
        out, _ = layer(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    return {"pairs": list(zip(*results, strict=True))}
