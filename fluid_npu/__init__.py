"""fluid_npu hides the AllToAll of Mixture-of-Experts training behind computation.

The public names are loaded when first used: importing this package imports neither torch nor Megatron and
has no side effects. Only ``fluid_npu.adapt()`` changes anything outside.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fluid_npu.version import __version__

_PUBLIC = {
    "adapt": "fluid_npu.adaptor",
    "npu_gmm": "fluid_npu.ops.grouped_matmul",
    "npu_gmm_v2": "fluid_npu.ops.grouped_matmul",
    "fluid_all_to_all": "fluid_npu.comm.all_to_all",
    "fluid_all_to_all_sp2hp": "fluid_npu.comm.ulysses",
    "fluid_all_to_all_hp2sp": "fluid_npu.comm.ulysses",
    "BackwardScheduler": "fluid_npu.schedule.scheduler",
    "get_backward_scheduler": "fluid_npu.schedule.live",
    "FluidGroupedMLP": "fluid_npu.mcore.experts",
    "FluidTokenDispatcher": "fluid_npu.mcore.token_dispatcher",
    "FluidMoELayer": "fluid_npu.mcore.moe_layer",
    "FluidSelfAttention": "fluid_npu.mcore.self_attention",
    "get_fluid_moe_layer_spec": "fluid_npu.mcore.layer_spec",
    "print_fluid_layer_info": "fluid_npu.mcore.info",
    "print_status": "fluid_npu.mcore.info",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fluid_npu' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
