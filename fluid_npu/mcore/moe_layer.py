"""Megatron's MoELayer with its AllToAll as a handle and its weight gradients as tasks.

Megatron's ``forward`` stays: it drives recompute, padding masks and shared experts. What it passes between its
steps is, here, a ``_Dispatched`` or ``_Combined`` object instead of a bare tensor, so nothing is kept on ``self``.

The overlap is of the 'alltoall' dispatcher, which is ours. With another one the steps are Megatron's own: its
dispatcher, and grouped experts between its two halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.mcore import chunks as in_chunks
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.chunk_choice import choose_chunks, choose_chunks_of, choose_local_first
from fluid_npu.mcore.chunk_plan import ChunkedPlan
from fluid_npu.mcore.dispatch_plan import DispatchPlan
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.graph_choice import graphed
from fluid_npu.mcore.lines.arguments import taken
from fluid_npu.mcore.lines.groups import ProcessGroups, default_groups
from fluid_npu.mcore.lines.moe_layer import MEGATRON_DISPATCHERS, ROUTER_IN_SPEC, MoELayerInSteps
from fluid_npu.mcore.reduction import keeps_for_reduction
from fluid_npu.mcore.router import FluidRouter
from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher
from fluid_npu.ops.payload import wire_dtype
from fluid_npu.schedule.deferred import DeferredWeights
from fluid_npu.schedule.graphed import GraphedLayer
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
        self._gives_placeholders = True
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
        self.chunks = self._choose_chunks(self._chunk_obstacle(local_first=False))
        self.chunks_of = self._choose_chunks_of()
        self.local_first = choose_local_first(
            self._binder.local_first, groups.ep.size(), self._chunk_obstacle(local_first=True)
        )
        if self._binder.local_first:
            self.local_first.announce("local rows first")
        if self._binder.gemm_fusion and isinstance(self.experts, FluidGroupedMLP):
            self.experts.fuse_dw = True
        self._bind(layer_number)
        self.graphed: GraphedLayer | None = graphed(self, self._in_one_piece, self._binder.cuda_graph)

    def forward(self, hidden_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Any]:
        """``([S, B, H], None)`` for ``[S, B, H]``; Megatron's own forward, or a replay of it."""
        if self.graphed is None or any(value is not None for value in (*rest, *more.values())):
            whole: tuple[Tensor, Any] = super().forward(hidden_states, *rest, **more)
            return whole
        return self.graphed(hidden_states), None

    def _in_one_piece(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden_states)[0]
        return output

    def _take_our_dispatcher(self, groups: ProcessGroups) -> None:
        binder, ours = self._binder, isinstance(self.experts, FluidGroupedMLP)
        in_pieces = binder.dispatch == "auto" and binder.overlap == "full"  # 'auto' then takes a form that has some
        self.token_dispatcher = FluidTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=self.config,
            pg_collection=groups,
            dispatch=binder.dispatch,
            experts_on=self.experts.weight1.device.type if ours and not in_pieces else "",
            payload=binder.payload,
            node_size=0 if in_pieces else binder.node_size,
        )
        # Megatron's overlap of shared experts needs its own dispatcher and CUDA streams; ours is in the steps below.
        self.shared_expert_overlap = False

    def _chunk_obstacle(self, local_first: bool) -> str | None:
        """What keeps this layer in one piece, or local rows from being one more; None for nothing."""
        if self.steps:
            return in_chunks.obstacle(self.config, self.token_dispatcher, self.experts, local_first)
        return f"moe_token_dispatcher_type={self.config.moe_token_dispatcher_type!r} overlaps nothing"

    def _choose_chunks(self, blocked: str | None) -> Choice[int]:
        """In how many chunks this layer is pipelined."""
        any_number = self._once_per_rank and self._binder.chunks_of != "experts"
        chosen = choose_chunks(self._binder.chunks, self._binder.overlap, self.num_local_experts, blocked, any_number)
        return chosen.announce("MoE chunks") if self._binder.overlap == "full" else chosen

    def _choose_chunks_of(self) -> Choice[str]:
        """Whether chunks are of tokens or of experts."""
        form, experts = (
            self.token_dispatcher.dispatch_form.value if self.steps else "plain",
            self.config.num_moe_experts,
        )
        numbers = experts, self.config.moe_router_topk, experts // self.num_local_experts
        chosen = choose_chunks_of(self._binder.chunks_of, self.chunks.value, form, *numbers)
        return chosen.announce("MoE chunks of") if self.chunks.value > 1 else chosen

    @property
    def _once_per_rank(self) -> bool:
        return self.steps and self.token_dispatcher.dispatch_form.value == "once-per-rank"

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
        # Two halves would land a weight twice in a backward, and a late DDP counts one landing.
        if self.backward_scheduler.carry_over and self.steps and not self._binder.interleave_batches:
            self._offer_late_weights()

    def _offer_late_weights(self) -> None:
        """The weights whose dW may be left for the combine of the layer below, if the DDP takes late gradients."""
        if isinstance(self.experts, FluidGroupedMLP):
            self.experts.take_late(self.experts.weight2)
        if isinstance(self.router, FluidRouter):
            self.router.take_late(self.router.weight)

    def _say_if_nothing_is_carried(self) -> None:
        experts = self.experts
        if self._binder.interleave_batches:
            return
        if self.backward_scheduler.carry_over and not experts.late_hooks(experts.weight2):
            Choice(
                False, "this DDP takes no late gradients (set delay_wgrad_compute); FC2's dW runs in its layer"
            ).announce("carry_over")

    def _keeps_for_reduction(self) -> bool:
        """In the lowest layer: whether FC2's dW is left for the reduction that ends the step."""
        weight = self.experts.weight2
        kept = keeps_for_reduction(weight, self.experts.late_hooks(weight), self.config.pipeline_model_parallel_size)
        return kept.announce("dW beside the last reduction").value if kept.value else False

    # ---- a forward in three calls, for two halves of a micro-batch at once (``mcore.interleave``)

    def start(self, hidden_states: Tensor, half: int) -> Any:
        """Routes ``[S, B/2, H]`` and starts the dispatch; ``compute`` takes what it returns."""
        with self._in_half(half):
            prepared, _ = self.preprocess(hidden_states, *self.route(hidden_states))
            return self.dispatch(prepared, None)[0]

    def compute(self, sent: Any, half: int) -> Any:
        """Experts, beside an exchange of the other half; starts the combine. ``complete`` takes what it returns."""
        with self._in_half(half), beside_exchange():
            return self.routed_experts_compute(sent, None)[0]

    def complete(self, combined: Any) -> Tensor:
        """``[S, B/2, H]``."""
        return self.postprocess(self.combine(combined), None)

    @contextmanager
    def _in_half(self, half: int) -> Iterator[None]:
        """Names of exchanges and tasks say which half. The first half, last in the backward, gives the placeholders."""
        whole = self.label
        self.label = self.token_dispatcher.label = f"{whole} half {half + 1} of 2".strip()
        self._gives_placeholders = half == 0
        try:
            yield
        finally:
            self.label = self.token_dispatcher.label = whole
            self._gives_placeholders = True

    # ---- Megatron's steps, in the order in which its forward calls them

    def shared_experts_compute(self, hidden_states: Tensor) -> Any:
        """Nothing yet: shared experts run while the dispatch is in flight."""
        return None if self.steps else super().shared_experts_compute(hidden_states)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Any, Any]:
        """Decides the plan."""
        if not self.steps:
            prepared: tuple[Any, Any] = super().preprocess(hidden_states, probs, routing_map)
            return prepared
        dispatcher, shape, local_first = self.token_dispatcher, hidden_states.shape, self.local_first.value
        if self.chunks.value == 1 and not local_first:
            return _Prepared(dispatcher.plan(routing_map, shape), hidden_states, probs), None
        plan = dispatcher.plan_chunks(routing_map, shape, self.chunks.value, local_first, self.chunks_of.value)
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
        carry = True if self.layer_number not in scheduler.lowest_layers else self._keeps_for_reduction
        return self.experts.defer(scheduler, self.label, carry=carry, placeholders=self._gives_placeholders)

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
        self.backward_scheduler.fill_again(f"moe_dispatch AllToAll of {self.label}", gaps=3)
        x_RH, p_R = self.token_dispatcher.receive(sent.handle, plan, wire_dtype(tokens.dtype, probs_TE.dtype))
        if sent.deferred is not None:
            out_RH, _ = self.experts(x_RH, plan.tokens_per_expert, p_R, deferred=sent.deferred)
        else:
            counts = plan.tokens_per_expert
            given = counts if isinstance(counts, DeviceRows) else torch.tensor(counts)
            out_RH, _ = self.experts(x_RH.contiguous(), given, p_R)
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
        if not isinstance(handle, Tensor):
            self.backward_scheduler.fill_again(f"moe_combine AllToAll of {self.label}", gaps=2)
        merged = handle if isinstance(handle, Tensor) else handle.wait()
        return merged if combined.shared_output is None else merged + combined.shared_output


def _overlaps(config: TransformerConfig, dispatch: str) -> bool:
    """Whether the dispatcher is ours. Raises ValueError for one that cannot run with grouped experts here."""
    kind = config.moe_token_dispatcher_type
    if kind == "alltoall":
        return True
    if kind in MEGATRON_DISPATCHERS:
        if dispatch not in ("plain", "auto"):
            raise ValueError(
                f"dispatch={dispatch!r}: moe_token_dispatcher_type={kind!r} is Megatron's dispatcher, which has no "
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
