"""dispatch='static' on real ranks: the bits of once-per-rank, without a size told to anybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from fluid_npu.mcore.dispatch_choice import WANTED, choose_dispatch, expected_coverage
from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import Case, fluid_layer, make_config, run_layer, worst_error
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]
FP32 = 1e-5

GELU = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
CASES = [
    Case(topk=1, micro_batches=2),
    Case(topk=2, micro_batches=2),
    Case(topk=8, fuse=False),
    Case(topk=3, tokens=1, empty_experts=4, micro_batches=2),  # the last rank's experts get no row
    Case(topk=6, experts=64, tokens=40),
    Case(topk=2, dtype=torch.bfloat16, config={"moe_router_dtype": "fp32"}),
    Case(topk=2, config={"recompute_granularity": "selective", "recompute_modules": ["moe", "moe_act"]}),
    Case(topk=4, config={"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}),
    Case(topk=2, config={"moe_shared_expert_intermediate_size": 16}, fuse=False),
    Case(topk=2, config=GELU, micro_batches=2),
]
FOUR = [Case(ep=4, topk=3, micro_batches=2), Case(ep=4, experts=64, topk=8, empty_experts=33)]


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case overlapped, as the serialised twin, without overlap, and once per rank."""
    found = []
    for case in cases:
        static = replace(case, dispatch="static")
        runs = {"overlapped": static, "twin": replace(static, twin=True), "off": replace(static, overlap="off")}
        runs["once"] = replace(case, dispatch="once-per-rank")
        found.append({name: run_layer(run) for name, run in runs.items()})
    return found


def check(case: Case, ranks: list[dict[str, dict[str, Any]]]) -> None:
    """All four have the same bits; they are as near to float64 as the tolerance of fp32 asks."""
    shared = "moe_shared_expert_intermediate_size" in case.config
    dropped = "moe_expert_capacity_factor" in case.config
    if case.dtype == torch.float32 and not (dropped or shared):  # the loop has neither
        errors = worst_error(case, [rank["overlapped"] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
    for rank in ranks:
        ours, stats = rank["overlapped"], rank["overlapped"]["stats"]
        for other in ("twin", "off", "once"):
            for key in ("router", "fc1", "fc2"):
                assert torch.equal(ours[key], rank[other][key]), f"{case} {other} {key}"
            for key in ("out", "dx"):
                assert all(map(torch.equal, ours[key], rank[other][key])), f"{case} {other} {key}"
        assert all(value.isfinite().all() for value in (*ours["out"], *ours["dx"], ours["fc1"], ours["fc2"]))
        assert stats["a2a_count"] == rank["once"]["stats"]["a2a_count"]
        assert stats["a2a_bytes"] >= rank["once"]["stats"]["a2a_bytes"]
        assert stats["moe_dispatch_bytes"] > 0


@pytest.mark.parametrize("cases", [CASES, FOUR], ids=["two_ranks", "four_ranks"])
def test_has_the_bits_of_once_per_rank_and_of_its_twin(cases: list[Case], run_ranks: Ranks) -> None:
    ep = cases[0].ep
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep}, timeout=300)
    for index, case in enumerate(cases):
        check(case, [rank[index] for rank in ranks])


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


def without_gradients() -> list[torch.Tensor]:
    """The output under no_grad and, as evaluation calls it, with activations that are not SwiGLU."""
    outputs = []
    for dispatch in ("static", "once-per-rank"):
        for config in ({}, GELU):
            layer = fluid_layer(Case(topk=3, dispatch=dispatch, config=config))
            with torch.no_grad():
                for number, parameter in enumerate(layer.parameters()):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
                outputs.append(layer(torch.linspace(-1, 1, 8 * 16).view(8, 1, 16))[0])
    return outputs


def test_without_gradients(run_ranks: Ranks) -> None:
    for static, other, once, other_once in run_ranks(2, without_gradients, sizes={"expert_model_parallel_size": 2}):
        assert torch.equal(static, once) and torch.equal(other, other_once)


def planted(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layer with whatever memory there is, and with NaN and infinity behind the rows in use of every buffer."""
    from unittest import mock

    from fluid_npu.device.kernels import known_rows
    from fluid_npu.ops import payload_static

    filled = []

    def poisoned(y: torch.Tensor, capacity: int) -> torch.Tensor:
        buffer = y.new_full((capacity, *y.shape[1:]), float("nan" if len(filled) % 2 else "inf"))
        buffer[: y.shape[0]] = y
        filled.append(capacity - y.shape[0])
        return buffer

    plain = run_layer(case)
    with mock.patch.object(known_rows, "whole", poisoned), mock.patch.object(payload_static, "whole", poisoned):
        found = run_layer(case)
    # Two micro-batches: rows and probabilities in, FC1, activation, FC2; dX three times, and the activation's two.
    assert len(filled) == 2 * (5 + 5) and all(filled)
    return plain, found


@pytest.mark.parametrize("config", [{}, GELU], ids=["swiglu", "gelu"])
def test_what_lies_behind_the_rows_in_use_reaches_no_result(run_ranks: Ranks, config: dict[str, Any]) -> None:
    case = Case(topk=3, dispatch="static", micro_batches=2, empty_experts=1, config=config)
    for plain, found in run_ranks(2, planted, case, sizes={"expert_model_parallel_size": 2}):
        for key in ("router", "fc1", "fc2"):
            assert torch.equal(plain[key], found[key]), key
        for key in ("out", "dx"):
            assert all(map(torch.equal, plain[key], found[key])), key


def bounded() -> dict[str, Any]:
    """All 8 tokens want experts 0 and 1 of 8, by a router that drops none: capacity of the buffers, and outputs."""
    found: dict[str, Any] = {}
    for name, config in {"all": {}, "dropped": {"moe_expert_capacity_factor": 1.0}}.items():
        layer = fluid_layer(Case(dispatch="static", topk=2, config=config))
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        routing_map = torch.zeros(8, 8, dtype=torch.bool)
        routing_map[:, :2] = True
        layer.route = lambda *_, routing_map=routing_map, **__: (0.5 * routing_map, routing_map)
        plan = layer.token_dispatcher.plan(routing_map, torch.Size((8, 1, 16)))
        found[f"capacity, {name}"] = plan.tokens_per_expert.capacity
        found[name] = layer(torch.linspace(-1, 1, 8 * 16).view(8, 1, 16))[0].detach()
    return found


def test_an_expert_capacity_bounds_the_buffers_whatever_a_router_does(run_ranks: Ranks) -> None:
    """Room for 2 tokens of each rank and expert (8 tokens, top-2, 8 experts); the others are dropped where they are."""
    for found in run_ranks(2, bounded, sizes={"expert_model_parallel_size": 2}):
        assert (found["capacity, all"], found["capacity, dropped"]) == (2 * 8 * 2, 2 * 4 * 2)
        assert torch.equal(found["dropped"][:2], found["all"][:2]) and found["all"][2:].abs().min() > 0
        assert not found["dropped"][2:].any()


def two_sizes() -> tuple[list[int], list[str]]:
    """Questions to the store over steps of 8, 8, 4 and 8 tokens; the errors of ranks with other numbers."""
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import Peers
    from fluid_npu.device.kernels.agreement import store_of_job
    from fluid_npu.mcore.same_tokens import check_same_tokens

    layer, rank = fluid_layer(Case(dispatch="static")), dist.get_rank()
    store = store_of_job()
    asked, original = [], type(store).wait

    def counted(self: Any, *args: Any) -> Any:
        asked.append(args)
        return original(self, *args)

    type(store).wait = counted
    questions = []
    try:
        for tokens in (8, 8, 4, 8):
            before = len(asked)
            layer(torch.ones(tokens, 1, 16))
            questions.append(len(asked) - before)
    finally:
        type(store).wait = original
    errors = []
    with pytest.raises(ValueError) as caught:
        layer(torch.ones(5 + rank, 1, 16))
    errors.append(str(caught.value))
    if rank == 0:  # the other one never comes to a new number
        with pytest.raises(RuntimeError) as late:
            check_same_tokens(9, Peers.of(dist.group.WORLD), timeout_s=0.2, store=store)
        errors.append(str(late.value))
    dist.barrier()
    return questions, errors


def test_other_ranks_are_asked_once_for_each_number_of_tokens(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, two_sizes, sizes={"expert_model_parallel_size": 2})
    assert first[0] == second[0] == [2, 0, 2, 0]
    for _, errors in (first, second):
        assert "the same number of tokens; rank 0 has 5, rank 1 has 6" in errors[0]
        assert "use dispatch='once-per-rank'" in errors[0]
    assert "rank 0 has 9 tokens for the first time, but rank 1 came to no new number" in first[1][1]
    assert "so far: 8, 4" in first[1][1]


def refusals() -> dict[str, str]:
    """What cannot be had says what is in the way."""
    from tests.support.dispatchers import make_dispatcher

    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    calls: dict[str, Callable[[], Any]] = {
        "padded": lambda: fluid_layer(Case(dispatch="static", config=padded)),
        "allgather": lambda: fluid_layer(Case(dispatch="static", config={"moe_token_dispatcher_type": "allgather"})),
        "chunks": lambda: fluid_layer(Case(overlap="full", chunks=2, dispatch="static")),
        "alone": lambda: make_dispatcher(Case(dispatch="static")),
        "etp": lambda: choose_dispatch("static", make_config(Case()), 2, 2, "cpu"),
    }
    return value_errors(calls)


def test_what_is_not_there_is_refused_by_name(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert "dispatch='static': moe_pad_expert_input_to_capacity=True" in messages["padded"]
    assert "dispatch='static': moe_token_dispatcher_type='allgather'" in messages["allgather"]
    assert "use dispatch='once-per-rank'; use chunks=1 or 'auto'" in messages["chunks"]
    assert "FluidGroupedMLP in FluidMoELayer alone" in messages["alone"]
    assert "expert_tensor_parallel_size=2" in messages["etp"]


def test_auto_wants_a_gpu_and_tokens_that_are_wanted_nearly_everywhere() -> None:
    fine, mixtral = make_config(Case(experts=64, topk=6)), make_config(Case(experts=8, topk=2))
    assert expected_coverage(64, 6, 2) == pytest.approx(0.988, abs=1e-3) and expected_coverage(8, 2, 2) < WANTED
    value, reason = choose_dispatch("auto", fine, 2, 1, "cuda")
    assert value == "static" and "98.8 % of all tokens" in reason and "1.01 times the rows" in reason
    assert choose_dispatch("auto", fine, 2, 1, "cpu").value == "once-per-rank"
    assert choose_dispatch("auto", fine, 2, 2, "cuda").value == "once-per-rank"
    assert choose_dispatch("auto", fine, 4, 1, "cuda").value == "once-per-rank", "82.5 % wanted"
    assert choose_dispatch("auto", mixtral, 2, 1, "cuda").value == "once-per-rank"
    assert "1.27 times the rows of once-per-rank" in choose_dispatch("static", mixtral, 2, 1, "cpu").reason


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3}, spec={"carry_over": True, "dispatch": "static"})


def test_a_model_with_carry_over_equals_stock_and_its_twin(run_ranks: Ranks) -> None:
    stock = replace(MODEL, impl="stock", ddp={}, spec={})
    runs = [stock, MODEL, replace(MODEL, impl="twin")]
    for reference_run, ours, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        check_trained(ours, reference_run, twin, FP32)
        assert ours["regions"]["layer 2 fc2"] == "backward of moe_combine AllToAll of layer 1"


def test_the_order_of_a_training_step_is_clean_and_no_counts_travel(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: dispatch and combine, and the two backwards; no counts.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 4
