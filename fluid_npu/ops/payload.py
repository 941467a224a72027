"""What travels in a dispatch and a combine: tokens and probabilities as one payload, rows in and out of order.

A payload row is ``[H token columns | tail]``, the tail the row's probability (``device.kernels.payload_tail``); so
dispatch is one AllToAll and not two. The classes load and unload an exchange (``comm.cargo``); each method is the other
direction's gradient. T tokens, N rows before dispatch, R rows after it, H hidden, W payload width in elements of the
token dtype, Q expert-tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.payload_tail import payload_width, read_tail, write_tail
from fluid_npu.ops.permute import PermuteLayout

__all__ = ["Merge", "Pack", "Reorder", "Replicate", "SumParts", "Unpack", "payload_width", "wire_dtype"]


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
        return kernels_of(x_TH).pack_tokens(x_TH, probs_TE, self.layout)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return kernels_of(rows).sum_payload(rows, self.hidden, self.wire, self.layout)


@dataclass(frozen=True)
class Unpack:
    """Unloads payload rows as ``[R, H]`` tokens (possibly rows of a wider buffer) and ``[R]`` probabilities.

    ``rows`` says which payload row comes at each place; None keeps the order.
    """

    hidden: int
    wire: torch.dtype
    rows: Tensor | None

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return kernels_of(rows).unpack_rows(rows, self.hidden, self.wire, self.rows)

    def load_grad(self, *grads: Tensor) -> Tensor:
        dx_RH, dp_R = grads
        return kernels_of(dx_RH).pack_rows(dx_RH, dp_R, self.rows)


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
        write_tail(total, self.hidden, read_tail(rows, self.hidden, self.wire).view(self.times, -1).sum(0))
        return (total,)


@dataclass(frozen=True)
class SumParts:
    """Unloads ``times`` blocks of rows as their sum, in rank order."""

    times: int

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.view(self.times, -1, rows.shape[1]).sum(0),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return grads[0].repeat(self.times, 1)
