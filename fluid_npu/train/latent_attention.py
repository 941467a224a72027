"""Core attention for multi-latent attention (DeepSeek) without Transformer Engine.

Megatron's DotProductAttention knows one head size; here queries and keys have another than values. Everything
else, the masking and the softmax, is Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from fluid_npu.mcore.attention import FusedCore
from fluid_npu.mcore.context import ContextParallelCore


class LatentDotProductAttention(DotProductAttention):
    """DotProductAttention whose heads are ``k_channels`` wide for queries and keys, ``v_channels`` for values.

    Megatron first builds one without these sizes and then replaces it.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if k_channels is not None and v_channels is not None:
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Queries and keys ``[S, B, heads, k]``, values ``[S, B, heads, v]`` -> ``[S, B, heads * v]``."""
        # Slices of the joint projection are not contiguous; Megatron takes views.
        context: torch.Tensor = super().forward(query, key.contiguous(), value.contiguous(), *args, **kwargs)
        return context


class FluidLatentDotProductAttention(ContextParallelCore, FusedCore, LatentDotProductAttention):
    """The same, computed by the device's fused attention where it has one, and with context parallelism.

    See ``FusedCore`` and ``ContextParallelCore``.
    """
