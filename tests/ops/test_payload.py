"""Loading and unloading: each gradient is the transpose of its forward, and probabilities survive bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluid_npu.ops.payload import Merge, Pack, Reorder, Replicate, SumParts, Unpack, payload_width, wire_dtype
from fluid_npu.ops.permute import PermuteLayout
from tests.support.device import here, wide

T, E, K, H = 7, 5, 2, 6
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float64, torch.float64), (torch.float32, torch.float64)]


def layout() -> PermuteLayout:
    """Random top-2 routing of seven tokens."""
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(3))
    routing = torch.zeros(T, E).scatter_(1, scores.topk(K)[1], 1.0).bool()
    return PermuteLayout.from_routing_map(here(routing), K)


def dot(a: Any, b: Any) -> float:
    """Sum of products over tuples of tensors."""
    return sum(float((wide(x) * wide(y)).sum()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("tokens", "probs"), DTYPES)
def test_pack_and_unpack_keep_tokens_and_probabilities_bit_for_bit(tokens: torch.dtype, probs: torch.dtype) -> None:
    where = layout()
    x, p = here(torch.randn(T, H).to(tokens)), here(torch.rand(T, E).to(probs))
    wire = wire_dtype(tokens, probs)
    payload = Pack(where, H, wire).load(x, p.to(wire))
    assert payload.shape == (T * K, payload_width(H, tokens))
    assert payload.stride(0) * payload.element_size() % 4 == 0
    order = here(torch.randperm(T * K))
    for rows in (None, order):
        got_x, got_p = Unpack(H, wire, rows).unload(payload)
        index = rows if rows is not None else here(torch.arange(T * K))
        assert torch.equal(got_x, x[where.token_of_row][index])
        assert torch.equal(got_p, p.to(wire).flatten()[where.pair_index][index])


def test_wire_dtype_never_narrows_probabilities() -> None:
    assert wire_dtype(torch.bfloat16, torch.float32) is torch.float32
    assert wire_dtype(torch.float32, torch.bfloat16) is torch.float32


@pytest.mark.parametrize("probs", [torch.float64, torch.float32])
def test_gradients_are_transposes(probs: torch.dtype) -> None:
    """<load(a), b> = <a, unload_grad(b)>, with tails compared as probabilities."""
    where, order = layout(), here(torch.randperm(T * K))
    wire = wire_dtype(torch.float64, probs)
    pack, unpack = Pack(where, H, wire), Unpack(H, wire, order)
    x, p = here(torch.randn(T, H, dtype=torch.float64)), here(torch.rand(T, E).to(wire))
    dx, dp = here(torch.randn(T * K, H, dtype=torch.float64)), here(torch.randn(T * K).to(wire))
    forward = unpack.unload(pack.load(x, p))
    backward = pack.unload_grad(unpack.load_grad(dx, dp))
    assert dot(forward, (dx, dp)) == pytest.approx(dot((x, p), backward), rel=1e-9)


def test_reorder_merge_and_sum_are_transposes_too() -> None:
    where, rows = layout(), here(torch.randperm(T * K))
    y = here(torch.randn(T * K, H, dtype=torch.float64))
    reorder = Reorder(rows, torch.argsort(rows))
    dy = torch.randn_like(y)
    assert dot((reorder.load(y),), (dy,)) == pytest.approx(dot((y,), reorder.unload_grad(dy)))
    merge = Merge(where, torch.Size((T, 1, H)))
    dout = here(torch.randn(T, 1, H, dtype=torch.float64))
    assert dot(merge.unload(y), (dout,)) == pytest.approx(dot((y,), (merge.load_grad(dout),)))
    total = SumParts(2)
    half = here(torch.randn(T, H, dtype=torch.float64))
    assert dot(total.unload(y), (half,)) == pytest.approx(dot((y,), (total.load_grad(half),)))


def test_replicas_sum_probabilities_as_numbers_and_not_as_bits() -> None:
    where = layout()
    pack = Pack(where, H, torch.float32)
    unpack = Unpack(H, torch.float32, None)
    grads = [(here(torch.randn(T * K, H).bfloat16()), here(torch.randn(T * K))) for _ in range(3)]
    copies = torch.cat([unpack.load_grad(dx, dp) for dx, dp in grads])
    payload = pack.load(here(torch.randn(T, H).bfloat16()), here(torch.rand(T, E)))
    replicate = Replicate(3, H, torch.float32)
    assert torch.equal(replicate.load(payload), payload.repeat(3, 1))
    (total,) = replicate.unload_grad(copies)
    _, dp = unpack.unload(total)  # type: ignore[arg-type]
    torch.testing.assert_close(dp, grads[0][1] + grads[1][1] + grads[2][1])
