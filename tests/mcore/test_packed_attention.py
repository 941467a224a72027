"""Packed sequences through whole layers under context parallelism: in one piece and in chunks of heads, by float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.ops.reference import relative_error
from tests.support.context import HIDDEN, SIZE, Case, Stack, reference_of, weight
from tests.support.device import here

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
BOUNDS = [0, 8, 8, 24]
#: Rows of each of two ranks: chunks r and 3 - r of every sequence.
HELD = [[0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23], [2, 3, 4, 5, *range(12, 20)]]
CASES = [
    Case(layers=2, qk_norm=True),
    Case(layers=2, qk_norm=True, chunks=2, key_heads=4, carry=True),
    Case(chunks=4, heads=16, key_heads=4, recompute=True),
]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Input of all sequences behind one another ``[S, 1, H]``, and the weights of their loss."""
    generator = torch.Generator().manual_seed(4)
    x, g = (torch.randn(BOUNDS[-1], 1, HIDDEN, generator=generator) for _ in range(2))
    return x, g


def run(case: Case) -> dict[str, Any]:
    """Output, input gradient and weight gradients of this rank."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.packed_seq_params import PackedSeqParams

    from fluid_npu.mcore.convert import gradients_by_name, weights_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    stack = here(Stack(case))
    for name, value in weights_by_name(stack).items():
        value.data.copy_(weight(name, value.shape, case.seed))
    for parameter in stack.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    bounds = here(torch.tensor(BOUNDS, dtype=torch.int32))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    x, g = (here(value[HELD[dist.get_rank()]]) for value in rows())
    scheduler = get_backward_scheduler(stack)
    scheduler.recorder.enabled = True
    with scheduler.serialise() if case.twin else contextlib.nullcontext():
        out = stack(x.requires_grad_(), RotaryEmbedding(SIZE, 1.0)(16, packed_seq=True), packed)
        (out * g).sum().backward()
    for parameter in stack.parameters():
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
    weights = {name: value.clone() for name, value in gradients_by_name(stack).items()}
    launches = [item.name for item in scheduler.recorder.take() if item.kind == "launch"]
    return {"out": out.detach(), "dx": x.grad, "weights": weights, "launches": launches}


def run_all(cases: list[Case]) -> list[dict[str, Any]]:
    """One after the other."""
    return [run(case) for case in cases]


def check(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Every sequence by itself in float64 is what the packed ones must be."""
    pieces = [slice(*pair) for pair in zip(BOUNDS, BOUNDS[1:], strict=False) if pair[1] > pair[0]]
    want = reference_of(case, [tuple(value[piece] for value in rows()) for piece in pieces])
    for number, rank in enumerate(ranks):
        for kind in ("out", "dx"):
            error = relative_error(rank[kind], torch.cat(want[kind])[HELD[number]])
            assert error <= FP32, (case, kind, error)
    for name, whole in want["weights"].items():
        parts = [rank["weights"][name].double() for rank in ranks if name in rank["weights"]]
        error = relative_error(torch.stack(parts).sum(0), whole)
        assert error <= FP32, (case, name, error)


def test_packed_sequences_in_one_piece_and_in_chunks(run_ranks: Ranks) -> None:
    every = [replace(case, twin=twin) for case in CASES for twin in (False, True)]
    ranks = run_ranks(2, run_all, every, sizes=CASES[0].sizes)
    for index, case in enumerate(CASES):
        check(case, [rank[2 * index] for rank in ranks])
        for rank in ranks:
            one, twin = rank[2 * index : 2 * index + 2]
            assert torch.equal(one["out"], twin["out"]) and torch.equal(one["dx"], twin["dx"])
            assert all(torch.equal(grad, twin["weights"][name]) for name, grad in one["weights"].items())
            chunked = [name for name in one["launches"] if name.startswith("sp2hp AllToAll of chunk")]
            assert len(chunked) == (case.chunks * case.layers if case.chunks > 1 else 0)


def unfit() -> tuple[int, str]:
    """How many sp2hp a call in another format has, and what is said of it."""
    from types import SimpleNamespace

    from fluid_npu.mcore.attention_chunks import why_whole

    attention = Stack(Case(chunks=2, key_heads=4)).layers[0].self_attention
    given = {"packed_seq_params": SimpleNamespace(qkv_format="sbhd"), "rotary_pos_emb": None}
    return len(attention.head_chunks.chunks), why_whole(attention, torch.zeros(1), (), given)


@pytest.mark.host
def test_another_format_is_not_cut_and_said(run_ranks: Ranks) -> None:
    assert run_ranks(2, unfit, sizes=Case().sizes)[0] == (2, "packed sequences are in the format sbhd, not thd")
