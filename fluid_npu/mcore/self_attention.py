"""Megatron's SelfAttention whose core knows context parallelism, and whose exchanges are its model's scheduler's.

Without context parallelism it computes what SelfAttention computes, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.mcore.attention import FluidDotProductAttention
from fluid_npu.mcore.attention_chunks import in_chunks, why_whole
from fluid_npu.mcore.binding import SchedulerBinder, chunk_offset
from fluid_npu.mcore.chunk_choice import AUTO
from fluid_npu.mcore.context import ContextParallel, ContextParallelCore
from fluid_npu.mcore.head_chunks import HeadChunks
from fluid_npu.mcore.linear import FluidColumnParallelLinear, FluidLinear, FluidRowParallelLinear
from fluid_npu.schedule.scheduler import BackwardScheduler


class _Connected:
    """Goes before an attention in a class's bases: connects a core with context parallelism to its surroundings."""

    backward_scheduler: BackwardScheduler | None = None
    checkpoint_core_attention: bool
    core_attention: Any
    config: TransformerConfig
    linear_proj: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        binder: SchedulerBinder | None = None,
        attention_chunks: int | str = 1,
        **kwargs: Any,
    ) -> None:
        submodules = copy.copy(submodules)
        if submodules.core_attention is DotProductAttention:
            submodules.core_attention = FluidDotProductAttention
        overlap = "off" if binder is None else binder.overlap
        cuts = attention_chunks != 1 and (attention_chunks != AUTO or overlap == "full")
        if config.context_parallel_size > 1 and (overlap != "off" or cuts):
            _take_linears(submodules, cuts)
        super().__init__(config, submodules, layer_number, *args, **kwargs)  # type: ignore[call-arg]
        core = self.core_attention
        self.head_chunks = _head_chunks(self, attention_chunks, overlap)
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
        place = (chunk_offset(self.config, layer_number), layer_number)
        for name in ("linear_qkv", "linear_proj"):
            linear = getattr(self, name, None)
            if isinstance(linear, FluidLinear):
                linear.join(scheduler, f"layer {layer_number} self_attention.{name}", place)
        if isinstance(self.linear_proj, FluidRowParallelLinear):
            # Two exchanges of about equal size: each gets a half.
            self.linear_proj.exchanges = ("hp2sp", "sp2hp") if context.algorithm == "ulysses" else ("ring",)


class FluidSelfAttention(_Connected, SelfAttention):
    """Self-attention with context parallelism, by Ulysses or a ring, over Megatron's context-parallel group.

    Goes into a ModuleSpec where SelfAttention does, with its submodules; a DotProductAttention among them is replaced
    by ours, and under context parallelism, unless the binder's overlap is 'off', a RowParallelLinear by ours, whose dW
    runs beside the backward of the exchanges. A subclass may override ``forward`` and call ``self.core_attention`` as
    Megatron's does.

    Args:
        config: Megatron's TransformerConfig; its ``cp_comm_type`` may be 'ulysses' or 'ring' (``mcore.context``).
        submodules: as SelfAttention's.
        layer_number: global number of the layer, from 1.
        binder: gives the layers of one model one scheduler; None: the exchanges have none of their own.
        attention_chunks: 1, or with Ulysses 2, 4 or 8: qkv and attention are computed in so many parts of this rank's
            heads, and each part's AllToAlls fly beside the computation of others. It must divide the query heads of a
            rank, and divide or be divided by its key heads. Sums are those without chunks; results may differ by
            rounding where a smaller matrix is multiplied by another kernel. 'auto': where the binder's overlap is
            'full' the fewest that overlap, if the attention can be cut, else 1; the choice is printed.
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
        attention_chunks: int | str = 1,
        **kwargs: Any,
    ) -> None:
        chunks = attention_chunks
        super().__init__(config, submodules, layer_number, *args, binder=binder, attention_chunks=chunks, **kwargs)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``([T, B, H], bias or None)``. Arguments as SelfAttention's; those of inference are not computed in chunks,
        which is said once."""
        if self.head_chunks is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        why = why_whole(self, hidden_states, args, kwargs)
        number = 1 if why else len(self.head_chunks.chunks)
        Choice(number, why or "as asked").announce("attention chunks")
        if why:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        rotary = None if _without_rotary(self) else kwargs.get("rotary_pos_emb")
        packed = kwargs.get("packed_seq_params")
        return in_chunks(self, self.head_chunks, hidden_states, attention_mask, rotary, packed)


class FluidMLASelfAttention(_Connected, MLASelfAttention):
    """The same for multi-latent attention. Arguments as ``FluidSelfAttention``; it has no chunks.

    Its core must know two head sizes, which Megatron's DotProductAttention does not (ValueError).
    """

    def __init__(self, config: TransformerConfig, submodules: Any, *args: Any, **kwargs: Any) -> None:
        core = submodules.core_attention
        if core in (DotProductAttention, FluidDotProductAttention):
            raise ValueError(
                f"core_attention={core.__name__} under multi_latent_attention: it has one head size for all; put "
                "fluid_npu.train.latent_attention.FluidLatentDotProductAttention into the spec, or use backend='te'"
            )
        super().__init__(config, submodules, *args, **kwargs)


def _take_linears(submodules: Any, in_chunks: bool) -> None:
    """In place: ours for Megatron's output projection, and for its qkv where the heads are cut."""
    if submodules.linear_proj is RowParallelLinear:
        submodules.linear_proj = FluidRowParallelLinear
    if in_chunks and getattr(submodules, "linear_qkv", None) is ColumnParallelLinear:
        submodules.linear_qkv = FluidColumnParallelLinear


def _head_chunks(attention: Any, asked: int | str, overlap: str) -> HeadChunks | None:
    """The chunks of an attention's heads; None for one. Raises ValueError, naming the option, where there are none."""
    if asked == 1:
        return None
    if asked == AUTO:
        asked = _fewest(attention, overlap).announce("attention_chunks='auto'").value
        return None if asked == 1 else _cut(attention, asked)
    if isinstance(asked, str) or asked < 1:
        raise ValueError(f"attention_chunks={asked}: at least 1 is needed, which cuts nothing, or {AUTO!r}")
    why = _obstacle(attention)
    if why:
        raise ValueError(f"attention_chunks={asked}: {why}; use attention_chunks=1")
    return _cut(attention, asked)


def _fewest(attention: Any, overlap: str) -> Choice[int]:
    """What 'auto' takes: a function of the configuration, so it is the same on every rank."""
    why = f"overlap={overlap!r}" if overlap != "full" else _obstacle(attention)
    if not why:
        try:
            _cut(attention, 2)
        except ValueError as error:
            why = str(error)
    return Choice(1, why) if why else Choice(2, "the fewest that overlap")


def _cut(attention: Any, number: int) -> HeadChunks:
    heads, keys = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    return HeadChunks.of(heads, keys, attention.core_attention.context.ranks, number)


def _obstacle(attention: Any) -> str:
    """Why an attention cannot be cut, whatever its heads; empty: it can."""
    core, why = attention.core_attention, ""
    if not isinstance(attention, FluidSelfAttention):
        why = "multi-latent attention is not computed in chunks"
    elif attention.config.context_parallel_size == 1:
        why = "with context_parallel_size=1 there is no AllToAll to compute beside"
    elif not isinstance(core, ContextParallelCore) or core.context is None:
        why = f"the core is {type(core).__name__}, not ours"
    elif core.context.algorithm != "ulysses":
        why = "a ring passes keys, it does not exchange heads; set cp_comm_type='ulysses'"
    elif not isinstance(attention.linear_qkv, FluidColumnParallelLinear):
        why = f"linear_qkv is {type(attention.linear_qkv).__name__}, not Megatron's ColumnParallelLinear"
    elif not isinstance(attention.linear_proj, FluidRowParallelLinear):
        why = f"linear_proj is {type(attention.linear_proj).__name__}, not Megatron's RowParallelLinear"
    elif attention.config.num_query_groups < attention.config.tensor_model_parallel_size:
        why = "tensor ranks share key heads"
    return why


def _without_rotary(attention: Any) -> bool:
    """Whether the layer is one of those without rotary embedding (``no_rope_freq``)."""
    layers = getattr(attention.config, "no_rope_freq", None)
    return bool(layers and layers[attention.layer_number - 1])


#: Megatron's attention modules and ours.
FLUID_ATTENTION = {SelfAttention: FluidSelfAttention, MLASelfAttention: FluidMLASelfAttention}
