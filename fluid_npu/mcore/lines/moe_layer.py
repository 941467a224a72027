"""MoELayer as a sequence of steps, for lines whose ``forward`` is one piece (0.12).

Later lines call ``shared_experts_compute``, ``route``, ``preprocess``, ``dispatch``, ``routed_experts_compute``,
``combine`` and ``postprocess`` themselves; FluidMoELayer overrides those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor

#: Whether Megatron's own forward calls the steps.
HAS_STEPS = hasattr(MoELayer, "routed_experts_compute")
#: Whether the router's class is part of the spec; before, MoELayer always builds a TopKRouter.
ROUTER_IN_SPEC = any(field.name == "router" for field in dataclasses.fields(MoESubmodules))
#: The dispatchers of Megatron that work with grouped experts on this line, besides our own 'alltoall'.
MEGATRON_DISPATCHERS = ("allgather", *(["alltoall_seq"] if hasattr(moe_layer, "MoEAlltoAllSEQTokenDispatcher") else []))


class _SteppedMoELayer(MoELayer):
    """MoELayer whose forward calls the steps when ``steps`` is set, and is Megatron's own otherwise."""

    steps = False

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """``([S, B, H], None)``; recomputed as a whole under ``recompute_modules=['moe']``."""
        if not self.steps:
            return super().forward(hidden_states)
        if self.training and self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"sequence_parallel=False with tensor_model_parallel_size={self.config.tensor_model_parallel_size}: "
                "MoE layers train with sequence parallelism alone; set --sequence-parallel"
            )
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._in_steps, False, hidden_states), None
        return self._in_steps(hidden_states), None

    def _in_steps(self, hidden_states: Tensor) -> Tensor:
        shared_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states)
        prepared, probs = self.preprocess(hidden_states, probs, routing_map)
        output, _ = self.routed_experts_compute(*self.dispatch(prepared, probs))
        merged: Tensor = self.postprocess(self.combine(output), shared_output)
        return merged

    def route(self, hidden_states: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """Probabilities and routing map, both ``[T, E]``."""
        probs, routing_map = self.router(hidden_states)
        return probs, routing_map

    def shared_experts_compute(self, hidden_states: Tensor) -> Any:
        """The shared experts' output; None without them."""
        return self.shared_experts(hidden_states) if self.use_shared_expert else None


#: What FluidMoELayer derives from.
MoELayerInSteps: Any = MoELayer if HAS_STEPS else _SteppedMoELayer
