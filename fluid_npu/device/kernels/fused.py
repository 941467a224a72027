"""Fused operators that only some devices have: attention and rotary embedding, without autograd unless they say so.

A device that has one says for each call whether it takes it, and why not; a caller then computes in plain torch.
Shapes: S queries, T keys, B batch, N query heads, M key heads, D head size of queries and keys, V of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fluid_npu.device.choice import Choice


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What an attention computes, besides its tensors."""

    heads: int
    """N."""
    scale: float
    """The scores are multiplied by it before the softmax."""
    causal: bool = False
    """Key t is hidden from query s where t > s; S equals T."""
    mask: Tensor | None = None
    """Bool, True where a key is hidden: [B, 1, S, T], [1, 1, S, T] or [S, T]. None with ``causal``."""
    window: tuple[int, int] | None = None
    """A query sees the keys from so many behind it to so many ahead; S equals T, without ``causal`` and mask."""
    dropout: float = 0.0
    """Share of the probabilities that is dropped, by the device's current random state, and again in backward."""


class AttentionKernels(ABC):
    """softmax(scale * q k^T, hidden keys left out) v for each head; query heads share key heads in turn."""

    @abstractmethod
    def accepts(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Choice[bool]:
        """Whether the operator's contract allows this call, and the rule that decides."""

    @abstractmethod
    def forward(
        self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall
    ) -> tuple[Tensor, tuple[Tensor | int, ...]]:
        """([S, B, N * V] in the dtype of q, what ``backward`` needs besides: tensors, then numbers)."""

    @abstractmethod
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
        """Gradients of q, k and v, in their shapes and dtypes; O is N * V."""


class DifferentiableAttention(ABC):
    """The same by operators that have gradients of their own."""

    @abstractmethod
    def accepts(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Choice[bool]:
        """As ``AttentionKernels.accepts``."""

    @abstractmethod
    def compute(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Tensor:
        """[S, B, N * V] in the dtype of q, differentiable."""


class RotaryKernels(ABC):
    """x * cos + rotate(x) * sin; rotate takes halves (a, b), or neighbours if ``interleaved``, to (-b, a)."""

    @abstractmethod
    def accepts(self, x_SBND: Tensor, cos: Tensor, interleaved: bool) -> Choice[bool]:
        """Whether the operator's contract allows this call, and the rule that decides."""

    @abstractmethod
    def forward(self, x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """The shape and dtype of x; cos and sin have its dtype and broadcast to it."""

    @abstractmethod
    def backward(self, dy_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Gradient of x; cos and sin get none."""
