"""The dispatcher by itself: users' dispatch() and combine(), Megatron's six steps in a stock MoELayer, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.device import here
from tests.support.dispatchers import in_stock_layer, make_dispatcher
from tests.support.moe import HIDDEN, Case, make_config

Ranks = Callable[..., list[Any]]


def round_trip(case: Case) -> dict[str, Any]:
    """Dispatches tokens whose first column names them, and combines them unchanged."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dispatcher = make_dispatcher(case)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    hidden = here(torch.randn(case.tokens, 1, HIDDEN, generator=generator)).requires_grad_()
    scores = here(torch.rand(case.tokens, case.experts, generator=generator))
    routing_map = torch.zeros_like(scores).scatter_(1, scores.topk(case.topk)[1], 1.0).bool()
    probs = (scores * routing_map).requires_grad_()
    tokens, per_expert, p = dispatcher.dispatch(hidden, routing_map, probs)
    out = dispatcher.combine(tokens)
    out.sum().backward()
    return {
        "tokens": tokens.detach(),
        "per_expert": per_expert,
        "probs": p.detach(),
        "equal": torch.allclose(out, hidden * case.topk, rtol=1e-6),
        "grad": torch.equal(hidden.grad, torch.full_like(hidden, float(case.topk))),
        "sent": (hidden.detach().view(-1, HIDDEN), routing_map, probs.detach()),
        "ep_rank": parallel_state.get_expert_model_parallel_rank(),
    }


@pytest.mark.parametrize("case", [Case(ep=2), Case(ep=4, topk=6, tokens=5), Case(ep=1)], ids=["ep2", "ep4", "ep1"])
def test_dispatch_brings_each_expert_its_tokens_and_combine_brings_them_back(case: Case, run_ranks: Ranks) -> None:
    ranks = run_ranks(case.ep, round_trip, case, sizes={"expert_model_parallel_size": case.ep})
    local = case.experts // case.ep
    for rank in ranks:
        assert rank["equal"] and rank["grad"]
        want_tokens, want_probs, want_counts = [], [], []
        for expert in range(rank["ep_rank"] * local, (rank["ep_rank"] + 1) * local):
            sources = [(other["sent"], other["sent"][1][:, expert]) for other in ranks]
            want_tokens += [sent[0][mask] for sent, mask in sources]
            want_probs += [sent[2][mask, expert] for sent, mask in sources]
            want_counts.append(sum(int(mask.sum()) for _, mask in sources))
        assert torch.equal(rank["tokens"], torch.cat(want_tokens))
        assert torch.equal(rank["probs"], torch.cat(want_probs))
        assert rank["per_expert"].tolist() == want_counts


def test_six_steps_in_a_stock_layer(run_ranks: Ranks) -> None:
    case = Case(ep=2, fuse=False)
    for rank in run_ranks(2, in_stock_layer, case, sizes={"expert_model_parallel_size": 2}):
        for stock, ours in rank["pairs"]:
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def refusals() -> dict[str, str]:
    """What cannot be built says which option is in the way."""
    messages = {}
    for option, value in (("moe_router_padding_for_quantization", True), ("moe_latent_size", 8)):
        config = make_config(Case())
        setattr(config, option, value)
        from fluid_npu.mcore.token_dispatcher import _refuse_unsupported

        with pytest.raises(ValueError) as caught:
            _refuse_unsupported(config)
        messages[option] = str(caught.value)
    dispatcher = make_dispatcher(Case())
    with pytest.raises(RuntimeError) as early:
        dispatcher.combine(here(torch.zeros(1, HIDDEN)))
    messages["early"] = str(early.value)
    dispatcher.config.moe_shared_expert_overlap = True
    dispatcher.set_shared_experts(torch.nn.Identity())
    with pytest.raises(ValueError) as shared:
        dispatcher.dispatch(*(here(x) for x in (torch.zeros(1, HIDDEN), torch.ones(1, 8).bool(), torch.ones(1, 8))))
    messages["shared"] = str(shared.value)
    return messages


def test_unsupported_options_are_named(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refusals, sizes={"expert_model_parallel_size": 2})[0]
    assert "moe_router_padding_for_quantization=True" in messages["moe_router_padding_for_quantization"]
    assert "moe_latent_size=8" in messages["moe_latent_size"]
    assert "token_combine() needs dispatch_preprocess() or dispatch() before it" in messages["early"]
    assert "moe_shared_expert_overlap=True" in messages["shared"]
