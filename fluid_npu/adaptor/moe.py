"""What the features ``moe``, ``grouped_mlp`` and ``token_dispatcher`` put in the place of Megatron's own.

``moe`` wraps Megatron's functions that make a layer's spec: where grouped experts are asked for, the spec goes through
the function behind ``get_fluid_moe_layer_spec``, so both doors build the same modules. The other two are for code that
builds GroupedMLP or the AllToAll dispatcher by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import wraps
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from fluid_npu.adaptor.settings import OF_TRANSPORT, Settings, current
from fluid_npu.adaptor.transport import node_size_of, transport_of
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.layer_spec import with_fluid_block, with_fluid_moe
from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher

__all__ = [
    "FluidGroupedMLP",
    "FluidTokenDispatcher",
    "block_spec",
    "layer_spec",
    "mtp_block_spec",
    "takes_late_gradients",
]

_MOE_GROUPED_GEMM = 1  # its place among the positional arguments, the same in every line
_bound: tuple[Settings, SchedulerBinder] | None = None


def binder() -> SchedulerBinder:
    """The binder of the settings in force: one for all specs made while they are. The first one with a transport of its
    own is a collective call."""
    global _bound
    settings = current()
    if _bound is None or _bound[0] != settings:
        given = {name: value for name, value in asdict(settings).items() if name not in OF_TRANSPORT}
        _bound = (
            settings,
            SchedulerBinder(**given, transport=transport_of(settings), node_size=node_size_of(settings)),
        )
    return _bound[1]


def layer_spec(original: Callable[..., ModuleSpec]) -> Callable[..., ModuleSpec]:
    """Wraps ``get_gpt_layer_local_spec`` and ``get_gpt_layer_with_transformer_engine_spec``."""

    @wraps(original)
    def make(*args: Any, **kwargs: Any) -> ModuleSpec:
        asked = kwargs.get("moe_grouped_gemm", args[_MOE_GROUPED_GEMM] if len(args) > _MOE_GROUPED_GEMM else False)
        spec = original(*args, **kwargs)
        return with_fluid_moe(spec, binder()) if asked else spec

    return make


def block_spec(original: Callable[..., TransformerBlockSubmodules]) -> Callable[..., TransformerBlockSubmodules]:
    """Wraps ``get_gpt_decoder_block_spec``: all norms as ``get_fluid_moe_block_spec`` has them."""

    @wraps(original)
    def make(config: Any, *args: Any, **kwargs: Any) -> TransformerBlockSubmodules:
        block = original(config, *args, **kwargs)
        asked = config.num_moe_experts is not None and config.moe_grouped_gemm
        return with_fluid_block(block, binder()) if asked else block

    return make


def mtp_block_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``get_gpt_mtp_block_spec``, which takes a layer's spec only with Megatron's own TransformerLayer in it.

    In a block it takes any layer; ours goes in so.
    """

    @wraps(original)
    def make(config: Any, spec: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(spec, ModuleSpec):
            spec = TransformerBlockSubmodules(layer_specs=[spec])
        return original(config, spec, *args, **kwargs)

    return make


def takes_late_gradients(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``DistributedDataParallel.__init__``: it hands the hooks of late weights to their module."""

    @wraps(original)
    def init(self: Any, config: Any, ddp_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, replace(ddp_config, delay_wgrad_compute=True), *args, **kwargs)

    return init
