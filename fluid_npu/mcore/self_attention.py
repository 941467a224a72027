"""Megatron's SelfAttention whose core knows context parallelism, and whose exchanges are its model's scheduler's.

Without context parallelism it computes what SelfAttention computes, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from fluid_npu.mcore.attention import FluidDotProductAttention
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.context import ContextParallel, ContextParallelCore
from fluid_npu.mcore.linear import FluidRowParallelLinear
from fluid_npu.schedule.scheduler import BackwardScheduler


class _Connected:
    """Goes before an attention in a class's bases: connects a core with context parallelism to its surroundings."""

    backward_scheduler: BackwardScheduler | None = None
    checkpoint_core_attention: bool
    core_attention: Any
    linear_proj: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        binder: SchedulerBinder | None = None,
        **kwargs: Any,
    ) -> None:
        submodules = copy.copy(submodules)
        if submodules.core_attention is DotProductAttention:
            submodules.core_attention = FluidDotProductAttention
        overlaps = binder is not None and binder.overlap != "off"
        if overlaps and config.context_parallel_size > 1 and submodules.linear_proj is RowParallelLinear:
            submodules.linear_proj = FluidRowParallelLinear
        super().__init__(config, submodules, layer_number, *args, **kwargs)  # type: ignore[call-arg]
        core = self.core_attention
        if not isinstance(core, ContextParallelCore) or core.context is None:
            return
        # The core recomputes attention alone; around the core Megatron would repeat the exchanges too.
        core.recompute, self.checkpoint_core_attention = self.checkpoint_core_attention, False
        core.context.label = f"layer {layer_number}"
        if binder is not None:
            self.backward_scheduler = core.context.sink = binder.bind(self, layer_number, kind="attention")
            self._fill_exchanges(core.context, self.backward_scheduler, layer_number)

    def _fill_exchanges(self, context: ContextParallel, scheduler: BackwardScheduler, layer_number: int) -> None:
        """The output projection's dW runs beside the backward of the exchanges, which follow its dX."""
        proj = self.linear_proj
        if isinstance(proj, FluidRowParallelLinear):
            proj.exchange = "hp2sp" if context.algorithm == "ulysses" else "ring"
            proj.join(scheduler, f"layer {layer_number} self_attention.linear_proj")


class FluidSelfAttention(_Connected, SelfAttention):
    """Self-attention with context parallelism, by Ulysses or a ring, over Megatron's context-parallel group.

    Goes into a ModuleSpec where SelfAttention does, with its submodules; a DotProductAttention among them is replaced
    by ours. A subclass may override ``forward`` and call ``self.core_attention`` as Megatron's does.

    Args:
        config: Megatron's TransformerConfig; its ``cp_comm_type`` may be 'ulysses' or 'ring' (``mcore.context``).
        submodules: as SelfAttention's.
        layer_number: global number of the layer, from 1.
        binder: gives the layers of one model one scheduler; None: the exchanges have none of their own.
        args, kwargs: passed on to SelfAttention.

    Raises ValueError for a configuration that is not implemented, naming the option and the fix.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        binder: SchedulerBinder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, binder=binder, **kwargs)


class FluidMLASelfAttention(_Connected, MLASelfAttention):
    """The same for multi-latent attention. Arguments as ``FluidSelfAttention``."""


#: Megatron's attention modules and ours.
FLUID_ATTENTION = {SelfAttention: FluidSelfAttention, MLASelfAttention: FluidMLASelfAttention}
