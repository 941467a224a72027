"""Attention and rotary embedding of an Ascend NPU through torch_npu, inside their contracts.

Rules that shape this file (op-plugin documents of ``npu_fusion_attention`` and ``npu_rotary_mul``):

* attention: fp16, bf16 or fp32, one dtype; at most 256 query heads, a multiple of the key heads; head sizes to 768,
  the value's no larger; in a mask 1 means hidden, the opposite of torch's attention; ``sparse_mode`` 2 (causal) and 4
  (a band of ``pre_tockens`` behind and ``next_tockens`` ahead) want a compressed mask of 2048 x 2048 whatever the
  lengths; without a mask the sparse mode is ignored. Dropout is drawn from the NPU's generator; the operator returns
  seed, offset and size of what it drew, by which the gradient draws it again.
* largest score and sum of a row come as fp32 ``[B, N, S, 8]``, eight times the same; the gradient divides exp(score -
  largest) by the sum, so that (log-sum-exp, 1) mean what they do; a ring passes those of all blocks.
* rotary: even head size below 896; sizes along which cos is broadcast below 1000, together below 1000 when
  interleaved.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.attention_blocks import AttentionBlock, AttentionBlocks
from fluid_npu.device.kernels.fused import AttentionCall, AttentionKernels, RotaryKernels

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS, _MAX_HEAD_SIZE, _MAX_LENGTH, _MAX_BATCH = 256, 768, 2**20, 2**21
_COMPRESSED = 2048
_SAME = 8  # columns of a row's largest score and sum
_ALL_GIVEN, _LEFT_UP_CAUSAL, _BAND = 1, 2, 4  # sparse_mode
_ROTARY_SIZE, _ROTARY_BROADCAST = 896, 1000


class NpuAttention(AttentionKernels):
    """``npu_fusion_attention`` in Megatron's own layout: SBH, so that nothing is transposed."""

    def __init__(self, torch_npu: Any) -> None:
        self._npu = torch_npu
        self._causal_masks: dict[torch.device, Tensor] = {}

    def accepts(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Choice[bool]:
        broken = attention_rule_broken(q_SBND, k_TBMD, v_TBMV, call)
        return Choice(broken is None, broken or "npu_fusion_attention takes it")

    def forward(
        self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall
    ) -> tuple[Tensor, tuple[Tensor | int, ...]]:
        q, k, v = (x.flatten(2).contiguous() for x in (q_SBND, k_TBMD, v_TBMV))
        out, largest, total, _, *drawn = self._npu.npu_fusion_attention(
            q, k, v, call.heads, "SBH", scale=call.scale, **self._options(call, q.device)
        )
        return out, (largest, total, *(drawn if call.dropout else ()))

    def backward(
        self,
        dy_SBO: Tensor,
        q_SBND: Tensor,
        k_TBMD: Tensor,
        v_TBMV: Tensor,
        out_SBO: Tensor,
        kept: tuple[Tensor | int, ...],
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.flatten(2).contiguous() for x in (q_SBND, k_TBMD, v_TBMV))
        largest, total, *drawn = kept
        dq, dk, dv, *_ = self._npu.npu_fusion_attention_grad(
            *(q, k, v, dy_SBO.contiguous(), call.heads, "SBH"),
            softmax_max=largest,
            softmax_sum=total,
            attention_in=out_SBO,
            scale_value=call.scale,
            **self._options(call, q.device),
            **dict(zip(("seed", "offset", "numels"), drawn, strict=False)),
        )
        return dq.view(q_SBND.shape), dk.view(k_TBMD.shape), dv.view(v_TBMV.shape)

    def _options(self, call: AttentionCall, device: torch.device) -> dict[str, Any]:
        dropout = {"keep_prob": 1.0 - call.dropout} if call.dropout else {}
        return {**self._mask_options(call, device), **dropout}

    def _mask_options(self, call: AttentionCall, device: torch.device) -> dict[str, Any]:
        if call.window is not None:
            left, right = call.window
            band = {"sparse_mode": _BAND, "pre_tockens": left, "next_tockens": right}
            return {"atten_mask": self._compressed_mask(device), **band}
        if call.causal:
            return {"atten_mask": self._compressed_mask(device), "sparse_mode": _LEFT_UP_CAUSAL}
        return {} if call.mask is None else {"atten_mask": call.mask, "sparse_mode": _ALL_GIVEN}

    def _compressed_mask(self, device: torch.device) -> Tensor:
        """4 MiB a device, made once."""
        if device not in self._causal_masks:
            hidden = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device)
            self._causal_masks[device] = hidden.triu_(1)
        return self._causal_masks[device]


class NpuBlock(AttentionBlock):
    """``npu_fusion_attention`` and its gradient, as ``NpuAttention`` calls them."""

    def __init__(self, attention: NpuAttention) -> None:
        self._attention = attention

    def __str__(self) -> str:
        return "npu_fusion_attention"

    def forward(
        self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        call = AttentionCall(heads=q_SBND.shape[2], scale=scale, causal=causal)
        out, kept = self._attention.forward(q_SBND, k_TBMD, v_TBMV, call)
        largest, total = (x for x in kept if isinstance(x, Tensor))
        return out.view(*q_SBND.shape[:3], -1), largest[..., 0] + total[..., 0].log(), ()

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
        call = AttentionCall(heads=q_SBND.shape[2], scale=scale, causal=causal)
        largest = lse_BNS[..., None].expand(*lse_BNS.shape, _SAME).contiguous()
        rows = (largest, torch.ones_like(largest))
        out_SBO = out_SBNV.flatten(2).contiguous()
        return self._attention.backward(dy_SBNV.flatten(2), q_SBND, k_TBMD, v_TBMV, out_SBO, rows, call)


class NpuBlocks(AttentionBlocks):
    """The one form, where the operator's contract allows it."""

    def __init__(self, attention: NpuAttention) -> None:
        self._block = NpuBlock(attention)

    def choose(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float) -> Choice[AttentionBlock | None]:
        broken = attention_rule_broken(q_SBND, k_TBMD, v_TBMV, AttentionCall(heads=q_SBND.shape[2], scale=scale))
        return Choice(self._block, "npu_fusion_attention takes it") if broken is None else Choice(None, broken)


class NpuRotary(RotaryKernels):
    """``npu_rotary_mul``."""

    def __init__(self, torch_npu: Any) -> None:
        self._npu = torch_npu

    def accepts(self, x_SBND: Tensor, cos: Tensor, interleaved: bool) -> Choice[bool]:
        broken = rotary_rule_broken(x_SBND, cos, interleaved)
        return Choice(broken is None, broken or "npu_rotary_mul takes it")

    def forward(self, x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return self._npu.npu_rotary_mul(x_SBND.contiguous(), cos, sin, rotary_mode=_mode(interleaved))

    def backward(self, dy_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        # Its input is read for the gradients of cos and sin alone, which nobody wants: dy stands in, x is not kept.
        dy = dy_SBND.contiguous()
        return self._npu.npu_rotary_mul_backward(dy, dy, cos, sin, rotary_mode=_mode(interleaved))[0]


def attention_rule_broken(q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> str | None:
    """The rule of npu_fusion_attention that the call breaks, or None."""
    (queries, batch, heads, size), (keys, _, shared, _) = q_SBND.shape, k_TBMD.shape
    rules = (
        (q_SBND.dtype in _DTYPES, "npu_fusion_attention wants fp16, bf16 or fp32"),
        (q_SBND.dtype == k_TBMD.dtype == v_TBMV.dtype, "npu_fusion_attention wants one dtype"),
        (min(q_SBND.numel(), k_TBMD.numel(), v_TBMV.numel()) > 0, "npu_fusion_attention wants tokens"),
        (
            heads <= _MAX_HEADS and heads % shared == 0,
            "npu_fusion_attention wants at most 256 heads, a multiple of k's",
        ),
        (v_TBMV.shape[-1] <= size <= _MAX_HEAD_SIZE, "npu_fusion_attention wants head sizes to 768, v's no larger"),
        (max(queries, keys) <= _MAX_LENGTH and batch <= _MAX_BATCH, "npu_fusion_attention wants S to 1M and B to 2M"),
        (not call.causal or (call.mask is None and queries == keys), "causal attention wants S = T and no other mask"),
        (
            call.window is None or (call.mask is None and not call.causal and queries == keys),
            "a window wants S = T and no other mask",
        ),
        (call.dropout < 1, "npu_fusion_attention wants a dropout below 1"),
        (_mask_fits(call.mask, batch, queries, keys), "npu_fusion_attention wants a bool mask [B or 1, 1, S, T]"),
    )
    return next((rule for kept, rule in rules if not kept), None)


def _mask_fits(mask: Tensor | None, batch: int, queries: int, keys: int) -> bool:
    if mask is None:
        return True
    whole = {(queries, keys), (1, 1, queries, keys), (batch, 1, queries, keys)}
    return mask.dtype in (torch.bool, torch.uint8) and tuple(mask.shape) in whole


def rotary_rule_broken(x_SBND: Tensor, cos: Tensor, interleaved: bool) -> str | None:
    """The rule of npu_rotary_mul that the call breaks, or None."""
    pairs = list(zip(x_SBND.shape[:-1], cos.shape[:-1], strict=False))
    shared = [size for size, of_cos in pairs if of_cos == 1]
    rules = (
        (x_SBND.dtype in _DTYPES and x_SBND.numel() > 0, "npu_rotary_mul wants rows in fp16, bf16 or fp32"),
        (x_SBND.dim() == cos.dim() == 4 and cos.shape[-1] == x_SBND.shape[-1], "npu_rotary_mul wants x and cos in 4-D"),
        (all(of_cos in (1, size) for size, of_cos in pairs), "npu_rotary_mul wants cos to broadcast to x"),
        (x_SBND.shape[-1] % 2 == 0 and x_SBND.shape[-1] < _ROTARY_SIZE, "npu_rotary_mul wants an even size below 896"),
        (all(size < _ROTARY_BROADCAST for size in shared), "npu_rotary_mul wants batch and heads below 1000"),
        (not interleaved or prod(shared) < _ROTARY_BROADCAST, "npu_rotary_mul interleaved wants B * N below 1000"),
    )
    return next((rule for kept, rule in rules if not kept), None)


def _mode(interleaved: bool) -> str:
    return "interleave" if interleaved else "half"
