"""Keeps known, harmless warnings of other packages away from the user; everything else still shows."""

from __future__ import annotations

import logging
import warnings

_HARMLESS = (
    r"Transformer Engine and Apex are not installed",  # the chosen Adam is announced instead
    r"Apex is not installed",
    r"full scope is deprecated",  # Megatron about its own default
    r"`torch.distributed.\w+` is deprecated",
)


def hush_known_warnings() -> None:
    """Filters them in this process; call before Megatron is imported."""
    for pattern in _HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)
    # Megatron knows its own MoELayer by name only and says so once per layer.
    layers = logging.getLogger("megatron.core.transformer.transformer_layer")
    layers.addFilter(lambda record: not record.getMessage().startswith("Unknown MLP type"))
