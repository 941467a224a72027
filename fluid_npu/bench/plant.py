"""A deliberate mistake, to show that the checks of ``parity`` and of the benches refuse it."""

from __future__ import annotations

from typing import Any

import torch


def plant_error(variant: Any, relative: float) -> None:
    """Scales the gradient of one expert weight of a ``rig.Variant`` by ``1 + relative`` from now on, on every rank."""
    original = variant.forward_backward

    def forward_backward(batch: Any) -> float:
        loss: float = original(batch)
        name = next(name for name in variant.gradients() if name.endswith("linear_fc1.weight"))
        with torch.no_grad():
            variant.gradients()[name].mul_(1.0 + relative)
        return loss

    variant.forward_backward = forward_backward
