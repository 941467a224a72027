"""Two halves of a micro-batch interleaved: the step of two micro-batches, the twin's bits, and the order of it all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluid_npu.order.checker import check as check_order
from fluid_npu.order.records import numbered
from tests.support.gpt import Run, batch, far_apart, fill, make_config, make_model, same_bits

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05}
SHARED = {"moe_shared_expert_intermediate_size": 24}
HALVES = {"interleave_batches": True}
#: 'early': every weight has a bucket, which is reduced when its gradient has landed.
EARLY: dict[str, Any] = {"overlap_grad_reduce": True, "bucket_size": 2000}
RUNS = {
    "aux loss": Run(config={"moe_router_topk": 3, **AUX, **SHARED}, ddp=EARLY),
    "carry-over, not fused": Run(
        config={"gradient_accumulation_fusion": False}, spec={"carry_over": True}, ddp={"grad_reduce_in_fp32": True}
    ),
    "static": Run(config={"moe_router_topk": 3}, spec={"dispatch": "static"}),
    "chunks of experts": Run(config={"moe_router_topk": 3}, spec={"overlap": "full", "chunks": 2}),
    "local rows first": Run(config={"moe_router_topk": 3}, spec={"overlap": "full", "chunks": 2, "local_first": True}),
    "chunks of tokens": Run(
        config={"moe_router_topk": 3}, spec={"overlap": "full", "chunks": 2, "dispatch": "once-per-rank"}
    ),
}


def step(run: Run, how: str) -> dict[str, Any]:
    """Loss and gradients of one step of four samples: as 'two' micro-batches, in 'halves' of one, or its 'twin'."""
    import contextlib

    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from fluid_npu.mcore.convert import gradients_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    config = make_config(run)
    model = make_model(run if how == "two" else replace(run, spec={**run.spec, **HALVES}), config)
    fill(model, run)
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **run.ddp}), model
    )
    scheduler = get_backward_scheduler(ddp)
    ddp.zero_grad_buffer()
    micros = [batch(dist.get_rank(), 0, micro) for micro in range(2)]
    if how != "two":
        mask = micros[0]["attention_mask"]
        micros = [{name: torch.cat([one[name] for one in micros]) for name in micros[0]}]
        micros[0]["attention_mask"] = mask
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / len(micros)))
    losses = []
    for number, micro in enumerate(micros):
        with contextlib.ExitStack() as stack:
            if number < len(micros) - 1:
                stack.enter_context(ddp.no_sync())
            if how == "twin":
                stack.enter_context(scheduler.serialise())
            loss = ddp(**micro).float().mean() / len(micros)
            loss.backward()
        losses.append(loss.detach())
    assert scheduler.pending == 0
    finalize_model_grads([ddp])
    grads = {name: grad.clone() for name, grad in gradients_by_name(ddp).items()}
    return {"loss": sum(losses), "grads": grads, "aux": logged_losses(), "stats": scheduler.get_stats()}


def logged_losses() -> torch.Tensor:
    """What the layers logged of their auxiliary loss, which is forgotten then."""
    from megatron.core.transformer.moe import moe_utils

    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    values = tracker["load_balancing_loss"]["values"].clone() if tracker else torch.zeros(1)
    tracker.clear()
    return values


def all_ways() -> dict[str, dict[str, Any]]:
    return {name: {how: step(run, how) for how in ("two", "halves", "twin")} for name, run in RUNS.items()}


def test_halves_are_two_micro_batches_and_equal_their_twin(run_ranks: Ranks) -> None:
    for rank in run_ranks(2, all_ways, sizes={"expert_model_parallel_size": 2}):
        for name, ways in rank.items():
            two, halves, twin = (ways[how] for how in ("two", "halves", "twin"))
            assert halves["loss"].item() == pytest.approx(two["loss"].item(), rel=FP32), name
            assert not far_apart(halves["grads"], two["grads"], FP32), name
            assert not same_bits(halves["grads"], twin["grads"]), name
            # Two micro-batches log two losses, which Megatron divides by their number.
            torch.testing.assert_close(2 * halves["aux"], two["aux"], rtol=1e-5, atol=1e-8)
            for figure in ("a2a_bytes", "a2a_count", "total_dw_tasks"):
                assert halves["stats"][figure] == two["stats"][figure], (name, figure)
        assert rank["aux loss"]["two"]["aux"].min() > 0, "the loss that is compared is there"


def order_of_a_step() -> list[str]:
    """What one layer in halves does in which order: exchanges, attention and experts of each half."""
    import torch.distributed as dist

    run = Run(config={"num_layers": 1, "gradient_accumulation_fusion": False}, spec=HALVES)
    model = make_model(run, make_config(run))
    layer = model.decoder.layers[0]
    note = layer.mlp.backward_scheduler.recorder
    note.enabled = True
    for name, module in (("attention", layer.self_attention), ("experts", layer.mlp.experts)):
        module.register_forward_hook(lambda *_, name=name: note.add(name, "forward"))
        module.register_full_backward_hook(lambda *_, name=name: note.add(name, "backward"))
    model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
    return [f"{record.kind} {record.name}" for record in note.take()]


def test_each_exchange_flies_beside_the_other_half(run_ranks: Ranks) -> None:
    da, db, ca, cb = (
        f"moe_{kind} AllToAll of layer 1 half {n} of 2" for kind in ("dispatch", "combine") for n in (1, 2)
    )
    forward = ["attention forward", f"launch {da}", "attention forward", f"launch {db}"]
    forward += [f"wait {da}", "experts forward", f"launch {ca}", f"wait {db}", "experts forward", f"launch {cb}"]
    forward += [f"wait {ca}", f"wait {cb}"]
    a, b = "layer 1 half 1 of 2", "layer 1 half 2 of 2"
    backward = [f"launch backward of {cb}", f"launch backward of {ca}", f"wait backward of {cb}", "experts backward"]
    backward += [f"launch backward of {db}", f"dw {b} fc2", f"dw {b} fc1", f"wait backward of {ca}", "experts backward"]
    backward += [f"launch backward of {da}", f"dw {a} fc2", f"dw {a} fc1", f"wait backward of {db}"]
    backward += ["attention backward", f"wait backward of {da}", "attention backward"]
    for order in run_ranks(2, order_of_a_step, sizes={"expert_model_parallel_size": 2}):
        assert order == forward + backward


def recorded() -> list[Any]:
    import torch.distributed as dist

    from fluid_npu.comm.guard import watch
    from fluid_npu.order.recorder import OrderRecorder

    with OrderRecorder(dist.get_rank(), lambda: watch.current.name if watch.current else "") as recorder:
        step(RUNS["aux loss"], "halves")
    return recorder.entries


def test_the_order_of_a_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded, sizes={"expert_model_parallel_size": 2})
    report = check_order({rank: numbered(entries, rank) for rank, entries in enumerate(results)})
    assert report.clean, "\n".join(map(str, report.findings))


REFUSED: dict[str, dict[str, Any]] = {
    "recompute_granularity='full'": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute_modules=['moe']": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "is MoELayer without steps|FluidMoELayer without steps": {"moe_token_dispatcher_type": "allgather"},
    "moe_z_loss_coeff=0.1 is not implemented": {"moe_z_loss_coeff": 0.1},
    "global_aux_loss counts": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "calculate_per_token_loss=True weighs": {**AUX, "calculate_per_token_loss": True},
}


def refusals() -> list[str]:
    """Messages of what is refused at construction, then of a step."""
    messages = []
    for config in REFUSED.values():
        run = Run(config=config, spec=HALVES)
        with pytest.raises(ValueError) as caught:
            make_model(run, make_config(run))
        messages.append(str(caught.value))
    run = Run(spec=HALVES)
    model = make_model(run, make_config(run))
    layer = model.decoder.layers[0]
    for samples, arguments in ((3, {}), (2, {"packed_seq_params": object()})):
        with pytest.raises(ValueError) as caught:
            layer(torch.zeros(4, samples, 32), attention_mask=None, **arguments)
        messages.append(str(caught.value))
    with torch.no_grad():
        model.eval()
        one = {name: value[:1] for name, value in batch(0, 0, 0).items()}
        model(**one)  # a single sample is no matter where nothing is trained
    return messages


def test_what_cannot_be_halved_is_refused_by_name(run_ranks: Ranks) -> None:
    import re

    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    wanted = [*REFUSED, "a micro-batch of 3 samples has no halves; use an even", "with packed_seq_params: packed"]
    for message, want in zip(messages, wanted, strict=True):
        assert message.startswith("interleave_batches=True") and re.search(want.replace("[", "\\["), message), message
        assert "interleave_batches=False" in message
