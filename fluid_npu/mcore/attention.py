"""Megatron's DotProductAttention that uses the device's fused attention, where there is one and it takes the call.

Sliding windows and dropout are computed by it too where it has them. On a CPU it is Megatron's forward, unchanged,
unless ``FLUID_ATTENTION=torch`` asks for torch's. What the fused operator does not compute takes Megatron's forward;
the reason is printed once. With context parallelism it gets whole sequences (``mcore.context``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.mcore.context import ContextParallelCore, RankDropout
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
                with self._random_numbers(query) if call.dropout else nullcontext():
                    return fused_attention(query, key, value, call)
        plain: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return plain

    def _call(self, heads: int, queries: int, mask: Tensor | None) -> AttentionCall:
        """What Megatron's masked softmax computes: a window counts alone, then a given mask, then the type."""
        softmax, dropout = self.scale_mask_softmax, self.attention_dropout  # type: ignore[attr-defined]
        window = getattr(softmax, "window_size", None)
        mask = mask if window is None else None
        causal = mask is window is None and softmax.attn_mask_type == AttnMaskType.causal and queries > 1
        # With query-key layer scaling the scores are divided by the layer's number and multiplied by it again in fp32.
        scale = self.softmax_scale * (1.0 if softmax.scale is None else softmax.scale)  # type: ignore[attr-defined]
        dropped = float(dropout.p) if dropout.training else 0.0
        window = None if window is None else (int(window[0]), int(window[1]))
        return AttentionCall(heads=heads, scale=scale, causal=causal, mask=mask, window=window, dropout=dropped)

    def _chosen(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, args: Any, kwargs: Any
    ) -> Choice[bool]:
        # Beyond the mask's type, which Megatron's forward ignores: attention_bias and packed_seq_params.
        extra = [*args[1:], *(given for name, given in kwargs.items() if name != "attn_mask_type")]
        plain = (
            (any(given is not None for given in extra), "an attention bias or packed sequences are given"),
            (call.window is not None and min(call.window) < 0, f"a sliding window of {call.window}: of Megatron's own"),
            (getattr(self, "softmax_offset", None) is not None, "the layer's softmax has an offset"),
        )
        for holds, reason in plain:
            if holds:
                return Choice(False, reason)
        return fuses_attention(query, key, value, call)

    @contextmanager
    def _random_numbers(self, like: Tensor) -> Iterator[None]:
        """In the body the device draws what Megatron's forward would take for this rank's dropout."""
        dropout, config = self.attention_dropout, self.config  # type: ignore[attr-defined]
        with ExitStack() as stack:
            if not config.sequence_parallel:
                stack.enter_context(tensor_parallel.get_cuda_rng_tracker().fork())
            if isinstance(dropout, RankDropout):
                stack.enter_context(dropout.own_numbers(like))
            yield


class FluidDotProductAttention(ContextParallelCore, FusedCore, DotProductAttention):
    """DotProductAttention of our layer specs; see ``FusedCore`` and ``ContextParallelCore``."""
