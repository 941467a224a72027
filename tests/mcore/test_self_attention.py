"""Attention with context parallelism: whole layers against float64 on one process, twins, dropout, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.device import device_of
from fluid_npu.mcore.context import RankDropout, choose_algorithm
from tests.support.context import Case, Stack, make_config, run_stack, worst_error
from tests.support.device import here

Ranks = Callable[..., list[Any]]
FP32 = 1e-5


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """One after the other."""
    return [run_stack(case) for case in cases]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same bits in outputs, input gradients and weight gradients."""
    weights = all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    lists = all(torch.equal(a, b) for kind in ("out", "dx") for a, b in zip(one[kind], other[kind], strict=True))
    return weights and lists and one["weights"].keys() == other["weights"].keys()


RING = {"cp_comm_type": "ring"}
#: (sizes, cases with one size): key heads above, equal to and below the ranks; window, QK norm, layers, micro-batches.
SAMPLE = [
    [
        Case(cp=2, ep=2, layers=3, micro_batches=2),
        Case(cp=2, ep=2, key_heads=8, window=(3, 0), qk_norm=True, recompute=True),
        Case(cp=2, ep=2, key_heads=1, overlap="off"),
        Case(cp=2, ep=2, window=(3, 0), qk_norm=True, micro_batches=2, config=RING),
    ],
    [
        Case(cp=4, ep=2, key_heads=2, layers=2, micro_batches=2),
        Case(cp=4, ep=2, key_heads=8, qk_norm=True),
        Case(cp=4, ep=2, key_heads=3, heads=6),  # 4 ranks cannot share 6 heads: a ring
    ],
    [Case(cp=2, ep=4, key_heads=4)],
]


@pytest.mark.parametrize("cases", SAMPLE, ids=lambda cases: f"cp{cases[0].cp}-ep{cases[0].ep}")
def test_gradients_of_whole_layers_against_one_process(cases: list[Case], run_ranks: Ranks) -> None:
    ranks = run_ranks(cases[0].ranks, run_cases, cases, sizes=cases[0].sizes)
    for index, case in enumerate(cases):
        errors = worst_error(case, [rank[index] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"


@pytest.mark.host
def test_torch_s_fused_attention_under_context_parallelism(run_ranks: Ranks) -> None:
    """What a GPU takes by itself: here FLUID_ATTENTION=torch asks for it; windows are computed by plain products."""
    ring = Case(cp=2, ep=2, layers=2, micro_batches=2, config=RING)
    cases = [*SAMPLE[0], ring, replace(ring, twin=True), Case(cp=2, ep=2, chunks=2, key_heads=4, recompute=True)]
    ranks = run_ranks(2, run_cases, cases, sizes=cases[0].sizes, env={"FLUID_ATTENTION": "torch"})
    for index, case in enumerate(cases):
        errors = worst_error(case, [rank[index] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
    assert all(equal(rank[cases.index(ring)], rank[cases.index(ring) + 1]) for rank in ranks)


def grid(cp: int, ep: int) -> list[Case]:
    """Layers, micro-batches and key heads by both algorithms; with 32 heads also chunks, some with carry-over."""
    configs = [{}, RING] if cp > 1 else [{}]
    cases = [
        Case(cp=cp, ep=ep, layers=layers, micro_batches=n, key_heads=keys, config=config)
        for layers, n, keys, config in product((1, 3), (1, 2, 4), (2, 8), configs)
    ]
    if cp > 1:
        cases += [
            Case(
                cp=cp, ep=ep, layers=layers, micro_batches=n, heads=32, key_heads=keys, chunks=chunks, carry=layers > 1
            )
            for layers, n, keys, chunks in product((1, 3), (1, 2, 4), (2, 8, 32), (1, 2, 4, 8))
        ]
    return cases


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("cp", "ep"), list(product((1, 2, 4), (1, 2, 4))))
def test_the_grid_of_cp_ep_layers_micro_batches_key_heads_and_chunks(cp: int, ep: int, run_ranks: Ranks) -> None:
    cases = grid(cp, ep)
    every = [replace(case, twin=twin) for case in cases for twin in (False, True)]
    ranks = run_ranks(cases[0].ranks, run_cases, every, sizes=cases[0].sizes, timeout=1500)
    worst = 0.0
    for index, case in enumerate(cases):
        errors = worst_error(case, [rank[2 * index] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
        assert all(equal(rank[2 * index], rank[2 * index + 1]) for rank in ranks), f"{case}: differs from its twin"
        worst = max(worst, *errors.values())
    print(f"{len(ranks)} ranks, cp {cp}, ep {ep}: {len(cases)} cases and their twins, worst relative error {worst:.1e}")


def variants() -> dict[str, Any]:
    """Overlapped, its twin, and attention computed again in backward, without and with dropout."""
    plain = Case(layers=2, micro_batches=2)
    dropped = replace(plain, config={"attention_dropout": 0.5})
    runs: dict[str, Any] = {"plain": run_stack(plain), "twin": run_stack(replace(plain, twin=True))}
    runs["again"] = run_stack(replace(plain, recompute=True))
    ring = replace(plain, config=RING)
    runs["ring"], runs["ring's twin"] = run_stack(ring), run_stack(replace(ring, twin=True))
    for name, case in (("dropped", dropped), ("dropped again", replace(dropped, recompute=True))):
        _seed()
        runs[name] = run_stack(case)
    return runs


def _seed() -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3)


@pytest.mark.parametrize("asked", ["megatron", pytest.param("torch", marks=pytest.mark.host)])
def test_twin_and_recomputation_change_no_bit(asked: str, run_ranks: Ranks) -> None:
    """By Megatron's products or a fused kernel, which a CPU takes when it is asked to; dropout is drawn again too."""
    for runs in run_ranks(2, variants, sizes=Case().sizes, env={"FLUID_ATTENTION": asked}):
        assert equal(runs["plain"], runs["twin"])
        assert equal(runs["plain"], runs["again"])
        assert equal(runs["ring"], runs["ring's twin"])
        assert runs["ring"]["stats"]["ring_backward_bytes"] > runs["ring"]["stats"]["ring_bytes"] > 0
        assert equal(runs["dropped"], runs["dropped again"]) and not equal(runs["plain"], runs["dropped"])
        # Two layers, two micro-batches, forward and backward: sp2hp and hp2sp are not repeated.
        for name in ("plain", "again"):
            stats = runs[name]["stats"]
            assert stats["a2a_count"] == 2 * 2 * 2 * (2 + 2), stats
            assert stats["sp2hp_bytes"] > 0 and stats["hp2sp_backward_bytes"] > 0


def test_dropout_differs_between_ranks_and_repeats_with_the_state() -> None:
    x = here(torch.ones(2000))
    device = device_of(x)
    state = device.get_rng_state()
    first, again = (RankDropout(0.25, 0), RankDropout(0.25, 0))
    masks = []
    for dropout in (first, again, RankDropout(0.25, 1)):
        device.set_rng_state(state)
        masks.append(dropout(x))
        after = device.get_rng_state()
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(first(x), masks[0]), "the next call draws others"
    assert not torch.equal(after, state) and abs(float((masks[2] == 0).float().mean()) - 0.25) < 0.05
    host = torch.get_rng_state()
    first.eval()
    assert first(x) is x and torch.equal(torch.get_rng_state(), host)


def alone() -> bool:
    """Without context parallelism: our spec's layer and the same with Megatron's SelfAttention in it."""
    from megatron.core.transformer.attention import SelfAttention

    from fluid_npu.mcore import layer_spec
    from fluid_npu.mcore.self_attention import FluidSelfAttention

    case = Case(cp=1, ep=1, layers=2, qk_norm=True)
    ours = run_stack(case)
    assert type(Stack(case).layers[0].self_attention) is FluidSelfAttention
    layer_spec.FLUID_ATTENTION = {}
    stock = run_stack(case)
    assert type(Stack(case).layers[0].self_attention) is SelfAttention
    return equal(ours, stock)


def test_without_context_parallelism_it_is_megatron_s_bit_for_bit(run_ranks: Ranks) -> None:
    assert run_ranks(1, alone, sizes={}) == [True]


def core(case: Case) -> Any:
    """A core attention alone."""
    from megatron.core.transformer.enums import AttnMaskType

    from fluid_npu.mcore.attention import FluidDotProductAttention

    asked = case.config.get("cp_comm_type")
    return FluidDotProductAttention(make_config(case), 1, AttnMaskType.causal, "self", cp_comm_type=asked)


def test_ulysses_is_taken_where_heads_can_be_shared_and_what_is_asked_for_where_it_is_asked_for() -> None:
    assert choose_algorithm(None, 8, 4).value == choose_algorithm("p2p", 8, 2).value == "ulysses"
    assert "cp_comm_type='p2p' is Transformer Engine's" in choose_algorithm("p2p", 8, 2).reason
    assert choose_algorithm(None, 6, 4).value == choose_algorithm("ring", 8, 2).value == "ring"
    assert choose_algorithm(None, 6, 4).reason == "4 ranks cannot share 6 heads"


def packed() -> dict[str, torch.Tensor]:
    """Three packed sequences through the core, each rank holding chunks of each."""
    from types import SimpleNamespace

    bounds = torch.tensor([0, 8, 8, 20], dtype=torch.int32)
    qkv = [torch.randn(20, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (8, 2, 4)]
    qkv[2] = qkv[2][:, :2]
    rank = dist.get_rank()
    held = [[0, 1, 6, 7, 8, 9, 10, 17, 18, 19], [2, 3, 4, 5, 11, 12, 13, 14, 15, 16]][rank]
    mine = [here(x[held]).requires_grad_() for x in qkv]
    out = core(Case())(*mine, None, packed_seq_params=SimpleNamespace(cu_seqlens_q=bounds))
    weights = torch.randn(20, 64, generator=torch.Generator().manual_seed(9))
    out.backward(here(weights[held]))
    whole = [x.double().requires_grad_() for x in qkv]
    outs = []
    for start, end in ((0, 8), (8, 20)):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in whole)
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    wanted = torch.cat(outs).flatten(1)
    wanted.backward(weights.double())
    pairs = [(out, wanted[held]), *((x.grad, w.grad[held]) for x, w in zip(mine, whole, strict=True))]
    return {f"{number}": _error(got, want) for number, (got, want) in enumerate(pairs)}


def _error(got: torch.Tensor, want: torch.Tensor) -> Any:
    from fluid_npu.ops.reference import relative_error

    return relative_error(got.detach().cpu(), want.detach())


def test_packed_sequences_do_not_see_each_other(run_ranks: Ranks) -> None:
    for errors in run_ranks(2, packed, sizes={"context_parallel_size": 2}):
        assert max(errors.values()) <= FP32, errors


def own_layer() -> dict[str, Any]:
    """A user's attention in a ModuleSpec of his own, with Megatron's core named in its submodules."""
    import fluid_npu
    from fluid_npu.mcore.attention import FluidDotProductAttention

    calls = []

    class MyAttention(fluid_npu.FluidSelfAttention):
        def forward(self, hidden_states: Any, attention_mask: Any, **kwargs: Any) -> Any:
            calls.append((tuple(hidden_states.shape), type(self.core_attention) is FluidDotProductAttention))
            return super().forward(hidden_states, attention_mask, **kwargs)

    return {**run_stack(Case(), MyAttention), "calls": calls}


def test_a_subclass_of_a_user_in_his_own_spec(run_ranks: Ranks) -> None:
    ranks = run_ranks(2, own_layer, sizes=Case().sizes)
    assert all(rank["calls"] == [((8, 2, 32), True)] for rank in ranks)
    assert max(worst_error(Case(), ranks).values()) <= FP32


def refuse() -> list[str]:
    """What cannot be, at construction and at a call."""
    made, ring = core(Case()), core(Case(config=RING))
    q, k = torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 2, 8)
    calls = (
        lambda: core(Case(heads=5, key_heads=5, config={"cp_comm_type": "a2a"})),
        lambda: core(Case(heads=5, key_heads=5, config={"attention_dropout": 0.5})),
        lambda: core(Case(config={"softmax_type": "off-by-one"})),
        lambda: core(Case(cp=4)),
        lambda: made(q, k, k, torch.zeros(1, 1, 4, 8, dtype=torch.bool)),
        lambda: made(q[:3], k[:3], k[:3], None),
        lambda: ring(q, k, k, torch.zeros(1, 1, 8, 8, dtype=torch.bool)),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_cannot_be_is_refused_by_name(run_ranks: Ranks) -> None:
    wanted = (
        "context_parallel_size=2: with cp_comm_type='a2a' it must divide the 5 attention heads of a tensor-parallel "
        "rank; use --context-parallel-size 1 or cp_comm_type='ring'",
        "attention_dropout=0.5: ring attention has none (2 ranks cannot share 5 heads)",
        "softmax_type='off-by-one': not implemented with context parallelism",
        "context_parallel_size=4: the context-parallel group has 2 ranks",
        "attention_mask of shape (1, 1, 4, 8): with context parallelism a mask of the whole sequence is needed",
        "a sequence of 6 rows cannot be dealt in 2 * 2 equal chunks; pad it to 8 rows",
        "attention_mask: ring attention takes none",
    )
    for message, text in zip(run_ranks(2, refuse, sizes={"context_parallel_size": 2})[0], wanted, strict=True):
        assert text in message
