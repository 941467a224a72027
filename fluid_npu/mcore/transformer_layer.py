"""Megatron's TransformerLayer that binds its Fluid linears, hands its process groups to our MoE layer, and may run in
halves of a micro-batch.

megatron-core 0.16.1 passes ``pg_collection`` only to MoE classes of its own, by name; a model built with process groups
of its own would otherwise get the global ones in its MoE layers, without a word. Lines that pass it to every MLP, or
have none, do it themselves (``lines.specs.hides_groups``). No line tells a linear which layer it is in; that is
done here, when the layer is whole.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fluid_npu.mcore import interleave
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.linear import FluidLinear
from fluid_npu.mcore.lines.groups import ProcessGroups
from fluid_npu.mcore.lines.specs import hides_groups


@dataclass(frozen=True)
class _Bound:
    """What ``build_module`` reads of a spec; not a ModuleSpec, so Megatron adds nothing and warns of nothing."""

    module: type
    params: dict[str, Any]
    submodules: Any


class FluidTransformerLayer(TransformerLayer):
    """TransformerLayer with another construction. Arguments as upstream's, and two more.

    ``binder`` gives the layer's Fluid linears their scheduler; without one they compute dW at once. With
    ``interleave_batches`` it trains in two halves of a micro-batch (``mcore.interleave``); ValueError where it cannot.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        pg_collection: ProcessGroups | None = None,
        binder: SchedulerBinder | None = None,
        interleave_batches: bool = False,
        **kwargs: Any,
    ) -> None:
        mlp = submodules.mlp
        if pg_collection is not None:
            kwargs["pg_collection"] = pg_collection
            if isinstance(mlp, ModuleSpec) and "binder" in mlp.params and hides_groups(mlp):
                submodules = copy.copy(submodules)
                submodules.mlp = _Bound(mlp.module, {**mlp.params, "pg_collection": pg_collection}, mlp.submodules)
        super().__init__(config, submodules, *args, **kwargs)
        if binder is not None:
            pipeline = getattr(pg_collection, "pp", None)
            self._bind_linears(binder, None if pipeline is None else pipeline.rank())
        self.interleave_batches = interleave_batches
        if interleave_batches:
            interleave.prepare(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer's; in training in halves, if so built."""
        if self.interleave_batches and self.training and kwargs.get("inference_context") is None:
            return interleave.in_halves(self, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def _bind_linears(self, binder: SchedulerBinder, pp_rank: int | None) -> None:
        linears = {name: module for name, module in self.named_modules() if isinstance(module, FluidLinear)}
        if not linears:
            return
        scheduler, chunk = binder.bind_linears(self, pp_rank)
        exchanges = self._exchanges()
        for name, linear in linears.items():
            linear.join(scheduler, f"layer {self.layer_number} {name}", (chunk, self.layer_number))
            if exchanges and not name.startswith("self_attention."):
                # fc1 is the larger where it is gated; each exchange gets one of the two.
                linear.exchanges = exchanges[-1:] if name.endswith("fc1") else exchanges[:1]

    def _exchanges(self) -> tuple[str, ...]:
        """The kinds of exchange that this layer's attention makes in backward, after the MLP's."""
        context = getattr(getattr(self.self_attention, "core_attention", None), "context", None)
        if context is None:
            return ()
        return ("hp2sp", "sp2hp") if context.algorithm == "ulysses" else ("ring",)
