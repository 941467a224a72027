"""Where Megatron's router keeps what outlives a layer's call: the scale of auxiliary losses and their log.

The scale is a tensor that ``set_loss_scale`` writes into, the log a tensor of one entry a layer for each kind of loss
(0.13 to 0.16: in ``moe_utils``; 0.12: in ``parallel_state``). Later lines log through an object.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

_TRACKER = "get_moe_layer_wise_logging_tracker"
_find_tracker: Any = getattr(moe_utils, _TRACKER, None) or getattr(parallel_state, _TRACKER, None)

#: Whether this line's log is found.
HAS_TRACKER = _find_tracker is not None


def tensors_outside() -> tuple[Tensor | None, ...]:
    """The scale and every log that there is, in the order in which they were made."""
    scale: Any = getattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    logs = _find_tracker().values() if HAS_TRACKER else ()
    found = (scale, *(log.get("values") for log in logs))
    return tuple(value if isinstance(value, Tensor) else None for value in found)
