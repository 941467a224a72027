"""Megatron's DotProductAttention that uses the device's fused attention, where there is one and it takes the call.

On a CPU it is Megatron's forward, unchanged, unless ``FLUID_ATTENTION=torch`` asks for torch's. What the fused operator
does not compute takes Megatron's forward too; the reason is printed once. With context parallelism it gets whole
sequences (``mcore.context``).
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.mcore.context import ContextParallelCore
from fluid_npu.ops.attention import fused_attention, fuses_attention


class FusedCore:
    """Goes before a DotProductAttention in a class's bases: its ``forward`` tries the fused operator first."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``[S, B, heads * v]``. Arguments as DotProductAttention: query, key, value are ``[S, B, heads, size]``."""
        if kernels_of(query).attention is not None:
            call = self._call(query.shape[2], query.shape[0], attention_mask)
            chosen = self._chosen(query, key, value, call, args, kwargs)
            Choice("fused" if chosen.value else "Megatron's", chosen.reason).announce("attention")
            if chosen.value:
                return fused_attention(query, key, value, call)
        plain: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return plain

    def _call(self, heads: int, queries: int, mask: Tensor | None) -> AttentionCall:
        """What Megatron's masked softmax computes: a mask that is given counts alone; else it is causal by type."""
        softmax = self.scale_mask_softmax  # type: ignore[attr-defined]
        causal = mask is None and softmax.attn_mask_type == AttnMaskType.causal and queries > 1
        # With query-key layer scaling the scores are divided by the layer's number and multiplied by it again in fp32.
        scale = self.softmax_scale * (1.0 if softmax.scale is None else softmax.scale)  # type: ignore[attr-defined]
        return AttentionCall(heads=heads, scale=scale, causal=causal, mask=mask)

    def _chosen(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, args: Any, kwargs: Any
    ) -> Choice[bool]:
        dropout = self.attention_dropout  # type: ignore[attr-defined]
        # Beyond the mask's type, which Megatron's forward ignores: attention_bias and packed_seq_params.
        extra = [*args[1:], *(given for name, given in kwargs.items() if name != "attn_mask_type")]
        plain = (
            (any(given is not None for given in extra), "an attention bias or packed sequences are given"),
            (dropout.training and dropout.p > 0, "attention dropout draws from Megatron's random states"),
            (getattr(self.scale_mask_softmax, "window_size", None) is not None, "the layer has a sliding window"),  # type: ignore[attr-defined]
            (getattr(self, "softmax_offset", None) is not None, "the layer's softmax has an offset"),
        )
        for holds, reason in plain:
            if holds:
                return Choice(False, reason)
        return fuses_attention(query, key, value, call)


class FluidDotProductAttention(ContextParallelCore, FusedCore, DotProductAttention):
    """DotProductAttention of our layer specs; see ``FusedCore`` and ``ContextParallelCore``."""
