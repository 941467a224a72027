"""What a ring attention is asked to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fluid_npu.device.kernels.attention_blocks import AttentionBlock

#: Starts sending rows to the next rank (True in backward); what it returns gives those of the rank before.
PassOn = Callable[[Tensor, bool], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class RingCall:
    """What a ring attention computes, besides its tensors."""

    scale: float
    """The scores are multiplied by it before the softmax."""
    ranks: int
    """P."""
    rank: int
    """This rank's place in the sequence."""
    pass_on: PassOn
    left: int | None = None
    """Keys further back than this are hidden; None: none."""
    right: int | None = None
    """Keys further ahead than this are hidden: 0 is causal; None: none."""
    block: AttentionBlock | None = None
    """The fused operator that computes blocks (``ring_fused.ring_block``); None: plain products."""
    beside: Callable[[], None] = lambda: None
    """Runs once in backward, while the first rows are on their way."""
