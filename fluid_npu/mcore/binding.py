"""Which layers belong to one model: they get one scheduler.

A Layer Spec builds layers one by one and may be used for several models. A layer number that comes a second time, or
another configuration, starts the next model; the chunks of an interleaved pipeline have disjoint numbers and share.
They are told apart all the same: the backward of one chunk ends before another's begins, so each has a lowest layer.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from fluid_npu.comm.transports import Transport
from fluid_npu.mcore.chunk_choice import AUTO, check_chunks, check_chunks_of, check_local_first
from fluid_npu.mcore.dispatch_choice import check_dispatch
from fluid_npu.mcore.graph_choice import check_graph
from fluid_npu.ops.payload_fp8 import payload_of
from fluid_npu.schedule.live import register
from fluid_npu.schedule.scheduler import BackwardScheduler

if TYPE_CHECKING:
    from fluid_npu.mcore.transformer_layer import FluidTransformerLayer

_NUMBERS = itertools.count(1)


class SchedulerBinder:
    """Hands out schedulers; one binder per Layer Spec. Arguments as ``EngineArguments``."""

    def __init__(
        self,
        overlap: str = "dw",
        *,
        carry_over: bool = False,
        transport: Transport | None = None,
        gemm_fusion: bool = False,
        dispatch: str = "plain",
        chunks: int | str = AUTO,
        attention_chunks: int | str = 1,
        interleave_batches: bool = False,
        payload_dtype: str = "same",
        cuda_graph: bool | str = False,
        local_first: bool = False,
        chunks_of: str = AUTO,
        node_size: int = 0,
    ) -> None:
        if node_size < 0:
            raise ValueError(f"node_size={node_size}: the ranks of a node, or 0 for those of the transport")
        if attention_chunks != AUTO and (not isinstance(attention_chunks, int) or attention_chunks < 1):
            raise ValueError(
                f"attention_chunks={attention_chunks}: at least 1 is needed, which cuts nothing, or {AUTO!r}"
            )
        self.attention_chunks = attention_chunks
        self.interleave_batches = interleave_batches
        self.payload = payload_of(payload_dtype)
        self.gemm_fusion = gemm_fusion
        self.cuda_graph = check_graph(cuda_graph)
        self.dispatch = check_dispatch(dispatch)
        self.node_size = node_size or int(getattr(transport, "node_size", 0))
        self._settings: dict[str, Any] = {"overlap": overlap, "carry_over": carry_over, "transport": transport}
        self.overlap = overlap
        self.carry_over = carry_over and overlap != "off"
        # Checked here so that a wrong value is refused where it was written.
        BackwardScheduler(**self._settings)
        self.chunks = check_chunks(chunks, overlap)
        self.chunks_of = check_chunks_of(chunks_of, overlap, dispatch)
        self.local_first = check_local_first(local_first, overlap)
        #: By kind and number: MoE layers, attentions, and whole layers whose linears were bound.
        self._layers: dict[tuple[str, int], weakref.ref[Any]] = {}
        self._config: Any = None
        self._scheduler: weakref.ref[BackwardScheduler] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerBinder:
        # Megatron copies specs per layer; copies must still give one scheduler per model.
        return self

    def bind(
        self, layer: Any, number: int | None, pp_rank: int | None = None, *, kind: str = "moe"
    ) -> BackwardScheduler:
        """The scheduler of the model that ``layer`` belongs to; ``pp_rank`` None asks Megatron's global state.

        Layers of different ``kind`` may have one number: a 'moe' layer has a combine to wait for, an 'attention' the
        exchanges of context parallelism.
        """
        if number is None:
            return getattr(layer, "backward_scheduler", None) or self._new(layer, "a layer alone")
        current = self._of_model(layer, (kind, number))
        chunk = chunk_offset(layer.config, number, pp_rank)
        lowest = current.lowest if kind == "moe" else current.lowest_attention
        lowest[chunk] = min(number, lowest.get(chunk, number))
        return current

    def bind_linears(self, layer: FluidTransformerLayer, pp_rank: int | None = None) -> tuple[BackwardScheduler, int]:
        """The scheduler of the model that a whole layer belongs to, and its chunk; called after the layer is built."""
        number = layer.layer_number
        return self._of_model(layer, ("linears", number)), chunk_offset(layer.config, number, pp_rank)

    def _of_model(self, layer: Any, key: tuple[str, int]) -> BackwardScheduler:
        """The current model's scheduler, or a new model's if ``key`` is another live layer's."""
        current = self._scheduler() if self._scheduler is not None else None
        holder = self._layers[key]() if key in self._layers else None
        taken = holder is not None and holder is not layer
        if current is None or taken or layer.config is not self._config:
            self._layers = {}
            self._config = layer.config
            current = self._new(layer, f"model {next(_NUMBERS)}")
            self._scheduler = weakref.ref(current)
        self._layers[key] = weakref.ref(layer)
        return current

    def _new(self, layer: Any, whose: str) -> BackwardScheduler:
        config = layer.config
        experts = (
            f"{config.num_moe_experts} experts, top-{config.moe_router_topk}" if config.num_moe_experts else "dense"
        )
        sizes = f"hidden {config.hidden_size}, {experts}"
        return register(BackwardScheduler(**self._settings, name=f"{whose}: {sizes}"))


def chunk_offset(config: TransformerConfig, number: int, pp_rank: int | None = None) -> int:
    """Layers of the whole model below the pipeline chunk of layer ``number``; 0 where a stage is one chunk."""
    chunks = config.virtual_pipeline_model_parallel_size
    if not chunks:
        return 0
    if "vp_stage" not in inspect.signature(get_transformer_layer_offset).parameters:
        return int(get_transformer_layer_offset(config))  # 0.12: of the chunk that is being built
    offsets = [get_transformer_layer_offset(config, vp_stage=stage, pp_rank=pp_rank) for stage in range(chunks)]
    return max(offset for offset in offsets if offset < number)
