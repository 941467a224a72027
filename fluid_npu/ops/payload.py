"""Tokens and their probabilities as one payload, so that dispatch is one AllToAll and not two.

A payload row is ``[H token columns | tail]``: the tail holds the row's probability, bit for bit, repeated up to 16
bytes so that rows stay aligned for matrix kernels. T tokens, N rows before dispatch, R rows after it, H hidden,
W payload width in elements of the token dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.ops.permute import PermuteLayout

_TAIL_BYTES = 16


def payload_width(hidden: int, dtype: torch.dtype) -> int:
    """W for tokens of ``hidden`` columns."""
    return hidden + _TAIL_BYTES // dtype.itemsize


def probs_dtype_on_wire(tokens: torch.dtype, probs: torch.dtype) -> torch.dtype:
    """The dtype in which probabilities travel: their own, or the tokens' where that is wider."""
    return probs if probs.itemsize >= tokens.itemsize else tokens


def pack(x_TH: Tensor, probs_TE: Tensor, layout: PermuteLayout) -> Tensor:
    """``[N, W]``: the row of each (token, expert) pair with its probability. Differentiable in both.

    Raises ValueError when the probabilities are wider than the tail (no dtype of torch is).
    """
    wire = probs_dtype_on_wire(x_TH.dtype, probs_TE.dtype)
    return _Pack.apply(x_TH, probs_TE.to(wire), layout)


def unpack(payload_RW: Tensor, hidden: int, probs_dtype: torch.dtype, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens ``[R, H]`` (rows of a wider buffer, stride W) and probabilities ``[R]``.

    Args:
        payload_RW: what ``pack`` made, after the exchange.
        hidden: H.
        probs_dtype: dtype on the wire (``probs_dtype_on_wire``).
        rows: ``[R]`` int64, which payload row comes at each place; None keeps the order.
    """
    return _Unpack.apply(payload_RW, hidden, probs_dtype, rows)


def gather_rows(x_RH: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """``x_RH[rows]`` for a permutation of the rows; the gradient is gathered by its inverse."""
    return _GatherRows.apply(x_RH, rows, inverse)


def replicate_payload(payload_RW: Tensor, times: int, hidden: int, probs_dtype: torch.dtype) -> Tensor:
    """``[times * R, W]``: the payload repeated; the gradient is the sum over copies of tokens and probabilities."""
    return _Replicate.apply(payload_RW, times, hidden, probs_dtype)


def _write_tail(payload: Tensor, hidden: int, p: Tensor) -> None:
    words = p.unsqueeze(-1).view(payload.dtype)
    tail = payload[:, hidden:]
    tail.unflatten(1, (-1, words.shape[1])).copy_(words.unsqueeze(1))


def _read_tail(payload: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    words = dtype.itemsize // payload.element_size()
    return payload[:, hidden : hidden + words].contiguous().view(dtype).view(-1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, probs_TE: Tensor, layout: PermuteLayout) -> Tensor:
        ctx.layout, ctx.hidden, ctx.probs = layout, x_TH.shape[1], (probs_TE.shape, probs_TE.dtype)
        payload = x_TH.new_empty(layout.num_rows, payload_width(x_TH.shape[1], x_TH.dtype))
        torch.index_select(x_TH, 0, layout.token_of_row, out=payload[:, : x_TH.shape[1]])
        _write_tail(payload, x_TH.shape[1], torch.take(probs_TE, layout.pair_index))
        return payload

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype = ctx.probs
        dx_TH = kernels_of(grad_NW).unpermute(grad_NW[:, : ctx.hidden].contiguous(), ctx.layout)
        dp_N = _read_tail(grad_NW, ctx.hidden, dtype)
        # Every (token, expert) has at most one row: a plain write, no sum.
        dprobs = dp_N.new_zeros(shape[0] * shape[1]).scatter_(0, ctx.layout.pair_index, dp_N)
        return dx_TH, dprobs.view(shape), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, payload: Tensor, hidden: int, probs_dtype: torch.dtype, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.width, ctx.hidden, ctx.rows = payload.shape[1], hidden, rows
        ordered = payload.clone() if rows is None else payload.index_select(0, rows)
        return ordered[:, :hidden], _read_tail(ordered, hidden, probs_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx_RH: Tensor, dp_R: Tensor) -> tuple[Tensor, None, None, None]:
        ordered = dx_RH.new_empty(dx_RH.shape[0], ctx.width)
        ordered[:, : ctx.hidden] = dx_RH
        _write_tail(ordered, ctx.hidden, dp_R)
        if ctx.rows is None:
            return ordered, None, None, None
        return torch.empty_like(ordered).index_copy_(0, ctx.rows, ordered), None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x_RH.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, payload: Tensor, times: int, hidden: int, probs_dtype: torch.dtype) -> Tensor:
        ctx.times, ctx.hidden, ctx.probs_dtype = times, hidden, probs_dtype
        return payload.repeat(times, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # The tail is bits, not numbers of the payload's dtype: it is summed as probabilities.
        copies = grad.view(ctx.times, -1, grad.shape[1])
        total = copies.sum(0)
        p = _read_tail(grad, ctx.hidden, ctx.probs_dtype).view(ctx.times, -1).sum(0)
        _write_tail(total, ctx.hidden, p)
        return total, None, None, None
