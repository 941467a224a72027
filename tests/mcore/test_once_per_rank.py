"""dispatch='once-per-rank' on real ranks against a dense float64 loop, stock, the plain form and its twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from fluid_npu.mcore.dispatch_choice import WORTH_IT, choose_dispatch, expected_factor
from tests.support import moe
from tests.support.device import here
from tests.support.dispatchers import make_dispatcher
from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import Case, make_config, reference, relative, run_layer, worst_error
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]
FP32 = 1e-5

CASES = [
    Case(topk=1, micro_batches=2),
    Case(topk=2, micro_batches=2),
    Case(topk=8, fuse=False),
    Case(topk=3, tokens=1, empty_experts=4, micro_batches=2),
    Case(topk=6, experts=64, tokens=40),
    Case(topk=2, config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    Case(topk=4, config={"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}),
]
FOUR = [
    Case(ep=4, topk=3, micro_batches=2),
    Case(ep=4, topk=2, empty_experts=5),
    Case(ep=4, experts=4, topk=4),
    Case(ep=4, experts=64, topk=8, empty_experts=33),
]


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case overlapped, as the serialised twin, without overlap, and with the plain dispatch."""
    cases = [replace(case, dispatch="once-per-rank") for case in cases]
    return [
        {
            "overlapped": run_layer(case),
            "twin": run_layer(replace(case, twin=True)),
            "off": run_layer(replace(case, overlap="off")),
            "plain": run_layer(replace(case, dispatch="plain")),
        }
        for case in cases
    ]


def check(case: Case, ranks: list[dict[str, dict[str, Any]]]) -> None:
    """Overlapped, twin and off are one; all are as near to float64 as the tolerance of fp32 asks."""
    if "moe_expert_capacity_factor" not in case.config:  # the loop drops no token
        errors = worst_error(case, [rank["overlapped"] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
    for rank in ranks:
        ours, plain = rank["overlapped"], rank["plain"]
        for other in ("twin", "off"):
            for key in ("router", "fc1", "fc2"):
                assert torch.equal(ours[key], rank[other][key]), f"{case} {other} {key}"
            for key in ("out", "dx"):
                assert all(map(torch.equal, ours[key], rank[other][key])), f"{case} {other} {key}"
        for key in ("out", "dx"):
            assert max(map(relative, ours[key], plain[key])) <= FP32, f"{case} {key}"
        assert relative(ours["router"], plain["router"]) <= FP32, case
        # The experts get the rows of the plain form in the same order.
        assert torch.equal(ours["fc1"], plain["fc1"]) and torch.equal(ours["fc2"], plain["fc2"]), case
        assert ours["stats"]["a2a_plain_bytes"] == plain["stats"]["a2a_bytes"] == plain["stats"]["a2a_plain_bytes"]
        assert ours["stats"]["a2a_count"] == plain["stats"]["a2a_count"]


@pytest.mark.parametrize("cases", [CASES, FOUR], ids=["two_ranks", "four_ranks"])
def test_equals_float64_within_fp32_and_the_twin_bitwise(cases: list[Case], run_ranks: Ranks) -> None:
    ep = cases[0].ep
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep}, timeout=300)
    for index, case in enumerate(cases):
        check(case, [rank[index] for rank in ranks])
    if cases is CASES:
        fewer = [rank[4]["overlapped"]["stats"] for rank in ranks]
        assert all(2 < stats["a2a_plain_bytes"] / stats["a2a_bytes"] < 3.5 for stats in fewer)


@pytest.mark.nightly
@pytest.mark.parametrize("ep", [2, 4])
def test_the_grid_of_topk_and_micro_batches(ep: int, run_ranks: Ranks) -> None:
    cases = [
        Case(ep=ep, topk=topk, micro_batches=micro, empty_experts=empty, seed=seed)
        for topk, micro, empty, seed in product((1, 2, 4, 6), (1, 2), (0, 2), (5, 6))
    ]
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep}, timeout=500)
    for index, case in enumerate(cases):
        check(case, [rank[index] for rank in ranks])


def stock_and_both(case: Case) -> dict[str, dict[str, Any]]:
    """Stock's layer, ours plain, ours once-per-rank."""
    return {
        "stock": run_layer(replace(case, impl="stock")),
        "plain": run_layer(case),
        "once": run_layer(replace(case, dispatch="once-per-rank")),
    }


def test_bf16_is_not_worse_than_stock(run_ranks: Ranks) -> None:
    """Errors against float64 over the same bf16 weights and inputs; 10 % for the luck of rounding."""
    case = Case(tokens=64, topk=4, dtype=torch.bfloat16, micro_batches=2, config={"moe_router_dtype": "fp32"})
    ranks = run_ranks(2, stock_and_both, case, sizes={"expert_model_parallel_size": 2})
    for rank in ranks:
        assert all(map(torch.equal, rank["stock"]["maps"], rank["once"]["maps"]))
    stock, once = (worst_error(case, [rank[name] for rank in ranks]) for name in ("stock", "once"))
    for key in stock:
        assert once[key] <= 1.1 * stock[key], (key, once[key], stock[key])


def routed_bytes(experts: int, topk: int, tokens: int) -> dict[str, float]:
    """Bytes of a dispatch, a combine and their backwards under random routing, once-per-rank."""
    import torch.distributed as dist

    from fluid_npu.comm.sink import DirectSink

    dispatcher = make_dispatcher(Case(experts=experts, topk=topk, dispatch="once-per-rank"))
    dispatcher.sink = DirectSink()
    generator = torch.Generator().manual_seed(dist.get_rank())
    scores = torch.rand(tokens, experts, generator=generator)
    routing_map = torch.zeros_like(scores).scatter_(1, scores.topk(topk)[1], 1.0).bool()
    x = here(torch.randn(tokens, 512, generator=generator).bfloat16()).requires_grad_()
    rows, _, _ = dispatcher.dispatch(x, here(routing_map), here(scores * routing_map).requires_grad_())
    dispatcher.combine(rows).sum().backward()
    return dispatcher.sink.comm.as_dict()


@pytest.mark.parametrize(("experts", "topk", "factor"), [(64, 6, 3.0), (8, 2, 1.27)], ids=["fine_grained", "mixtral"])
def test_bytes_of_random_routing_fall_as_expected(experts: int, topk: int, factor: float, run_ranks: Ranks) -> None:
    assert expected_factor(experts, topk, 2) == pytest.approx(factor, rel=0.02)
    for stats in run_ranks(2, routed_bytes, experts, topk, 2000, sizes={"expert_model_parallel_size": 2}):
        # Rows carry the numbers of their experts besides tokens and probabilities.
        assert stats["a2a_plain_bytes"] / stats["a2a_bytes"] == pytest.approx(factor, rel=0.04)


def split_experts(case: Case) -> list[dict[str, Any]]:
    """Both forms, and the twin, with the width of the experts split over tensor ranks."""
    moe.load = load_part
    once = replace(case, dispatch="once-per-rank")
    return [run_layer(case), run_layer(once), run_layer(replace(once, twin=True))]


def load_part(layer: Any, weights: dict[str, torch.Tensor], case: Case, ep_rank: int) -> None:
    """This expert-tensor rank's columns of gate and value, and rows of FC2."""
    from megatron.core import parallel_state

    part, local = parallel_state.get_expert_tensor_parallel_rank(), case.experts // case.ep
    mine = slice(ep_rank * local, (ep_rank + 1) * local)
    fc1 = [half.chunk(case.etp, -1)[part] for half in weights["fc1"][mine].chunk(2, -1)]
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        layer.experts.weight1.view(layer.experts.fc1_view).copy_(torch.cat(fc1, -1))
        layer.experts.weight2.view(layer.experts.fc2_view).copy_(weights["fc2"][mine].chunk(case.etp, 1)[part])


@pytest.mark.parametrize(("nproc", "ep"), [(4, 2), (2, 1)], ids=["ep2_etp2", "ep1_etp2"])
def test_expert_tensor_parallelism_equals_the_plain_form(nproc: int, ep: int, run_ranks: Ranks) -> None:
    case = Case(ep=ep, etp=2, topk=3, micro_batches=2)
    sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 2}
    ranks = run_ranks(nproc, split_experts, case, sizes=sizes)
    want = reference(case, [once for _, once, _ in ranks])
    for rank, (plain, once, twin) in enumerate(ranks):
        for key in ("out", "dx"):
            assert max(map(relative, once[key], want[key][rank])) <= FP32, key
        for key in ("out", "dx"):
            for ours, other, same in zip(once[key], plain[key], twin[key], strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
                assert torch.equal(ours, same)
        for key in ("router", "fc1", "fc2"):
            torch.testing.assert_close(once[key], plain[key], rtol=1e-5, atol=1e-6)
            assert torch.equal(once[key], twin[key])
        assert once["stats"]["a2a_plain_bytes"] == plain["stats"]["a2a_bytes"] > once["stats"]["a2a_bytes"]


def refusals() -> dict[str, str]:
    """What cannot be had says what is in the way."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support.moe import fluid_layer

    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    calls: dict[str, Callable[[], Any]] = {
        "word": lambda: get_fluid_moe_layer_spec(dispatch="twice"),
        "padded": lambda: fluid_layer(Case(dispatch="once-per-rank", config=padded)),
        "allgather": lambda: fluid_layer(
            Case(dispatch="once-per-rank", config={"moe_token_dispatcher_type": "allgather"})
        ),
    }
    messages = value_errors(calls)
    messages["auto_padded"] = str(fluid_layer(Case(dispatch="auto", config=padded)).token_dispatcher.dispatch_form)
    return messages


def test_what_is_not_there_is_refused_by_name(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert (
        messages["word"] == "dispatch='twice': allowed are 'plain', 'once-per-rank', 'once-per-node', 'static', 'auto'"
    )
    assert "moe_pad_expert_input_to_capacity=True" in messages["padded"]
    assert "use dispatch='plain'" in messages["padded"]
    assert "set --moe-token-dispatcher-type alltoall" in messages["allgather"]
    assert "plain" in messages["auto_padded"] and "fixed rows" in messages["auto_padded"]


def test_auto_is_a_function_of_experts_topk_and_ranks() -> None:
    fine, mixtral = make_config(Case(experts=64, topk=6)), make_config(Case(experts=8, topk=2))
    value, reason = choose_dispatch("auto", fine, 2, 1)
    assert value == "once-per-rank" and "3.04 times fewer rows" in reason
    value, reason = choose_dispatch("auto", mixtral, 4, 1)
    assert value == "plain" and "1.08 times fewer rows" in reason and f"less than {WORTH_IT}" in reason
    assert choose_dispatch("auto", fine, 1, 1).reason == "one rank has all experts: no row is sent"
    assert choose_dispatch("once-per-rank", mixtral, 4, 1).value == "once-per-rank"
    assert choose_dispatch("plain", fine, 2, 1).value == "plain", "the default never changes by itself"


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3}, spec={"carry_over": True, "dispatch": "auto"})


def test_a_model_with_carry_over_equals_stock_and_its_twin(run_ranks: Ranks) -> None:
    """Top-3 of 8 experts on two ranks: 'auto' sends once per rank."""
    stock = replace(MODEL, impl="stock", ddp={}, spec={})
    runs = [stock, MODEL, replace(MODEL, impl="twin")]
    for reference_run, ours, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        check_trained(ours, reference_run, twin, FP32)
        assert ours["regions"]["layer 2 fc2"] == "backward of moe_combine AllToAll of layer 1"
        assert ours["stats"]["a2a_plain_bytes"] > 1.4 * ours["stats"]["a2a_bytes"]


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: counts, dispatch and combine, and the two backwards, as in plain form.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 5
