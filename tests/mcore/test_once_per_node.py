"""dispatch='once-per-node' on two nodes of two ranks against a dense float64 loop, its twin and the plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from fluid_npu.comm.transports import TwoLevelTransport
from fluid_npu.comm.transports.nodes import Nodes
from fluid_npu.device.choice import Choice
from fluid_npu.mcore.dispatch_choice import choose_dispatch, nodes_for, rows_of_a_token
from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import HIDDEN, Case, make_config, relative, run_layer, worst_error
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
SIZES = {"expert_model_parallel_size": 4}
MANY = 2

CASES = [
    Case(ep=4, topk=3, micro_batches=2),
    Case(ep=4, topk=1, tokens=1, empty_experts=6, micro_batches=2),
    Case(ep=4, experts=64, topk=8, empty_experts=20, tokens=40),
]
HALVES = Case(ep=4, tokens=64, topk=4, dtype=torch.bfloat16, micro_batches=2, config={"moe_router_dtype": "fp32"})
MORE = [
    Case(ep=4, topk=2, empty_experts=5, micro_batches=2),
    Case(ep=4, experts=4, topk=4, micro_batches=2),
    Case(ep=4, topk=4, fuse=False, config={"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}),
    Case(ep=4, topk=3, config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    *(Case(ep=4, topk=topk, experts=experts, seed=6) for topk, experts in product((1, 2, 4, 6), (8, 32))),
]


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case overlapped, as the twin, over two-level, and plain."""
    found = []
    for plain in cases:
        case, legs = replace(plain, dispatch="once-per-node", node_size=2), TwoLevelTransport(2)
        runs = {
            "overlapped": case,
            "twin": replace(case, twin=True),
            "two-level": replace(case, node_size=0, transport=legs),
            "plain": plain,
        }
        found.append({name: run_layer(run) for name, run in runs.items()})
        legs.close()
    return found


def check(case: Case, runs: list[dict[str, dict[str, Any]]]) -> None:
    """Near float64 in outputs, dX, router and every expert's weights; bitwise the twin, over any transport."""
    if "moe_expert_capacity_factor" not in case.config:  # the loop drops no token
        errors = worst_error(case, [run["overlapped"] for run in runs])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
    for run in runs:
        ours, plain = run["overlapped"], run["plain"]
        beside = {detail["region"] for kind, _, detail in ours["record"] if kind == "dw"}
        assert beside == {"backward of moe_dispatch AllToAll of layer 1"}, "the leg between nodes takes longer"
        for key in ("out", "dx"):
            assert max(map(relative, ours[key], plain[key])) <= FP32, f"{case} {key}"
        for key in ("router", "fc1", "fc2"):
            assert relative(ours[key], plain[key]) <= FP32, f"{case} {key}"
        for name in ("twin", "two-level"):
            other = run[name]
            for key in ("router", "fc1", "fc2"):
                assert torch.equal(ours[key], other[key]), f"{case} {name} {key}"
            for key in ("out", "dx"):
                assert all(map(torch.equal, ours[key], other[key])), f"{case} {name} {key}"
            for key in ("a2a_bytes", "a2a_inside_node_bytes", "a2a_across_nodes_bytes"):
                assert ours["stats"][key] == other["stats"][key], f"{case} {name} {key}"


@pytest.fixture(scope="module")
def ranks(run_ranks: Ranks) -> list[Any]:
    return run_ranks(4, everything, sizes=SIZES, timeout=450)


def everything() -> dict[str, Any]:
    """All that lives, so that processes start once."""
    return {"cases": modes(CASES), "halves": stock_and_ours(HALVES), "refused": refusals()}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_float64_within_fp32_and_the_twin_bitwise(number: int, ranks: list[Any]) -> None:
    check(CASES[number], [rank["cases"][number] for rank in ranks])


@pytest.mark.nightly
def test_many_shapes_drops_and_recompute(run_ranks: Ranks) -> None:
    for number, runs in enumerate(zip(*run_ranks(4, modes, MORE, sizes=SIZES, timeout=500), strict=True)):
        check(MORE[number], list(runs))


def routed(maps: list[torch.Tensor]) -> dict[str, list[list[int]]]:
    """Rows from rank to rank of two nodes of two: plain, and the two legs of a dispatch by nodes."""
    plain = [[int(part.sum()) for part in m.chunk(4, 1)] for m in maps]
    wanted = [[int(part.any(1).sum()) for part in m.chunk(4, 1)] for m in maps]
    by_node = [[int(part.any(1).sum()) for part in m.chunk(2, 1)] for m in maps]
    across = [[by_node[p][q // 2] if p % 2 == q % 2 else 0 for q in range(4)] for p in range(4)]
    relayed = [[wanted[p % 2][q] + wanted[p % 2 + 2][q] if p // 2 == q // 2 else 0 for q in range(4)] for p in range(4)]
    return {"plain": plain, "across": across, "inside": relayed}


def test_a_token_crosses_once_per_node_and_goes_once_per_rank_inside(ranks: list[Any]) -> None:
    """Bytes of each rank counted by hand from the routing; a forward and a backward send each row there and back."""
    runs = [rank["cases"][MANY] for rank in ranks]
    rows = routed([run["overlapped"]["maps"][0].cpu() for run in runs])
    # 8 slots a row, of a node's 32 experts as of a rank's 16: probability and number, 4 bytes each.
    by_node, plain = (HIDDEN + 2 * 8 + HIDDEN) * 4, (HIDDEN + 4 + HIDDEN) * 4
    crossed = 0
    for rank, run in enumerate(runs):
        stats, node = run["overlapped"]["stats"], rank // 2

        def moved(form: str, ends: list[int], own: int = rank) -> int:
            return sum(rows[form][own][q] + rows[form][q][own] for q in ends if q != own)

        inside, away = [2 * node, 2 * node + 1], [2 - 2 * node, 3 - 2 * node]
        assert stats["a2a_across_nodes_bytes"] == moved("across", away) * by_node
        assert stats["a2a_inside_node_bytes"] == moved("inside", inside) * by_node
        assert stats["a2a_bytes"] == stats["a2a_inside_node_bytes"] + stats["a2a_across_nodes_bytes"]
        assert stats["a2a_plain_across_nodes_bytes"] == moved("plain", away) * plain
        assert stats["a2a_plain_inside_node_bytes"] == moved("plain", inside) * plain
        assert stats["a2a_plain_bytes"] == run["plain"]["stats"]["a2a_bytes"]
        crossed += stats["a2a_across_nodes_bytes"]
    assert 0 < crossed < sum(run["plain"]["stats"]["a2a_bytes"] for run in runs) / 3


def stock_and_ours(case: Case) -> dict[str, Any]:
    return {
        "stock": run_layer(replace(case, impl="stock")),
        "node": run_layer(replace(case, dispatch="once-per-node", node_size=2)),
    }


def test_bf16_is_not_worse_than_stock(ranks: list[Any]) -> None:
    """Errors against float64 over the same bf16 weights and inputs; 10 % for the luck of rounding."""
    runs = [rank["halves"] for rank in ranks]
    for run in runs:
        assert all(map(torch.equal, run["stock"]["maps"], run["node"]["maps"]))
    stock, node = (worst_error(HALVES, [run[name] for run in runs]) for name in ("stock", "node"))
    for key in stock:
        assert node[key] <= 1.1 * stock[key], (key, node[key], stock[key])


def refusals() -> dict[str, str]:
    """What cannot be had says what is in the way."""
    from tests.support.moe import fluid_layer

    node = Case(ep=4, dispatch="once-per-node", node_size=2)
    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    calls: dict[str, Callable[[], Any]] = {
        "no size": lambda: fluid_layer(replace(node, node_size=0)),
        "one node": lambda: fluid_layer(replace(node, node_size=4)),
        "nodes of one": lambda: fluid_layer(replace(node, node_size=1)),
        "uneven": lambda: fluid_layer(replace(node, node_size=3)),
        "negative": lambda: fluid_layer(replace(node, node_size=-2)),
        "padded": lambda: fluid_layer(replace(node, config=padded)),
        "chunks": lambda: fluid_layer(replace(node, overlap="full", chunks=2)),
        "allgather": lambda: fluid_layer(replace(node, config={"moe_token_dispatcher_type": "allgather"})),
        "fp8": lambda: nodes_for("once-per-node", [0, 1, 2, 3], 2, coded=True),
        "etp": lambda: choose_dispatch("once-per-node", make_config(node), 4, 2),
    }
    messages = value_errors(calls)
    layer = fluid_layer(replace(node, overlap="full"))
    return {**messages, "auto chunks": f"{layer.chunks.value} {layer.chunks.reason}"}


def test_what_is_not_there_is_refused_by_name(ranks: list[Any]) -> None:
    said = ranks[0]["refused"]
    for name in ("no size", "one node", "nodes of one", "uneven"):
        assert said[name].startswith("dispatch='once-per-node': ") and "use dispatch='once-per-rank'" in said[name]
        assert "--a2a-node-size" in said[name] or name == "uneven", said[name]
    assert "1 node(s) of 4 rank(s)" in said["one node"] and "4 node(s) of 1 rank(s)" in said["nodes of one"]
    assert "node_size=-2" in said["negative"]
    assert "moe_pad_expert_input_to_capacity=True" in said["padded"]
    assert "dispatch='once-per-node' sends all tokens in one piece" in said["chunks"]
    assert said["auto chunks"].startswith("1 dispatch='once-per-node' sends all tokens in one piece")
    assert "set --moe-token-dispatcher-type alltoall" in said["allgather"]
    assert said["fp8"].startswith("--a2a-payload-dtype fp8: dispatch='once-per-node'")
    assert "expert_tensor_parallel_size=2" in said["etp"]


def test_auto_takes_it_for_the_rows_between_nodes() -> None:
    fine, mixtral = make_config(Case(experts=64, topk=6)), make_config(Case(experts=8, topk=2))
    nodes = Choice(Nodes(count=2, size=2), "2 nodes of 2 ranks")
    value, reason = choose_dispatch("auto", fine, 4, 1, "", nodes)
    assert value == "once-per-node" and "64 experts, top-6, 2 nodes of 2 ranks: 1.69 times fewer rows" in reason
    assert "2.00 times as many inside" in reason
    assert choose_dispatch("auto", mixtral, 4, 1, "", nodes).value == "plain", "1.18 times fewer"
    assert choose_dispatch("auto", fine, 4, 1).value == "once-per-rank", "nothing is known of nodes"
    assert choose_dispatch("auto", fine, 4, 2, "", nodes).value == "once-per-rank", "no form for expert tensor ranks"
    for alone in (Nodes(count=1, size=4), Nodes(count=4, size=1)):
        assert choose_dispatch("auto", fine, 4, 1, "", Choice(alone, "")).value == "once-per-rank"
    assert choose_dispatch("plain", fine, 4, 1, "", nodes).value == "plain", "the default never changes by itself"


def test_expected_rows_are_those_of_random_routing() -> None:
    generator, nodes = torch.Generator().manual_seed(1), Nodes(count=2, size=2)
    scores = torch.rand(4000, 64, generator=generator)
    map_TE = torch.zeros_like(scores).scatter_(1, scores.topk(6)[1], 1.0).bool()
    by_rank = map_TE.view(-1, 4, 16).any(2).float()  # of a rank 0
    by_node = map_TE.view(-1, 2, 32).any(2).float()
    want = float(by_node[:, 1].mean()), float(by_rank[:, 1].mean() + by_rank[:, 3].mean())
    assert rows_of_a_token(64, 6, nodes, True) == pytest.approx(want, rel=0.02)
    direct = float(by_rank[:, 2:].sum(1).mean()), float(by_rank[:, 1].mean())
    assert rows_of_a_token(64, 6, nodes, False) == pytest.approx(direct, rel=0.02)


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
OURS: dict[str, Any] = {"carry_over": True, "dispatch": "once-per-node", "node_size": 2}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3}, spec=OURS)


def trained_and_recorded() -> dict[str, Any]:
    runs = [replace(MODEL, impl="stock", ddp={}, spec={}), MODEL, replace(MODEL, impl="twin")]
    return {"trained": train_all(runs), "recorded": recorded_steps(MODEL)}


@pytest.mark.nightly
def test_a_model_with_carry_over_equals_stock_and_its_twin_in_a_clean_order(run_ranks: Ranks) -> None:
    found = run_ranks(4, trained_and_recorded, sizes=SIZES, timeout=500)
    for stock, ours, twin in (rank["trained"] for rank in found):
        check_trained(ours, stock, twin, FP32)
        assert ours["stats"]["a2a_plain_across_nodes_bytes"] > 1.2 * ours["stats"]["a2a_across_nodes_bytes"]
    # Steps x micro-batches x layers x ranks: counts, dispatch and combine in two legs, and their backwards.
    assert exchanges_of_clean_steps([rank["recorded"] for rank in found]) == 2 * 2 * 2 * 4 * 9
