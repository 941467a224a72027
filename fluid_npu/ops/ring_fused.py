"""The blocks of a ring attention through the device's fused operator.

In the load-balanced split every step of a causal ring is one block: of a rank's own keys the causal one, of an earlier
rank's the first half, all of it seen, and of a later rank's all keys, seen by the second half of the queries. So no
mask is needed and each step costs as much as the others. Shapes as ``ring_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.device import Choice, kernels_of
from fluid_npu.device.kernels.attention_blocks import AttentionBlock, merge_block_
from fluid_npu.ops.ring_call import RingCall


def ring_block(q_TBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: RingCall) -> Choice[AttentionBlock | None]:
    """The fused operator that can compute the blocks of this call on its device, and why; None: plain products."""
    blocks = kernels_of(q_TBND).attention_blocks
    if blocks is None:
        return Choice(None, "the device has no fused attention that gives its log-sum-exp")
    if call.left is not None or call.right not in (None, 0):
        return Choice(None, "the layer has a sliding window, of which a ring's blocks show a part")
    if q_TBND.shape[0] < 4:
        return Choice(None, f"chunks of {q_TBND.shape[0] // 2} rows: a fused block wants two at least")
    return blocks.choose(q_TBND, k_TBMD, v_TBMV, call.scale)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Which rows of this rank see which of the keys that have arrived."""

    rows: slice
    keys: slice
    causal: bool


def step_of(call: RingCall, number: int, rows: int) -> Step:
    """Of step ``number``, whose keys are those of rank ``call.rank - number``, with T ``rows`` on each rank."""
    everything, half = slice(None), rows // 2
    if call.right is None or number == 0:
        return Step(rows=everything, keys=everything, causal=call.right is not None)
    if number <= call.rank:
        return Step(rows=everything, keys=slice(0, half), causal=False)
    return Step(rows=slice(half, None), keys=everything, causal=False)


class FusedSums:
    """Output and log-sum-exp of this rank's queries over the keys that came so far."""

    def __init__(self, q_TBND: Tensor, call: RingCall, block: AttentionBlock) -> None:
        self._q, self._call, self._block = q_TBND, call, block
        self._out_TBNV = self._lse_BNT = q_TBND
        self.kept: list[tuple[Tensor, ...]] = []

    def add(self, number: int, k_TBMD: Tensor, v_TBMV: Tensor) -> None:
        step = step_of(self._call, number, self._q.shape[0])
        part_SBNV, lse_BNS, kept = self._block.forward(
            self._q[step.rows], k_TBMD[step.keys], v_TBMV[step.keys], self._call.scale, step.causal
        )
        self.kept.append(kept)
        if number == 0:
            self._out_TBNV, self._lse_BNT = _wide(part_SBNV), lse_BNS.clone()
        else:
            merge_block_(self._out_TBNV[step.rows], self._lse_BNT[..., step.rows], part_SBNV, lse_BNS)

    def result(self) -> tuple[Tensor, Tensor]:
        """([T, B, N * V] in the dtype of q, lse [B, N, T])."""
        return self._out_TBNV.flatten(2).to(self._q.dtype).contiguous(), self._lse_BNT


class FusedGradients:
    """Gradients of this rank's queries, and of the keys and values that arrive."""

    def __init__(
        self,
        q_TBND: Tensor,
        out_TBNV: Tensor,
        dy_TBNV: Tensor,
        lse_BNT: Tensor,
        kept: list[tuple[Tensor, ...]],
        call: RingCall,
        block: AttentionBlock,
    ) -> None:
        self._q, self._out, self._dy, self._lse_TBN = q_TBND, out_TBNV, dy_TBNV, lse_BNT.permute(2, 0, 1)
        self._kept, self._call, self._block = kept, call, block
        self._dq_TBND = torch.zeros(q_TBND.shape, dtype=_dtype(q_TBND), device=q_TBND.device)

    def add(self, number: int, k_TBMD: Tensor, v_TBMV: Tensor) -> Tensor:
        """``[T, B, M * (D + V)]``: gradients of these keys, then of these values, at least in fp32."""
        step = step_of(self._call, number, self._q.shape[0])
        scale, kept = self._call.scale, self._kept[number]
        dy, q, out, lse = (x[step.rows] for x in (self._dy, self._q, self._out, self._lse_TBN))
        k, v = k_TBMD[step.keys], v_TBMV[step.keys]
        dq, dk, dv = self._block.backward(dy, q, k, v, out, lse.permute(1, 2, 0), kept, scale, step.causal)
        self._dq_TBND[step.rows] += dq
        width = k_TBMD.shape[2] * (k_TBMD.shape[3] + v_TBMV.shape[3])
        both = self._dq_TBND.new_zeros(*k_TBMD.shape[:2], width)
        both[step.keys] = torch.cat([dk.flatten(2), dv.flatten(2)], -1).to(both.dtype)
        return both

    def dq(self) -> Tensor:
        return self._dq_TBND.to(self._q.dtype)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _wide(x: Tensor) -> Tensor:
    """A copy that may be written."""
    return x.to(_dtype(x), copy=True)
