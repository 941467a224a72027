"""One MoE layer on several ranks, and the same layer as a dense loop in float64 on one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from fluid_npu.schedule.scheduler import BackwardScheduler
from tests.support.device import can_fuse, here

HIDDEN, FFN = 16, 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a run is about. ``skew`` biases the router: 0 none, else added to the logit of low expert numbers."""

    ep: int = 2
    experts: int = 8
    topk: int = 2
    tokens: int = 24
    micro_batches: int = 1
    overlap: str = "dw"
    twin: bool = False
    impl: str = "fluid"
    fuse: bool = True
    empty_experts: int = 0
    dtype: torch.dtype = torch.float32
    etp: int = 1
    dispatch: str = "plain"
    node_size: int = 0
    chunks: int | str = "auto"
    chunks_of: str = "auto"
    local_first: bool = False
    transport: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 5


def make_config(case: Case) -> Any:
    """A TransformerConfig of one layer."""
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=case.experts,
        moe_router_topk=case.topk,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        # With one expert a token a softmax over the chosen logits is constant: the router would learn nothing.
        moe_router_pre_softmax=case.topk == 1,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        bf16=case.dtype == torch.bfloat16,
        fp16=case.dtype == torch.float16,
        params_dtype=case.dtype,
        gradient_accumulation_fusion=case.fuse and (case.impl != "stock" or can_fuse()),
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return TransformerConfig(**{**settings, **case.config})


def fluid_layer(case: Case) -> Any:
    """A FluidMoELayer of this rank, built through the Layer Spec."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    config = make_config(case)
    spec = get_fluid_moe_layer_spec(
        config,
        overlap=case.overlap,
        dispatch=case.dispatch,
        chunks=case.chunks,
        chunks_of=case.chunks_of,
        local_first=case.local_first,
        transport=case.transport,
        node_size=case.node_size,
    )
    layer = here(_built(spec.submodules.mlp, config))
    layer.set_layer_number(1)
    return layer


def all_weights(case: Case) -> dict[str, torch.Tensor]:
    """Router, FC1 ``[E, H, 2F]`` or ``[E, H, F]``, FC2 ``[E, F, H]`` of the whole layer, the same on every rank."""
    generator = torch.Generator().manual_seed(case.seed)
    router = torch.randn(case.experts, HIDDEN, generator=generator) * 0.3
    if case.empty_experts:
        router[-case.empty_experts :] = 0.0
    up = 2 * FFN if case.config.get("gated_linear_unit", True) else FFN
    return {
        "router": router,
        "fc1": torch.randn(case.experts, HIDDEN, up, generator=generator) * 0.2,
        "fc2": torch.randn(case.experts, FFN, HIDDEN, generator=generator) * 0.2,
    }


def inputs(case: Case, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[T, 1, H]`` of a rank and the weights of its loss, on the host.

    With ``empty_experts`` every token has a positive first column, which the router answers for the experts that
    shall get tokens: the others get none.
    """
    generator = torch.Generator().manual_seed(100 * case.seed + 10 * rank + micro)
    x = torch.randn(case.tokens, 1, HIDDEN, generator=generator)
    g = torch.randn(case.tokens, 1, HIDDEN, generator=generator)
    return x.to(case.dtype), g.to(case.dtype)


def stock_layer(case: Case) -> Any:
    """Megatron's MoELayer with SequentialMLP."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = make_config(case)
    spec = get_gpt_layer_local_spec(num_experts=case.experts, normalization="RMSNorm").submodules.mlp
    layer = here(_built(spec, config))
    layer.set_layer_number(1)
    return layer


def _built(spec: Any, config: Any) -> Any:
    """The module of a ModuleSpec or, from megatron-core 0.17 on, of a functools.partial."""
    from megatron.core.transformer.spec_utils import build_module

    return spec(config=config) if isinstance(spec, functools.partial) else build_module(spec, config=config)


def load(layer: Any, weights: dict[str, torch.Tensor], case: Case, ep_rank: int) -> None:
    """Copies this rank's part of the weights into a FluidMoELayer."""
    local = case.experts // case.ep
    mine = slice(ep_rank * local, (ep_rank + 1) * local)
    experts = layer.experts
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for name, parameter in sorted(layer.named_parameters()):
            if name.startswith("shared_experts."):  # as all that is not in ``weights``: the same in every run
                generator = torch.Generator().manual_seed(case.seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if case.impl == "stock":
            for expert, fc1, fc2 in zip(experts.local_experts, weights["fc1"][mine], weights["fc2"][mine], strict=True):
                expert.linear_fc1.weight.copy_(fc1.t())
                expert.linear_fc2.weight.copy_(fc2.t())
            return
        experts.weight1.view(experts.fc1_view).copy_(weights["fc1"][mine])
        experts.weight2.view(experts.fc2_view).copy_(weights["fc2"][mine])


class ForcedRouter:
    """Masks experts out of the routing so that they get no token (the reference masks the same)."""

    def __init__(self, layer: Any, empty: int) -> None:
        original = layer.router.gating

        def gating(x: torch.Tensor) -> torch.Tensor:
            logits = original(x)
            if empty:
                mask = logits.new_zeros(logits.shape[-1])
                mask[-empty:] = -1e9
                logits = logits + mask.to(logits.dtype)
            return logits

        layer.router.gating = gating


def run_layer(case: Case) -> dict[str, Any]:
    """Forward and backward of the micro-batches on this rank; outputs, input and weight gradients, routing, stats."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    rank = dist.get_rank()
    layer = stock_layer(case) if case.impl == "stock" else fluid_layer(case)
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    load(layer, all_weights(case), case, ep_rank)
    ForcedRouter(layer, case.empty_experts)
    for parameter in layer.parameters():
        if case.fuse:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
    scheduler = layer.backward_scheduler if case.impl == "fluid" else BackwardScheduler()
    scheduler.recorder.enabled = True
    maps: list[torch.Tensor] = []
    original = layer.route
    layer.route = lambda *a, **k: (lambda out: (maps.append(out[1].clone()), out)[1])(original(*a, **k))
    result: dict[str, Any] = {"rank": rank, "out": [], "dx": [], "maps": maps}
    for micro in range(case.micro_batches):
        x, g = (here(value) for value in inputs(case, rank, micro))
        x.requires_grad_()
        if case.twin:
            with scheduler.serialise():
                out, _ = layer(x)
                (out * g).sum().backward()
        else:
            out, _ = layer(x)
            (out * g).sum().backward()
        result["out"].append(out.detach())
        result["dx"].append(x.grad.detach())
    assert scheduler.pending == 0
    result.update(_gradients(layer, case))
    result["stats"] = scheduler.get_stats()
    result["record"] = [(r.kind, r.name, r.detail) for r in scheduler.recorder.take()]
    return result


def _gradients(layer: Any, case: Case) -> dict[str, torch.Tensor]:
    """Router ``[E, H]``, FC1 ``[L, H, 2F]`` and FC2 ``[L, F, H]``, from main_grad or grad."""

    def grad(parameter: Any) -> torch.Tensor:
        fused = case.fuse and parameter.grad_added_to_main_grad
        return (parameter.main_grad if fused else parameter.grad).detach().clone()

    experts = layer.experts
    if case.impl == "stock":
        fc1 = torch.stack([grad(expert.linear_fc1.weight).t() for expert in experts.local_experts])
        fc2 = torch.stack([grad(expert.linear_fc2.weight).t() for expert in experts.local_experts])
    else:
        fc1, fc2 = grad(experts.weight1).view(experts.fc1_view), grad(experts.weight2).view(experts.fc2_view)
    return {"router": grad(layer.router.weight), "fc1": fc1, "fc2": fc2}


def reference(case: Case, ranks: list[dict[str, Any]], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same layer as a loop over experts, tokens of all ranks, no communication. Routing maps are the ranks' own."""
    weights = {k: v.to(case.dtype).to(dtype).requires_grad_() for k, v in all_weights(case).items()}
    result: dict[str, Any] = {"out": [], "dx": [], "router": []}
    for rank, run in enumerate(ranks):
        outs, dxs = [], []
        router_before = weights["router"].grad.clone() if weights["router"].grad is not None else 0.0
        for micro in range(case.micro_batches):
            x, g = inputs(case, rank, micro)
            x = x.to(dtype).requires_grad_()
            out = _dense_layer(x.view(-1, HIDDEN), weights, run["maps"][micro], case)
            (out.view(x.shape) * g.to(dtype)).sum().backward()
            outs.append(out.detach().view(x.shape))
            dxs.append(x.grad.detach())
        result["out"].append(outs)
        result["dx"].append(dxs)
        result["router"].append(weights["router"].grad - router_before)
    result["fc1"], result["fc2"] = weights["fc1"].grad, weights["fc2"].grad
    return result


def _dense_layer(x: torch.Tensor, w: dict[str, torch.Tensor], routing: torch.Tensor, case: Case) -> torch.Tensor:
    logits = x @ w["router"].t()
    if case.topk == 1:
        masked = logits.clone()
        if case.empty_experts:
            masked[:, -case.empty_experts :] = float("-inf")
        probs = torch.softmax(masked, dim=-1) * routing
    else:
        probs = torch.softmax(logits.masked_fill(~routing, float("-inf")), dim=-1)
    out = torch.zeros_like(x)
    for expert in range(case.experts):
        up = x @ w["fc1"][expert]
        if case.config.get("gated_linear_unit", True):
            gate, value = up.chunk(2, dim=-1)
            a = torch.nn.functional.silu(gate) * value
        else:
            a = case.config["activation_func"](up)
        out = out + probs[:, expert : expert + 1] * (a @ w["fc2"][expert])
    return out


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; with a zero reference 0 for exact zeros and infinity otherwise."""
    error = torch.linalg.vector_norm(got.double() - want.double()).item()
    size = torch.linalg.vector_norm(want.double()).item()
    return error / size if size else (0.0 if error == 0.0 else float("inf"))


def worst_error(case: Case, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative error of outputs, input gradients and every parameter's gradient."""
    want = reference(case, ranks)
    local = case.experts // case.ep
    errors = {"out": 0.0, "dx": 0.0, "router": 0.0, "fc1": 0.0, "fc2": 0.0}
    for rank, run in enumerate(ranks):
        for micro in range(case.micro_batches):
            errors["out"] = max(errors["out"], relative(run["out"][micro], want["out"][rank][micro]))
            errors["dx"] = max(errors["dx"], relative(run["dx"][micro], want["dx"][rank][micro]))
        errors["router"] = max(errors["router"], relative(run["router"], want["router"][rank]))
    for part in range(case.ep):
        # Ranks that hold the same experts (expert data parallel) sum their gradients.
        holders = [run for rank, run in enumerate(ranks) if rank % case.ep == part]
        for name in ("fc1", "fc2"):
            got = sum(run[name].double() for run in holders)
            for expert in range(local):
                errors[name] = max(errors[name], relative(got[expert], want[name][part * local + expert]))
    return errors
