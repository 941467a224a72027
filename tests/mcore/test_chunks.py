"""The MoE layer in chunks of experts on real ranks: equal to the layer in one piece and to its twin, bit for bit."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.device import here
from tests.support.gpt import Run, check_trained, same_bits, train_all
from tests.support.moe import Case, all_weights, fluid_layer, inputs, load, run_layer, worst_error
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
SHARED = {"moe_shared_expert_intermediate_size": 24}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}

ONE = [Case(ep=1, chunks=4, micro_batches=2), Case(ep=1, chunks=8, topk=8)]
TWO = [
    Case(chunks=2, micro_batches=2),
    Case(chunks=4, topk=1, micro_batches=2),
    Case(chunks=4, topk=8, fuse=False, micro_batches=2),
    Case(chunks=2, tokens=1, topk=1),
    Case(chunks=4, topk=3, empty_experts=5),
    Case(chunks=2, topk=3, config=MOE),
    Case(chunks=2, topk=3, config=ACT, micro_batches=2),
    Case(chunks=2, config=SHARED, micro_batches=2),
    Case(chunks=2, config=PADDED),
    Case(chunks=4, topk=4, config={"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}),
    Case(chunks=4, topk=4, dtype=torch.bfloat16, micro_batches=2, config={"moe_router_dtype": "fp32"}),
    Case(chunks=16, experts=64, topk=6, tokens=40),
]
FOUR = [
    Case(ep=4, chunks=2, topk=3, micro_batches=2),
    Case(ep=4, chunks=2, empty_experts=5),
    Case(ep=4, chunks=4, experts=16, topk=6, empty_experts=9, micro_batches=2),
]


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case in chunks, as the twin of that, and in one piece."""
    return [
        {
            "chunks": run_layer(replace(case, overlap="full")),
            "twin": run_layer(replace(case, overlap="full", twin=True)),
            "whole": run_layer(replace(case, chunks="auto")),
        }
        for case in cases
    ]


@pytest.mark.parametrize("cases", [ONE, TWO, FOUR], ids=["one_rank", "two_ranks", "four_ranks"])
def test_chunks_equal_the_twin_and_the_layer_in_one_piece_bitwise(cases: list[Case], run_ranks: Ranks) -> None:
    ep = cases[0].ep
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep})
    for index, case in enumerate(cases):
        runs = [rank[index] for rank in ranks]
        if not case.config.keys() & {*PADDED, *SHARED} and case.dtype == torch.float32:
            errors = worst_error(case, [run["chunks"] for run in runs])
            assert max(errors.values()) <= FP32, f"{case}: {errors}"
        for run in runs:
            for other in ("twin", "whole"):
                for key in ("router", "fc1", "fc2"):
                    assert torch.equal(run["chunks"][key], run[other][key]), f"{case} {other} {key}"
                for key in ("out", "dx"):
                    assert all(map(torch.equal, run["chunks"][key], run[other][key])), f"{case} {other} {key}"
            assert run["chunks"]["stats"]["a2a_bytes"] == run["whole"]["stats"]["a2a_bytes"]
            assert run["chunks"]["stats"]["a2a_count"] == case.chunks * run["whole"]["stats"]["a2a_count"]


def _note_shared(layer: Any) -> None:
    """Enters forward and backward of the shared experts in the record."""
    note = layer.backward_scheduler.recorder.add
    layer.shared_experts.register_forward_hook(lambda *_: note("shared", "forward"))
    layer.shared_experts.register_full_backward_hook(lambda *_: note("shared", "backward"))


def order_of_a_step() -> list[str]:
    """What a layer with shared experts, in two chunks, does in which order."""
    import torch.distributed as dist

    case = Case(overlap="full", chunks=2, fuse=False, config=SHARED)
    layer = fluid_layer(case)
    scheduler = layer.backward_scheduler
    _note_shared(layer)
    scheduler.recorder.enabled = True
    x, _ = inputs(case, dist.get_rank(), 0)
    layer(here(x).requires_grad_())[0].sum().backward()
    return [f"{record.kind} {record.name}" for record in scheduler.recorder.take()]


def test_what_runs_beside_which_exchange(run_ranks: Ranks) -> None:
    d1, d2, c1, c2 = (
        f"moe_{kind} AllToAll of layer 1 chunk {n} of 2" for kind in ("dispatch", "combine") for n in (1, 2)
    )
    forward = [f"launch {d1}", f"launch {d2}", "shared forward", f"wait {d1}", f"launch {c1}", f"wait {d2}"]
    forward += [f"launch {c2}", f"wait {c1}", f"wait {c2}"]
    b1, b2, e1, e2 = (f"backward of {name}" for name in (c1, c2, d1, d2))
    backward = [f"launch {b1}", f"launch {b2}", f"wait {b1}", f"launch {e1}", f"wait {b2}", f"launch {e2}"]
    backward += ["shared backward", "dw layer 1 fc2", "dw layer 1 fc1", f"wait {e1}", f"wait {e2}"]
    for order in run_ranks(2, order_of_a_step, sizes={"expert_model_parallel_size": 2}):
        assert order == forward + backward


FROZEN = {"nothing": (), "fc1": ("weight1",), "fc2": ("weight2",), "experts": ("weight1", "weight2")}


def frozen() -> dict[str, dict[str, Any]]:
    """Gradients with some weights frozen, with and without a gradient of the input; in chunks, and in one piece."""
    import torch.distributed as dist

    found: dict[str, dict[str, Any]] = {"full": {}, "dw": {}}
    for overlap in found:
        for name, weights in FROZEN.items():
            for wanted in (True, False):
                case = Case(overlap=overlap, chunks=2 if overlap == "full" else "auto", fuse=False)
                layer = fluid_layer(case)
                load(layer, all_weights(case), case, dist.get_rank())
                for weight in weights:
                    getattr(layer.experts, weight).requires_grad_(False)
                x = here(inputs(case, dist.get_rank(), 0)[0]).requires_grad_(wanted)
                layer(x)[0].sum().backward()
                grads = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None}
                found[overlap][f"{name} {wanted}"] = {**grads, **({"x": x.grad} if wanted else {})}
    with torch.no_grad():
        layer.eval()
        found["full"]["no gradient"] = {"out": layer(x)[0]}
    return found


def test_frozen_weights_and_inputs_without_gradient(run_ranks: Ranks) -> None:
    for rank in run_ranks(2, frozen, sizes={"expert_model_parallel_size": 2}):
        for name, want in rank["dw"].items():
            got = rank["full"][name]
            assert got.keys() == want.keys() and not same_bits(got, want), name
            for weight in FROZEN[name.split()[0]]:
                assert f"experts.{weight}" not in got


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "bucket_size": 2000}
FULL = {"overlap": "full", "chunks": 2, "carry_over": True}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3, **SHARED}, spec=FULL)


def test_a_model_with_carry_over_equals_stock_its_twin_and_one_piece(run_ranks: Ranks) -> None:
    """Under Megatron's DDP with late gradients and a bucket for each weight."""
    runs = [
        replace(MODEL, impl="stock", ddp={}, spec={}),
        MODEL,
        replace(MODEL, impl="twin"),
        replace(MODEL, spec={"carry_over": True}),
    ]
    for stock, ours, twin, whole in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        check_trained(ours, stock, twin, FP32)
        assert not same_bits(ours["grads"], whole["grads"]) and not same_bits(ours["weights"], whole["weights"])
        assert ours["losses"] == whole["losses"]
        assert ours["regions"]["layer 2 fc2"] == "backward of moe_combine AllToAlls of layer 1"
        assert ours["regions"]["layer 2 fc1"] == "backward of moe_dispatch AllToAlls of layer 2"


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: counts, and four exchanges of each of two chunks.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 9


def refusals() -> dict[str, str]:
    """What cannot be had says what is in the way; 'auto' then runs in one piece, with the reason."""
    from fluid_npu.mcore.info import print_fluid_layer_info
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    calls: dict[str, Callable[[], Any]] = {
        "word": lambda: get_fluid_moe_layer_spec(overlap="full", chunks="many"),
        "dw": lambda: get_fluid_moe_layer_spec(chunks=2),
        "number": lambda: fluid_layer(Case(overlap="full", chunks=3)),
        "input": lambda: fluid_layer(Case(overlap="full", chunks=2, topk=1, config={"moe_apply_probs_on_input": True})),
        "allgather": lambda: fluid_layer(
            Case(overlap="full", chunks=2, config={"moe_token_dispatcher_type": "allgather"})
        ),
    }
    messages = value_errors(calls)
    for name, case in {
        "auto": Case(overlap="full"),
        "auto_once": Case(overlap="full", dispatch="once-per-rank"),
        "auto_one": Case(overlap="full", experts=2, topk=1),
        "auto_dw": Case(),
    }.items():
        layer = fluid_layer(case)
        value, reason = layer.chunks
        messages[name] = f"{value}: {reason}"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            print_fluid_layer_info(layer)
        messages[f"info_{name}"] = printed.getvalue()
    return messages


def test_what_is_not_there_is_refused_by_name(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert messages["word"] == "chunks='many': a number of at least 1, or 'auto'"
    assert messages["dw"] == "chunks=2: overlap='dw' has one; use overlap='full', or leave chunks out"
    assert "chunks=3: a rank has 4 experts, so allowed are 1, 2, 4 and 'auto'" in messages["number"]
    assert "chunks=2: moe_apply_probs_on_input=True" in messages["input"]
    assert "chunks=2: moe_token_dispatcher_type='allgather' overlaps nothing" in messages["allgather"]
    assert "(in 2 chunks of experts)" in messages["info_auto"] and "overlap full" in messages["info_auto"]
    assert "chunks of experts" not in messages["info_auto_dw"]
    assert messages["auto"] == "2: the fewest that overlap; 4 local experts allow 1, 2, 4"
    assert messages["auto_once"] == "2: the fewest that overlap"
    assert "(in 2 chunks of tokens)" in messages["info_auto_once"]
    assert messages["auto_one"] == "1: a rank has one expert, which is not split"
    assert messages["auto_dw"] == "1: overlap='dw'"
