"""Fluid linears alone and in GPT models, and the same in float64 on one process without any parallelism."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.support.device import can_fuse, here
from tests.support.gpt import Run, batch, fill, make_config, make_model

HIDDEN, FFN, SEQUENCE, BATCH = 8, 12, 4, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A column-parallel and a row-parallel linear with a GELU between them. ``queued``: they have a scheduler."""

    impl: str = "fluid"
    tp: int = 1
    sequence_parallel: bool = False
    fuse: bool = True
    bias: bool = True
    micro_batches: int = 2
    queued: bool = True
    twin: bool = False


def whole_weights(case: Case) -> dict[str, torch.Tensor]:
    """In the layout of nn.Linear, the same on every rank."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    made = {"fc1.weight": draw(FFN, HIDDEN), "fc2.weight": draw(HIDDEN, FFN)}
    return {**made, "fc1.bias": draw(FFN), "fc2.bias": draw(HIDDEN)} if case.bias else made


def inputs(micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[S, B, H]`` inputs and weights of the loss, the whole sequence."""
    generator = torch.Generator().manual_seed(50 + micro)
    x, g = (torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2))
    return x, g


def part(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """A tensor rank's part of a weight, bias or of their gradients."""
    if name == "fc2.bias":
        return whole
    return whole.chunk(tp, 1 if name == "fc2.weight" else 0)[rank]


def pair(case: Case) -> torch.nn.ModuleDict:
    """The two linears, with the weights of this rank."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from fluid_npu.mcore.linear import FluidColumnParallelLinear, FluidRowParallelLinear

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.sequence_parallel,
        gradient_accumulation_fusion=case.fuse and can_fuse(),
    )
    column, row = (
        (ColumnParallelLinear, RowParallelLinear)
        if case.impl == "stock"
        else (FluidColumnParallelLinear, FluidRowParallelLinear)
    )
    common: dict[str, Any] = dict(config=config, init_method=torch.nn.init.normal_, bias=case.bias, skip_bias_add=False)
    fc1 = column(HIDDEN, FFN, gather_output=False, **common)
    fc2 = row(FFN, HIDDEN, input_is_parallel=True, **common)
    made = here(torch.nn.ModuleDict({"fc1": fc1, "fc2": fc2}))
    weights = whole_weights(case)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(part(name, weights[name], dist.get_rank() % case.tp, case.tp))
            if case.fuse:
                parameter.main_grad = torch.zeros_like(parameter)
                parameter.grad_added_to_main_grad = False
    return made


def run_pair(case: Case) -> dict[str, Any]:
    """Outputs, input gradients, weight gradients and the record of this rank."""
    import torch.distributed as dist

    from fluid_npu.schedule.scheduler import BackwardScheduler

    layers = pair(case)
    scheduler = BackwardScheduler(carry_over=True)
    scheduler.recorder.enabled = True
    if case.queued and case.impl == "fluid":
        for name, layer in layers.items():
            layer.join(scheduler, name)
    found: dict[str, Any] = {"out": [], "dx": []}
    for micro in range(case.micro_batches):
        x, g = (here(_mine(value, case, dist.get_rank())) for value in inputs(micro))
        x.requires_grad_()
        with scheduler.serialise() if case.twin else contextlib.nullcontext():
            middle, _ = layers["fc1"](x)
            out, _ = layers["fc2"](torch.nn.functional.gelu(middle))
            (out * g).sum().backward()
        assert scheduler.pending == 0
        found["out"].append(out.detach())
        found["dx"].append(x.grad)
    found["grads"] = {name: _gradient(parameter) for name, parameter in layers.named_parameters()}
    found["record"] = [(r.kind, r.name, r.detail.get("region")) for r in scheduler.recorder.take()]
    found["stats"] = scheduler.get_stats()
    return found


def run_pairs(cases: list[Case]) -> list[dict[str, Any]]:
    """Several cases in the same processes."""
    return [run_pair(case) for case in cases]


def _mine(whole: torch.Tensor, case: Case, rank: int) -> torch.Tensor:
    return whole.chunk(case.tp)[rank % case.tp].contiguous() if case.sequence_parallel else whole


def _gradient(parameter: Any) -> torch.Tensor:
    """From ``main_grad`` where dW was added there, plus what autograd left in ``grad``, as a DDP would."""
    if getattr(parameter, "grad_added_to_main_grad", False):
        return parameter.main_grad.clone()
    return parameter.grad.clone()


def pair_errors(case: Case, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative error of outputs, input gradients and each weight's gradient against float64."""
    from tests.support.moe import relative

    weights = {name: value.double().requires_grad_() for name, value in whole_weights(case).items()}
    errors: dict[str, float] = {"out": 0.0, "dx": 0.0}
    for micro in range(case.micro_batches):
        x, g = (value.double() for value in inputs(micro))
        x.requires_grad_()
        linear = lambda x, name: torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        out = linear(torch.nn.functional.gelu(linear(x, "fc1")), "fc2")
        (out * g).sum().backward()
        for rank, run in enumerate(ranks):
            for name, want in (("out", out), ("dx", x.grad)):
                errors[name] = max(errors[name], relative(run[name][micro], _mine(want.detach(), case, rank)))
    for name, value in weights.items():
        # Under sequence parallelism each rank has a part of the rows behind a bias that all ranks hold.
        summed = case.sequence_parallel and name == "fc2.bias"
        for rank, run in enumerate(ranks):
            got = sum(other["grads"][name] for other in ranks) if summed else run["grads"][name]
            errors[name] = max(errors.get(name, 0.0), relative(got, part(name, value.grad, rank, case.tp)))
    return errors


@dataclass(frozen=True, kw_only=True)
class Model:
    """Gradients of a whole GPT model. ``experts_used`` below the number of experts leaves the other ranks no token."""

    run: Run = field(default_factory=Run)
    experts_used: int = 0
    tensor_parallel_alone: bool = False
    """Tensor parallelism without sequence parallelism, which MoE layers do not train with."""


def gradients(model: Model) -> dict[str, Any]:
    """Gradients by global name after one step under DDP, dX of the first layer, and where each dW ran."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from fluid_npu.mcore.convert import gradients_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    run = model.run
    config = make_config(run)
    if model.tensor_parallel_alone:
        config.sequence_parallel = False
    gpt = make_model(run, config)
    fill(gpt, run)
    _mask_experts(gpt, model.experts_used)
    dx = _watch_input(gpt)
    ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **run.ddp})
    ddp = DistributedDataParallel(config, ddp_config, gpt)
    scheduler = None if run.impl == "stock" else get_backward_scheduler(ddp)
    if scheduler is not None:
        scheduler.recorder.enabled = True
    rank = parallel_state.get_data_parallel_rank()
    for step in range(run.steps):  # Megatron's DDP reduces while the backward runs from the second step on
        ddp.zero_grad_buffer()
        dx.clear()
        for micro in range(run.micro_batches):
            with contextlib.ExitStack() as stack:
                if micro < run.micro_batches - 1:
                    stack.enter_context(ddp.no_sync())
                if run.impl == "twin":
                    stack.enter_context(scheduler.serialise())
                (ddp(**batch(rank, step, micro)).float().mean() / run.micro_batches).backward()
            assert scheduler is None or scheduler.pending == 0
        finalize_model_grads([ddp])
    record = scheduler.recorder.take() if scheduler is not None else []
    return {
        "grads": {name: grad.clone() for name, grad in gradients_by_name(ddp).items()},
        "dx": list(dx),
        "regions": {r.name: r.detail["region"] for r in record if r.kind == "dw"},
        "stats": scheduler.get_stats() if scheduler is not None else {},
        "rows": {r.name for r in record if r.kind == "dw"},
    }


def all_gradients(models: list[Model]) -> list[dict[str, Any]]:
    """Several models in the same processes."""
    return [gradients(model) for model in models]


def reference(model: Model, data_ranks: int) -> dict[str, Any]:
    """Stock Megatron in float64 on this one process, over the batches of all data-parallel ranks; no DDP.

    ``grads`` as DDP averages them; ``dx`` of each rank's micro-batches, of that rank's own loss.
    """
    from fluid_npu.mcore.convert import gradients_by_name

    double = {"params_dtype": torch.float64, "gradient_accumulation_fusion": False}
    if model.run.config.get("num_moe_experts", 8) is not None:
        double["moe_router_dtype"] = "fp64"
    run = replace(model.run, impl="stock", ep=1, config={**model.run.config, **double}, spec={}, block=True)
    gpt = make_model(run, make_config(run))
    fill(gpt, run)
    _mask_experts(gpt, model.experts_used)
    dx = _watch_input(gpt)
    for rank in range(data_ranks):
        for micro in range(run.micro_batches):
            loss = gpt(**batch(rank, run.steps - 1, micro)).double().mean() / run.micro_batches
            loss.backward()
    return {
        "grads": {name: grad / data_ranks for name, grad in gradients_by_name(gpt).items()},
        "dx": [dx[rank * run.micro_batches : (rank + 1) * run.micro_batches] for rank in range(data_ranks)],
    }


def _mask_experts(gpt: Any, used: int) -> None:
    """All tokens to the first ``used`` experts; 0 leaves the routing alone."""
    if not used:
        return
    for module in gpt.modules():
        if hasattr(module, "router"):
            mask = module.router.weight.new_zeros(module.router.weight.shape[0])
            mask[used:] = -1e4
            original = module.router.gating
            module.router.gating = lambda x, original=original, mask=mask: original(x) + mask


def _watch_input(gpt: Any) -> list[torch.Tensor]:
    """The gradients of the decoder's input, in the order of the backwards."""
    found: list[torch.Tensor] = []
    watch = lambda module, args, output: output.register_hook(lambda grad: found.append(grad.detach().clone())) and None
    gpt.embedding.register_forward_hook(lambda *a: (watch(*a), None)[1])
    return found
