"""Megatron's TransformerLayer that hands its process groups to our MoE layer.

megatron-core 0.16.1 passes ``pg_collection`` only to MoE classes of its own, by name; a model built with process groups
of its own would otherwise get the global ones in its MoE layers, without a word. Lines that pass it to every MLP, or
have none, keep their TransformerLayer (``lines.specs.hides_groups``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fluid_npu.mcore.lines.groups import ProcessGroups


@dataclass(frozen=True)
class _Bound:
    """What ``build_module`` reads of a spec; not a ModuleSpec, so Megatron adds nothing and warns of nothing."""

    module: type
    params: dict[str, Any]
    submodules: Any


class FluidTransformerLayer(TransformerLayer):
    """TransformerLayer; only the construction of its MLP differs. Arguments as upstream's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        pg_collection: ProcessGroups | None = None,
        **kwargs: Any,
    ) -> None:
        mlp = submodules.mlp
        if pg_collection is not None and isinstance(mlp, ModuleSpec) and "binder" in mlp.params:
            submodules = copy.copy(submodules)
            submodules.mlp = _Bound(mlp.module, {**mlp.params, "pg_collection": pg_collection}, mlp.submodules)
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)
