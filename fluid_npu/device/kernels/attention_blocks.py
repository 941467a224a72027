"""Attention to one block of keys with its log-sum-exp, so that a caller may take the softmax over many blocks.

A query's output over all blocks is the sum of ``exp(lse_b - lse) * out_b`` with ``lse = log(sum exp(lse_b))``. Given
output and lse over all blocks, the gradient formulas of one block hold for its share, so a device's fused backward
computes it. Shapes: S queries, T keys of the block, B batch, N query heads, M key heads, D head size of queries and
keys, V of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice


class AttentionBlock(ABC):
    """One fused form; the same bits each time it is given the same."""

    @abstractmethod
    def forward(
        self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """([S, B, N, V] in the dtype of q, lse [B, N, S] in fp32, what ``backward`` needs of this call besides).

        With ``causal`` key t is hidden from query s where t > s, and S equals T.
        """

    @abstractmethod
    def backward(
        self,
        dy_SBNV: Tensor,
        q_SBND: Tensor,
        k_TBMD: Tensor,
        v_TBMV: Tensor,
        out_SBNV: Tensor,
        lse_BNS: Tensor,
        kept: tuple[Tensor, ...],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This block's share of dq, and its dk and dv, in their shapes; ``out`` and ``lse`` are those of all blocks."""


class AttentionBlocks(ABC):
    """What a device has of them."""

    @abstractmethod
    def choose(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float) -> Choice[AttentionBlock | None]:
        """The form for tensors like these, and why; None: there is none. Looks at no lengths beyond the first block."""


def merge_block_(out_SBNV: Tensor, lse_BNS: Tensor, part_SBNV: Tensor, part_lse_BNS: Tensor) -> None:
    """In place: output and lse (fp32) over one block more. Their lse must be finite."""
    share_BNS = torch.sigmoid(part_lse_BNS - lse_BNS)
    out_SBNV.lerp_(part_SBNV.to(out_SBNV.dtype), share_BNS.permute(2, 0, 1)[..., None])
    lse_BNS.copy_(torch.logaddexp(lse_BNS, part_lse_BNS))
