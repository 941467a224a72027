"""Which experts each token went to, recorded per MoE layer, so that a routing tie is not taken for an error.

Two implementations whose hidden states differ in the last bit may order two nearly equal router logits differently;
the token then goes to another expert and everything behind it differs. That is a tie, not a mistake. T tokens, E
experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluid_npu.train.model import moe_layers


@dataclass(frozen=True)
class Routing:
    """Of one layer and step: who goes where, and the distance between the K-th and the next logit."""

    map_TE: torch.Tensor
    margin_T: torch.Tensor


class RoutingRecord:
    """Hooks on a model's routers; ``take()`` gives what they decided since the last call, in order."""

    def __init__(self, model: Any) -> None:
        self._found: list[Routing] = []
        for layer in moe_layers(model):
            layer.router.register_forward_hook(self._keep)  # type: ignore[union-attr]

    def _keep(self, router: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        with torch.no_grad():
            logits_TE = router.gating(inputs[0]).reshape(-1, output[1].shape[-1]).float()
            top = torch.topk(logits_TE, min(router.topk + 1, logits_TE.shape[1]), dim=1).values
        margin_T = top[:, -2] - top[:, -1] if top.shape[1] > router.topk else torch.full_like(top[:, 0], torch.inf)
        self._found.append(Routing(output[1].clone(), margin_T))

    def take(self) -> list[Routing]:
        """Empties the record."""
        found, self._found = self._found, []
        return found


def compare_routing(got: Sequence[Routing], want: Sequence[Routing]) -> tuple[int, float]:
    """(tokens routed otherwise, the largest of their logit margins in ``want``; 0.0 if there are none)."""
    tokens, margin = 0, 0.0
    for ours, theirs in zip(got, want, strict=True):
        differs_T = (ours.map_TE != theirs.map_TE).any(dim=1)
        if bool(differs_T.any()):
            tokens += int(differs_T.sum())
            margin = max(margin, float(theirs.margin_T[differs_T].max()))
    return tokens, margin
