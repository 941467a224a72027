"""Makes the routers of a model follow a workload instead of their logits; probabilities still come from the logits.

So every implementation gets the same routing, and the router's weight its gradient. T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_npu.bench.workloads import Sizes, counts, period, routing_map, tokens_of
from fluid_npu.train.model import moe_layers


class ForcedRouting:
    """Routing of one workload for any number of models on this rank; ``step`` says which step it is.

    Args:
        name: the workload, 'W0' to 'W7'.
        sizes: of the model and the ranks.
        rank: of the expert-parallel group.
        seed: which tokens go where.
        layers: MoE layers of each model; every layer has tokens of its own, with the same counts.
        device: where the maps live.
    """

    def __init__(self, name: str, sizes: Sizes, rank: int, seed: int, layers: int, device: torch.device) -> None:
        self.name, self.step = name, 0
        self.period = period(name, sizes.ranks)
        tokens = tokens_of(name, rank, sizes)
        self.maps = [
            [
                torch.from_numpy(routing_map(counts(name, step, rank, sizes), tokens, (seed, step, rank, layer)))
                for layer in range(layers)
            ]
            for step in range(self.period)
        ]
        self.maps = [[map_TE.to(device) for map_TE in step] for step in self.maps]

    def force(self, model: torch.nn.Module) -> None:
        """From now on the model's routers follow this workload; a later call replaces an earlier one."""
        for number, layer in enumerate(moe_layers(model)):
            layer.router.routing = self._routing(number)  # type: ignore[union-attr]

    def _routing(self, layer: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def routing(logits: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            map_TE = self.maps[self.step % self.period][layer]
            logits_TE = logits.reshape(-1, logits.shape[-1])
            # where: one launch, and one in the backward; masked_fill of an inverted map is three and two.
            probs_TE = torch.softmax(torch.where(map_TE, logits_TE.float(), float("-inf")), dim=-1)
            return probs_TE.type_as(logits), map_TE

        return routing
