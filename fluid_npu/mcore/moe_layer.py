"""Megatron's MoELayer with its AllToAll as a handle and its weight gradients as tasks.

Megatron's ``forward`` stays: it drives recompute, padding masks and shared experts. What it passes between its
steps is, here, a ``_Dispatched`` or ``_Combined`` object instead of a bare tensor, so nothing is kept on ``self``.

The overlap is of the 'alltoall' dispatcher, which is ours. With another one the steps are Megatron's own: its
dispatcher, and grouped experts between its two halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle
from fluid_npu.device.choice import Choice
from fluid_npu.mcore import chunks as in_chunks
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.chunk_choice import choose_chunks
from fluid_npu.mcore.chunk_plan import ChunkedPlan
from fluid_npu.mcore.dispatch_plan import DispatchPlan
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.lines.arguments import taken
from fluid_npu.mcore.lines.groups import ProcessGroups, default_groups
from fluid_npu.mcore.lines.moe_layer import MEGATRON_DISPATCHERS, ROUTER_IN_SPEC, MoELayerInSteps
from fluid_npu.mcore.router import FluidRouter
from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher
from fluid_npu.ops.payload import wire_dtype
from fluid_npu.schedule.deferred import DeferredWeights
from fluid_npu.schedule.pipeline import PendingExperts
from fluid_npu.schedule.scheduler import BackwardScheduler


@dataclass(frozen=True)
class _Prepared:
    plan: DispatchPlan | ChunkedPlan
    hidden_states: Tensor
    probs: Tensor

    @property
    def tokens(self) -> Tensor:
        """``[T, H]``."""
        return self.hidden_states.reshape(-1, self.hidden_states.shape[-1])


@dataclass(frozen=True)
class _Dispatched:
    prepared: _Prepared
    handle: AllToAllHandle
    plan: DispatchPlan
    deferred: DeferredWeights | None


@dataclass(frozen=True)
class _InChunks:
    """Every chunk's dispatch is in flight."""

    prepared: _Prepared
    pending: PendingExperts


@dataclass(frozen=True)
class _Combined:
    handle: AllToAllHandle | Tensor
    shared_output: Tensor | None


class FluidMoELayer(MoELayerInSteps):
    """A Mixture-of-Experts layer whose AllToAlls run beside computation.

    Args:
        config: Megatron's TransformerConfig. ``moe_token_dispatcher_type`` 'alltoall' overlaps; 'allgather' and, where
            Megatron has it, 'alltoall_seq' run Megatron's dispatcher with our experts.
        submodules: experts, router and shared experts.
        layer_number: global number of the layer, from 1; usually set later by the TransformerLayer.
        pg_collection: process groups; None takes Megatron's global ones.
        binder: gives layers of one model one scheduler; None makes a scheduler for this layer alone.
        is_mtp_layer, name: passed on to Megatron's layer, on lines whose layer takes them.

    Raises:
        ValueError: a configuration that is not implemented, naming the option and the fix.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroups | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        binder: SchedulerBinder | None = None,
    ) -> None:
        self._binder = binder if binder is not None else SchedulerBinder()
        self.steps = _overlaps(config, self._binder.dispatch)
        if self._binder.payload is not None and not self.steps:
            raise ValueError(
                f"--a2a-payload-dtype fp8: the dispatcher of moe_token_dispatcher_type="
                f"{config.moe_token_dispatcher_type!r} codes nothing; set --moe-token-dispatcher-type alltoall "
                "or use same"
            )
        groups = pg_collection if pg_collection is not None else default_groups()
        optional = taken(MoELayer.__init__, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer, name=name)
        super().__init__(config, submodules, layer_number, **optional)
        if self.steps:
            self._take_our_dispatcher(groups)
        if not ROUTER_IN_SPEC and type(self.router) is TopKRouter:
            self.router: Any = FluidRouter.taking_over(self.router)
        pipeline = getattr(groups, "pp", None)
        self._pp_rank = None if pipeline is None else pipeline.rank()
        self.chunks = self._choose_chunks()
        if self._binder.gemm_fusion and isinstance(self.experts, FluidGroupedMLP):
            self.experts.fuse_dw = True
        self._bind(layer_number)

    def _take_our_dispatcher(self, groups: ProcessGroups) -> None:
        self.token_dispatcher = FluidTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=self.config,
            pg_collection=groups,
            dispatch=self._binder.dispatch,
            payload=self._binder.payload,
        )
        # Megatron's overlap of shared experts needs its own dispatcher and CUDA streams; ours is in the steps below.
        self.shared_expert_overlap = False

    def _choose_chunks(self) -> Choice[int]:
        """In how many chunks of local experts this layer is pipelined."""
        blocked = (
            in_chunks.obstacle(self.config, self.token_dispatcher, self.experts)
            if self.steps
            else f"moe_token_dispatcher_type={self.config.moe_token_dispatcher_type!r} overlaps nothing"
        )
        chosen = choose_chunks(self._binder.chunks, self._binder.overlap, self.num_local_experts, blocked)
        return chosen.announce("MoE chunks") if self._binder.overlap == "full" else chosen

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the TransformerLayer; decides which model this layer belongs to."""
        super().set_layer_number(layer_number)
        self._bind(layer_number)

    def _bind(self, layer_number: int | None) -> None:
        self.label = f"layer {layer_number}" if layer_number is not None else ""
        self.backward_scheduler: BackwardScheduler = self._binder.bind(self, layer_number, self._pp_rank)
        if self.steps:
            self.token_dispatcher.sink = self.backward_scheduler
            self.token_dispatcher.label = self.label
        if isinstance(self.router, FluidRouter):
            self.router.backward_scheduler, self.router.label = self.backward_scheduler, self.label
        if self.backward_scheduler.carry_over and self.steps:
            self._offer_late_weights()

    def _offer_late_weights(self) -> None:
        """The weights whose dW may be left for the combine of the layer below, if the DDP takes late gradients."""
        if isinstance(self.experts, FluidGroupedMLP):
            self.experts.take_late(self.experts.weight2)
        if isinstance(self.router, FluidRouter):
            self.router.take_late(self.router.weight)

    def _say_if_nothing_is_carried(self) -> None:
        experts = self.experts
        if self.backward_scheduler.carry_over and not experts.late_hooks(experts.weight2):
            Choice(
                False, "this DDP takes no late gradients (set delay_wgrad_compute); FC2's dW runs in its layer"
            ).announce("carry_over")

    # ---- Megatron's steps, in the order in which its forward calls them

    def shared_experts_compute(self, hidden_states: Tensor) -> Any:
        """Nothing yet: shared experts run while the dispatch is in flight."""
        return None if self.steps else super().shared_experts_compute(hidden_states)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Any, Any]:
        """Decides the plan."""
        if not self.steps:
            prepared: tuple[Any, Any] = super().preprocess(hidden_states, probs, routing_map)
            return prepared
        plan = (
            self.token_dispatcher.plan(routing_map, hidden_states.shape)
            if self.chunks.value == 1
            else self.token_dispatcher.plan_chunks(routing_map, hidden_states.shape, self.chunks.value)
        )
        return _Prepared(plan, hidden_states, probs), None

    def dispatch(self, hidden_states: Any, probs: Any) -> tuple[Any, Any]:
        """Starts the dispatch AllToAll."""
        if not self.steps:
            dispatched: tuple[Any, Any] = super().dispatch(hidden_states, probs)
            return dispatched
        prepared: _Prepared = hidden_states
        plan, deferred = prepared.plan, self._defer()
        if isinstance(plan, ChunkedPlan):
            sent = in_chunks.launch(
                plan, prepared.tokens, prepared.probs, self.token_dispatcher, self.experts, deferred
            )
            return _InChunks(prepared, sent), None
        passengers = deferred.passengers if deferred is not None else None
        handle = self.token_dispatcher.send(prepared.tokens, prepared.probs, plan, passengers)
        return _Dispatched(prepared, handle, plan, deferred), None

    def _defer(self) -> DeferredWeights | None:
        """What takes the weight gradients of this forward; None without grouped experts or gradients."""
        if not (isinstance(self.experts, FluidGroupedMLP) and torch.is_grad_enabled()):
            return None
        self._say_if_nothing_is_carried()
        scheduler = self.backward_scheduler
        return self.experts.defer(scheduler, self.label, carry=self.layer_number not in scheduler.lowest_layers)

    def routed_experts_compute(self, hidden_states: Any, probs: Any) -> tuple[Any, None]:
        """Shared experts beside the dispatch, then the routed experts; starts the combine AllToAll."""
        if not self.steps:
            computed: tuple[Any, None] = super().routed_experts_compute(hidden_states, probs)
            return computed
        sent: _Dispatched | _InChunks = hidden_states
        tokens, probs_TE = sent.prepared.hidden_states, sent.prepared.probs
        shared_output = super().shared_experts_compute(tokens)
        if isinstance(sent, _InChunks):
            return _Combined(sent.pending.run(), shared_output), None
        plan = sent.plan
        x_RH, p_R = self.token_dispatcher.receive(sent.handle, plan, wire_dtype(tokens.dtype, probs_TE.dtype))
        if sent.deferred is not None:
            out_RH, _ = self.experts(x_RH, plan.tokens_per_expert, p_R, deferred=sent.deferred)
        else:
            out_RH, _ = self.experts(x_RH.contiguous(), torch.tensor(plan.tokens_per_expert), p_R)
        return _Combined(self.token_dispatcher.send_back(out_RH, plan), shared_output), None

    def combine(self, output: Any) -> Any:
        """The combine is in flight; ``postprocess`` completes it."""
        return output if self.steps else super().combine(output)

    def postprocess(self, output: Any, shared_expert_output: Any) -> Tensor:
        """Completes the combine, which sums each token's rows, and adds the shared experts."""
        if not self.steps:
            whole: Tensor = super().postprocess(output, shared_expert_output)
            return whole
        combined: _Combined = output
        handle = combined.handle
        merged = handle if isinstance(handle, Tensor) else handle.wait()
        return merged if combined.shared_output is None else merged + combined.shared_output


def _overlaps(config: TransformerConfig, dispatch: str) -> bool:
    """Whether the dispatcher is ours. Raises ValueError for one that cannot run with grouped experts here."""
    kind = config.moe_token_dispatcher_type
    if kind == "alltoall":
        return True
    if kind in MEGATRON_DISPATCHERS:
        if dispatch == "once-per-rank":
            raise ValueError(
                f"dispatch='once-per-rank': moe_token_dispatcher_type={kind!r} is Megatron's dispatcher, which has no "
                "such form; set --moe-token-dispatcher-type alltoall or use dispatch='plain'"
            )
        reason = f"moe_token_dispatcher_type={kind!r} is Megatron's dispatcher: grouped experts, nothing overlapped"
        Choice("Megatron's steps", reason).announce("FluidMoELayer")
        return False
    why = {
        "flex": "DeepEP and HybridEP move tokens in kernels of their own, beside which nothing of ours can run",
        "alltoall_seq": "Megatron-Core dropped this dispatcher after 0.12",
    }.get(kind, "unknown")
    raise ValueError(
        f"moe_token_dispatcher_type={kind!r}: {why}; set --moe-token-dispatcher-type alltoall (overlapped) "
        f"or one of {', '.join(MEGATRON_DISPATCHERS)} (not overlapped)"
    )
