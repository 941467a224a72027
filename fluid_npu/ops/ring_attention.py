"""Attention whose keys and values travel around the ranks of a sequence, with an online softmax (ring attention).

Each rank keeps its queries and sees the keys and values of one rank after the other; while one block is computed the
next is on its way. The softmax is carried as output and log-sum-exp, in fp32 or wider. The backward sends keys and
values around again, and behind them their gradients, which arrive at home after P steps. Sums are taken in the order of
the ring, so results repeat; between ranks they differ from a whole softmax by rounding.

Each block is one call of the device's fused attention where ``ring_block`` finds one (``ring_fused``), otherwise plain
products (``ring_plain``). Every rank holds two chunks of the sequence, r and 2P - 1 - r (Megatron's load-balanced
split). Shapes: T rows of this rank, B batch, N query heads, M key heads, D head size of queries and keys, V of values,
P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluid_npu.ops.ring_call import PassOn, RingCall
from fluid_npu.ops.ring_fused import FusedGradients, FusedSums, ring_block
from fluid_npu.ops.ring_plain import PlainGradients, PlainSums

__all__ = ["PassOn", "RingCall", "ring_attention", "ring_block"]


def ring_attention(q_TBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: RingCall) -> Tensor:
    """``[T, B, N * V]`` in the dtype of q: softmax(scale * q k^T) v over the keys of all ranks, for these queries.

    Every rank calls it with the same shapes; 2P chunks make the sequence, so T is even unless P is 1. Every query must
    see its own position. Raises ValueError for shapes that do not fit.
    """
    if call.ranks > 1 and q_TBND.shape[0] % 2:
        raise ValueError(f"{q_TBND.shape[0]} rows: a rank holds two chunks of a sequence; an even number is needed")
    if q_TBND.shape[2] % k_TBMD.shape[2] or k_TBMD.shape[:3] != v_TBMV.shape[:3]:
        raise ValueError(
            f"q {tuple(q_TBND.shape)}, k {tuple(k_TBMD.shape)}, v {tuple(v_TBMV.shape)}: keys and values need the same "
            "heads, a divisor of the queries'"
        )
    out: Tensor = _RingAttention.apply(q_TBND, k_TBMD, v_TBMV, call)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: RingCall) -> Tensor:
        sums = _sums(q, k.shape[2], v.shape[3], call)
        travelling = torch.cat([k.flatten(2), v.flatten(2)], -1)
        for step in range(call.ranks):
            arriving = call.pass_on(travelling, False) if step < call.ranks - 1 else None
            sums.add(step, *_opened(travelling, k, v))
            travelling = arriving() if arriving is not None else travelling
        out, lse = sums.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.kept = call, sums.kept
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: RingCall = ctx.call
        out, dy = (x.view(*q.shape[:3], -1) for x in (out, dy))
        gradients = _gradients(q, out, dy, lse, k.shape[2], ctx.kept, call)
        travelling = torch.cat([k.flatten(2), v.flatten(2)], -1)
        behind: Callable[[], Tensor] | None = None
        for step in range(call.ranks):
            arriving = call.pass_on(travelling, True) if step < call.ranks - 1 else None
            if step == 0:
                call.beside()
            mine = gradients.add(step, *_opened(travelling, k, v))
            mine = mine if behind is None else behind() + mine
            behind = call.pass_on(mine, True) if call.ranks > 1 else lambda mine=mine: mine
            travelling = arriving() if arriving is not None else travelling
        assert behind is not None
        dk, dv = _opened(behind(), k, v)
        return gradients.dq(), dk.to(k.dtype), dv.to(v.dtype), None


def _sums(q: Tensor, key_heads: int, values: int, call: RingCall) -> PlainSums | FusedSums:
    return PlainSums(q, key_heads, values, call) if call.block is None else FusedSums(q, call, call.block)


def _gradients(
    q: Tensor, out: Tensor, dy: Tensor, lse: Tensor, key_heads: int, kept: Any, call: RingCall
) -> PlainGradients | FusedGradients:
    if call.block is None:
        return PlainGradients(q, out, dy, lse, key_heads, call)
    return FusedGradients(q, out, dy, lse, kept, call, call.block)


def _opened(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views ``[T, B, M, D]`` and ``[T, B, M, V]`` of rows that travel."""
    keys, values = kv.split([k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]], -1)
    return keys.unflatten(-1, k.shape[2:]), values.unflatten(-1, v.shape[2:])
