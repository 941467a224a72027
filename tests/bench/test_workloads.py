"""Token counts of W0 to W7: literal numbers, and what the dispatcher really sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fluid_npu.bench.workload_names import DESCRIPTIONS
from fluid_npu.bench.workloads import Sizes, counts, period, received, routing_map, tokens_of
from fluid_npu.mcore.dispatch_choice import expected_coverage

FOUR = Sizes(ranks=2, experts=4, topk=2, tokens=12)  # 24 rows a rank, two experts a rank


@pytest.mark.parametrize(
    ("name", "step", "rank", "expected"),
    [
        ("W0", 0, 0, [6, 6, 6, 6]),
        ("W1", 0, 0, [10, 3, 9, 2]),  # 24 * 4/10 = 9.6 and 2.4: what is left goes round from the rank's first expert
        ("W2", 0, 1, [9, 9, 3, 3]),
        ("W3", 0, 0, [9, 7, 5, 3]),
        ("W4", 0, 0, [6, 6, 6, 6]),
        ("W4", 0, 1, [3, 3, 3, 3]),
        ("W5", 0, 0, [12, 12, 0, 0]),
        ("W6", 3, 0, [3, 3, 9, 9]),
        ("W7", 2, 0, [6, 6, 6, 6]),
        ("W7", 3, 0, [11, 11, 1, 1]),  # 24 * 9/20 = 10.8 and 1.2
        ("W7", 7, 0, [2, 2, 10, 10]),
    ],
)
def test_counts_are_these(name: str, step: int, rank: int, expected: list[int]) -> None:
    got = counts(name, step, rank, FOUR)
    assert sum(got) == tokens_of(name, rank, FOUR) * FOUR.topk
    assert got == expected


@pytest.mark.parametrize("name", DESCRIPTIONS)
@pytest.mark.parametrize(
    "sizes",
    [FOUR, Sizes(ranks=4, experts=64, topk=6, tokens=100), Sizes(ranks=8, experts=8, topk=4, tokens=7)]
    + [Sizes(ranks=1, experts=8, topk=2, tokens=33)],
)
def test_maps_have_the_counts_and_k_experts_a_token(name: str, sizes: Sizes) -> None:
    for step in range(period(name, sizes.ranks)):
        for rank in range(sizes.ranks):
            wanted, tokens = counts(name, step, rank, sizes), tokens_of(name, rank, sizes)
            map_TE = routing_map(wanted, tokens, (7, step, rank))
            assert map_TE.sum(axis=0).tolist() == wanted
            assert (map_TE.sum(axis=1) == sizes.topk).all()
            assert np.array_equal(map_TE, routing_map(wanted, tokens, (7, step, rank)))
    assert sum(received(name, 0, sizes)) == sizes.topk * sum(tokens_of(name, r, sizes) for r in range(sizes.ranks))


def test_too_many_rows_for_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="--topk"):
        counts("W0", 0, 0, Sizes(ranks=1, experts=2, topk=3, tokens=4))


def plans_of_one_layer(names: list[str]) -> list[dict[str, Any]]:
    """What FluidTokenDispatcher decided for each workload, on this rank."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.spec_utils import build_module

    from fluid_npu.bench.forced_routing import ForcedRouting
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support.moe import Case, make_config

    case = Case(ep=2)
    config = make_config(case)
    layer = build_module(get_fluid_moe_layer_spec(config).submodules.mlp, config=config)
    layer.set_layer_number(1)
    plans: list[Any] = []
    plan = layer.token_dispatcher.plan
    layer.token_dispatcher.plan = lambda *args: plans.append(plan(*args)) or plans[-1]
    found = []
    for name in names:
        sizes = Sizes(ranks=2, experts=case.experts, topk=case.topk, tokens=40)
        forced = ForcedRouting(name, sizes, dist.get_rank(), 1, 1, torch.device("cpu"))
        forced.force(layer)
        forced.step = 3
        x = torch.randn(tokens_of(name, dist.get_rank(), sizes), 1, config.hidden_size, requires_grad=True)
        layer(x)[0].sum().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()
        last = plans[-1]
        found.append({"sent": last.input_splits, "got": last.output_splits, "rows": last.tokens_per_expert})
    return found


def test_the_dispatcher_sends_what_the_oracle_says(run_ranks: Callable[..., list[Any]]) -> None:
    from tests.support.moe import Case

    case, names = Case(ep=2), list(DESCRIPTIONS)
    local = case.experts // 2
    sizes = Sizes(ranks=2, experts=case.experts, topk=case.topk, tokens=40)
    ranks = run_ranks(2, plans_of_one_layer, names, sizes={"expert_model_parallel_size": 2})
    for rank, plans in enumerate(ranks):
        for name, plan in zip(names, plans, strict=True):
            sent = np.array([counts(name, 3, source, sizes) for source in range(2)]).reshape(2, 2, local)
            assert plan["sent"] == sent[rank].sum(axis=1).tolist(), name
            assert plan["got"] == sent[:, rank].sum(axis=1).tolist(), name
            assert plan["rows"] == sent[:, rank].sum(axis=0).tolist(), name


@pytest.mark.parametrize(("ranks", "experts", "topk"), [(4, 64, 6), (4, 8, 2), (2, 8, 2)])
def test_which_experts_a_token_has_together_is_random(ranks: int, experts: int, topk: int) -> None:
    """So tokens are wanted by as many ranks as under random routing, not by as many as can be."""
    sizes = Sizes(ranks=ranks, experts=experts, topk=topk, tokens=4096)
    map_TE = routing_map(counts("W0", 0, 0, sizes), sizes.tokens, (1, 0, 0))
    wanted = map_TE.reshape(sizes.tokens, ranks, -1).any(2).mean()
    assert abs(wanted - expected_coverage(experts, topk, ranks)) < 0.01
