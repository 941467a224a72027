"""What travels in a dispatch and a combine: tokens and probabilities as one payload, rows in and out of order.

A payload row is ``[H token columns | tail]``: the tail holds the row's probability, bit for bit, repeated up to 16
bytes so that rows stay aligned for matrix kernels; so dispatch is one AllToAll and not two. The classes load and
unload an exchange (``comm.cargo``); each method is the other direction's gradient. T tokens, N rows before dispatch, R
rows after it, H hidden, W payload width in elements of the token dtype, Q expert-tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.ops.permute import PermuteLayout

_TAIL_BYTES = 16


def payload_width(hidden: int, dtype: torch.dtype) -> int:
    """W for tokens of ``hidden`` columns."""
    return hidden + _TAIL_BYTES // dtype.itemsize


def wire_dtype(tokens: torch.dtype, probs: torch.dtype) -> torch.dtype:
    """The dtype in which probabilities travel: their own, or the tokens' where that is wider."""
    return probs if probs.itemsize >= tokens.itemsize else tokens


@dataclass(frozen=True)
class Pack:
    """Loads ``[T, H]`` tokens and ``[T, E]`` probabilities of dtype ``wire`` as ``[N, W]`` payload rows."""

    layout: PermuteLayout
    hidden: int
    wire: torch.dtype

    def load(self, *tensors: Tensor) -> Tensor:
        x_TH, probs_TE = tensors
        payload = x_TH.new_empty(self.layout.num_rows, payload_width(self.hidden, x_TH.dtype))
        torch.index_select(x_TH, 0, self.layout.token_of_row, out=payload[:, : self.hidden])
        _write_tail(payload, self.hidden, torch.take(probs_TE, self.layout.pair_index))
        return payload

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH = kernels_of(rows).unpermute(rows[:, : self.hidden].contiguous(), self.layout)
        dp_N = _read_tail(rows, self.hidden, self.wire)
        # Every (token, expert) has at most one row: a plain write, no sum.
        dprobs = dp_N.new_zeros(self.layout.num_tokens * self.layout.num_experts)
        return dx_TH, dprobs.scatter_(0, self.layout.pair_index, dp_N).view(self.layout.num_tokens, -1)


@dataclass(frozen=True)
class Unpack:
    """Unloads payload rows as ``[R, H]`` tokens (rows of a wider buffer, stride W) and ``[R]`` probabilities.

    ``rows`` says which payload row comes at each place; None keeps the order.
    """

    hidden: int
    wire: torch.dtype
    rows: Tensor | None

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        ordered = rows if self.rows is None else rows.index_select(0, self.rows)
        return ordered[:, : self.hidden], _read_tail(ordered, self.hidden, self.wire)

    def load_grad(self, *grads: Tensor) -> Tensor:
        dx_RH, dp_R = grads
        payload = dx_RH.new_empty(dx_RH.shape[0], payload_width(self.hidden, dx_RH.dtype))
        if self.rows is None:
            payload[:, : self.hidden] = dx_RH
        else:
            payload[:, : self.hidden].index_copy_(0, self.rows, dx_RH)
            dp_R = torch.empty_like(dp_R).index_copy_(0, self.rows, dp_R)
        _write_tail(payload, self.hidden, dp_R)
        return payload


@dataclass(frozen=True)
class Reorder:
    """Loads rows in another order; ``inverse`` undoes ``rows``."""

    rows: Tensor
    inverse: Tensor

    def load(self, *tensors: Tensor) -> Tensor:
        return tensors[0].index_select(0, self.rows)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return (rows.index_select(0, self.inverse),)


@dataclass(frozen=True)
class Merge:
    """Unloads ``[N, H]`` rows as the sum of each token's rows, in ``shape``."""

    layout: PermuteLayout
    shape: torch.Size

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (kernels_of(rows).unpermute(rows, self.layout).view(self.shape),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return kernels_of(grads[0]).permute(grads[0].reshape(-1, self.shape[-1]), self.layout)


@dataclass(frozen=True)
class Replicate:
    """Loads a payload ``times`` times over; the gradient is the sum over copies of tokens and of probabilities."""

    times: int
    hidden: int
    wire: torch.dtype

    def load(self, *tensors: Tensor) -> Tensor:
        return tensors[0].repeat(self.times, 1)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        total = rows.view(self.times, -1, rows.shape[1]).sum(0)
        # The tail is bits, not numbers of the payload's dtype: it is summed as probabilities.
        _write_tail(total, self.hidden, _read_tail(rows, self.hidden, self.wire).view(self.times, -1).sum(0))
        return (total,)


@dataclass(frozen=True)
class SumParts:
    """Unloads ``times`` blocks of rows as their sum, in rank order."""

    times: int

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.view(self.times, -1, rows.shape[1]).sum(0),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return grads[0].repeat(self.times, 1)


def _write_tail(payload: Tensor, hidden: int, p: Tensor) -> None:
    tail = payload[:, hidden:]
    if p.dtype == payload.dtype:
        tail.copy_(p.unsqueeze(-1))
        return
    words = p.unsqueeze(-1).view(payload.dtype)
    tail.unflatten(1, (-1, words.shape[1])).copy_(words.unsqueeze(1))


def _read_tail(payload: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    if dtype == payload.dtype:
        return payload.select(1, hidden).contiguous()
    words = dtype.itemsize // payload.element_size()
    return payload[:, hidden : hidden + words].contiguous().view(dtype).view(-1)
