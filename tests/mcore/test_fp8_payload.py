"""The MoE layer with an fp8 payload on real ranks: equal to its twin, near float64 over the tokens that arrive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.device.kernels.e4m3_rows import from_e4m3, to_e4m3
from fluid_npu.mcore.dispatch_plan import ExpertGroups
from fluid_npu.mcore.token_dispatcher import usable_payload
from fluid_npu.ops.payload_fp8 import Fp8Payload
from tests.support import moe
from tests.support.moe import Case, relative, run_layer

Ranks = Callable[..., list[Any]]
CASES = [
    Case(topk=2, micro_batches=2),
    Case(topk=3, micro_batches=2, dispatch="once-per-rank", empty_experts=4),
    Case(topk=2, tokens=1, empty_experts=6),
    Case(topk=2, dtype=torch.bfloat16),
    Case(topk=2, overlap="full"),
    Case(topk=3, micro_batches=2, dispatch="static", empty_experts=4),
]
SAME = ("router", "fc1", "fc2")


def over_both() -> list[dict[str, Any]]:
    """Each case with fp8, as its twin, and with the tokens' own dtype."""
    build = moe.fluid_layer
    found: list[dict[str, Any]] = []

    def with_fp8(case: Case) -> Any:
        layer = build(case)
        layer.token_dispatcher.payload = Fp8Payload()
        return layer

    for case in CASES:
        moe.fluid_layer = build
        plain = run_layer(replace(case, chunks=1) if case.overlap == "full" else case)
        moe.fluid_layer = with_fp8
        case = replace(case, chunks=1) if case.overlap == "full" else case
        found.append({"plain": plain, "fp8": run_layer(case), "twin": run_layer(replace(case, twin=True))})
    return found


@pytest.fixture(scope="module")
def ranks(run_ranks: Ranks) -> list[Any]:
    return run_ranks(2, over_both, sizes={"expert_model_parallel_size": 2})


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_its_twin_and_sends_fewer_bytes(number: int, ranks: list[Any]) -> None:
    for of_rank in ranks:
        ours, twin, plain = (of_rank[number][name] for name in ("fp8", "twin", "plain"))
        assert all(torch.equal(ours[key], twin[key]) for key in SAME)
        assert all(all(map(torch.equal, ours[key], twin[key])) for key in ("out", "dx"))
        assert ours["stats"]["a2a_plain_bytes"] == plain["stats"]["a2a_plain_bytes"]
        sent, before = (stats["stats"]["moe_dispatch_bytes"] for stats in (ours, plain))
        # 16 columns of bf16 are 32 bytes, and so are 16 bytes with a scale and its filling.
        same = CASES[number].dtype == torch.bfloat16 or before == 0
        assert sent == before if same else sent < before
        # The other three exchanges are as before.
        for name in ("moe_combine_bytes", "moe_dispatch_backward_bytes", "moe_combine_backward_bytes"):
            assert ours["stats"].get(name, 0) == plain["stats"].get(name, 0)


def straight_through(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The layer as a loop in float64 whose experts get the decoded tokens, with the gradient of the tokens."""
    whole = moe._dense_layer

    def dense(x: torch.Tensor, w: dict[str, torch.Tensor], routing: torch.Tensor, of: Case) -> torch.Tensor:
        arrived = from_e4m3(to_e4m3(x.detach().to(of.dtype)), x.shape[1]).double()
        experts_get = x + (arrived - x).detach()
        # The router sees the tokens themselves: its logits come from a second set of columns.
        both = torch.cat([experts_get, x], dim=1)
        width = x.shape[1]
        router = torch.cat([torch.zeros_like(w["router"]), w["router"]], dim=1)
        fc1 = torch.cat([w["fc1"], torch.zeros_like(w["fc1"])], dim=1)
        fc2 = torch.cat([w["fc2"], torch.zeros_like(w["fc2"])], dim=2)
        return whole(both, {"router": router, "fc1": fc1, "fc2": fc2}, routing, of)[:, :width]

    moe._dense_layer = dense
    try:
        return moe.reference(case, ranks)
    finally:
        moe._dense_layer = whole


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_is_float64_over_the_tokens_that_arrive_and_near_the_whole_tokens(number: int, ranks: list[Any]) -> None:
    case = CASES[number]
    runs = [of_rank[number]["fp8"] for of_rank in ranks]
    wanted = straight_through(case, runs)
    for rank, run in enumerate(runs):
        for key in ("out", "dx"):
            for got, want in zip(run[key], wanted[key][rank], strict=True):
                assert relative(got, want) <= 1e-5, key
        assert relative(run["router"], wanted["router"][rank]) <= 1e-5
        # A product of two projections, each of tokens with a relative error of at most 2^-4.
        for got, whole in zip(run["out"], ranks[rank][number]["plain"]["out"], strict=True):
            assert 1e-3 < relative(got, whole) <= 2 * 2.0**-4
    for key in ("fc1", "fc2"):
        got = torch.cat([run[key] for run in runs])
        assert relative(got, wanted[key]) <= 1e-5, key


def refusals() -> dict[str, str]:
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    found = {}
    for name, case in {
        "Megatron's dispatcher": Case(config={"moe_token_dispatcher_type": "allgather"}),
        "chunks": Case(overlap="full", chunks=2),
    }.items():
        config = moe.make_config(case)
        spec = get_fluid_moe_layer_spec(config, overlap=case.overlap, chunks=case.chunks, payload_dtype="fp8")
        with pytest.raises(ValueError) as caught:
            moe._built(spec.submodules.mlp, config)
        found[name] = str(caught.value)
    return found


def test_what_cannot_be_coded_is_refused(run_ranks: Ranks) -> None:
    found = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert (
        "fp8: the dispatcher of moe_token_dispatcher_type='allgather' codes nothing" in found["Megatron's dispatcher"]
    )
    assert "chunks=2: an fp8 payload is not coded in chunks; use --a2a-payload-dtype same" in found["chunks"]


def test_expert_tensor_parallelism_is_refused_and_one_rank_codes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = Peers(None, (0,), 0), Peers(None, (0, 1), 0)
    with pytest.raises(ValueError, match=r"--a2a-payload-dtype fp8: expert_tensor_parallel_size=2 .* use same"):
        usable_payload(Fp8Payload(), ExpertGroups(ep=two, etp=two, tp_ep=two))
    assert usable_payload(Fp8Payload(), ExpertGroups(ep=one, etp=one, tp_ep=one)) is None
    assert "payload of dispatch: same (one rank has all experts" in capsys.readouterr().out
