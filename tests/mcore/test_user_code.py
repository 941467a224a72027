"""Users' own loops through the Layer Spec: torch's DDP, torch's checkpointing, inference, printed information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.device import here
from tests.support.gpt import Run, batch, far_apart, fill, make_config, make_model, same_bits

Ranks = Callable[..., list[Any]]


#: Users without Megatron's DDP have no main_grad to fuse into.
UNFUSED = {"gradient_accumulation_fusion": False}


def _grads(model: Any) -> dict[str, torch.Tensor]:
    from fluid_npu.mcore.convert import gradients_by_name

    return {name: grad.clone() for name, grad in gradients_by_name(model).items()}


def own_ddp(impl: str, ready: bool) -> dict[str, Any]:
    """torch's DistributedDataParallel (no main_grad, no flags), experts excluded from its reduction as users do."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    run = Run(impl=impl, config=UNFUSED)
    config = make_config(run)
    model = make_model(run, config)
    fill(model, run)
    order: list[str] = []
    ignored = [name for name, p in model.named_parameters() if not getattr(p, "allreduce", True)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    if ready:
        for name, parameter in model.named_parameters():
            if name in ignored:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: order.append(f"{name} {bool(p.grad.abs().sum() > 0)}")
                )
    for micro in range(2):
        ddp(**batch(dist.get_rank(), 0, micro)).float().mean().backward()
    return {"grads": _grads(model), "order": order}


def test_own_ddp_through_the_layer_spec(run_ranks: Ranks) -> None:
    sizes = {"expert_model_parallel_size": 2}
    stock = run_ranks(2, own_ddp, "stock", False, sizes=sizes)
    ours = run_ranks(2, own_ddp, "dw", True, sizes=sizes)
    for a, b in zip(stock, ours, strict=True):
        assert not far_apart(b["grads"], a["grads"], 1e-5)
        # Each expert weight was ready once a micro-batch, with its gradient in it.
        assert len(b["order"]) == 2 * 2 * 2 and all(entry.endswith("True") for entry in b["order"])


def checkpointed(reentrant: bool | None) -> dict[str, torch.Tensor]:
    """Each transformer layer inside torch's activation checkpointing, re-entrant or not; None for none."""
    from torch.utils.checkpoint import checkpoint

    run = Run(config=UNFUSED)
    model = make_model(run, make_config(run))
    fill(model, run)
    if reentrant is not None:
        for layer in model.decoder.layers:
            mlp_forward = layer.mlp.forward
            layer.mlp.forward = lambda x, padding_mask=None, f=mlp_forward: checkpoint(f, x, use_reentrant=reentrant)
    import torch.distributed as dist

    for micro in range(2):
        model(**batch(dist.get_rank(), 0, micro)).float().mean().backward()
        from fluid_npu.schedule.live import get_backward_scheduler

        assert get_backward_scheduler(model).pending == 0
    return _grads(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, run_ranks: Ranks) -> None:
    sizes = {"expert_model_parallel_size": 2}
    plain = run_ranks(2, checkpointed, None, sizes=sizes)
    again = run_ranks(2, checkpointed, reentrant, sizes=sizes)
    for a, b in zip(plain, again, strict=True):
        assert not same_bits(a, b)


def partial_and_frozen() -> dict[str, Any]:
    """autograd.grad for some inputs, frozen experts, and a forward without gradients."""
    import torch.distributed as dist

    from fluid_npu.schedule.live import get_backward_scheduler

    run = Run(config=UNFUSED)
    model = make_model(run, make_config(run))
    fill(model, run)
    scheduler = get_backward_scheduler(model)
    inputs = batch(dist.get_rank(), 0, 0)
    experts = model.decoder.layers[0].mlp.experts
    (only,) = torch.autograd.grad(model(**inputs).float().mean(), [experts.weight1])
    model(**inputs).float().mean().backward()
    equal = torch.equal(only, experts.weight1.grad)
    with torch.no_grad():
        model(**inputs)
    model.zero_grad()
    for layer in model.decoder.layers:
        layer.mlp.experts.requires_grad_(False)
    model(**inputs).float().mean().backward()
    frozen = experts.weight1.grad is None and model.decoder.layers[0].mlp.router.weight.grad.abs().sum() > 0
    return {"equal": equal, "frozen": bool(frozen), "pending": scheduler.pending}


def test_partial_gradients_and_frozen_experts(run_ranks: Ranks) -> None:
    for result in run_ranks(2, partial_and_frozen, sizes={"expert_model_parallel_size": 2}):
        assert result == {"equal": True, "frozen": True, "pending": 0}


def printed() -> str:
    """What print_fluid_layer_info and print_status say."""
    import contextlib
    import io

    import torch.distributed as dist

    import fluid_npu

    run = Run(config=UNFUSED)
    model = make_model(run, make_config(run))
    model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        fluid_npu.print_fluid_layer_info(model)
        fluid_npu.print_status(model)
    for path in ("decoder.layers.0.mlp", "decoder.layers.1.mlp"):
        assert type(model.get_submodule(path)).__name__ == "FluidMoELayer"
    return text.getvalue()


def test_printed_information_names_true_modules(run_ranks: Ranks) -> None:
    text = run_ranks(2, printed, sizes={"expert_model_parallel_size": 2})[0]
    assert "MoE layers: 2 FluidMoELayer\n  - decoder.layers.0.mlp\n  - decoder.layers.1.mlp" in text
    assert "Scheduler status: Enabled (overlap dw)" in text
    assert "dW tasks       4 of 4 done" in text


def own_groups() -> bool:
    """A model built with process groups of its own: are they the MoE layer's too?"""
    import torch.distributed as dist
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    config = make_config(Run(config=UNFUSED))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.ep = dist.new_group([0, 1])
    spec = get_fluid_moe_layer_spec(config)
    model = here(
        GPTModel(
            config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope", pg_collection=groups
        )
    )
    layers = [layer.mlp for layer in model.decoder.layers]
    model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
    return all(m.ep_group is m.experts.ep_group is m.token_dispatcher.groups.ep.group is groups.ep for m in layers)


def test_process_groups_of_ones_own_reach_the_moe_layer(run_ranks: Ranks) -> None:
    assert run_ranks(2, own_groups, sizes={"expert_model_parallel_size": 2}) == [True, True]
