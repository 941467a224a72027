"""The AllToAll token dispatcher: one payload exchange per dispatch, nothing stuck on ``self`` between layers' steps.

``FluidMoELayer`` uses ``plan``, ``send``, ``receive`` and ``send_back``, which pass a frozen plan along.
Megatron's six steps and the plain ``dispatch()`` / ``combine()`` are thin layers over them for other callers; they
must remember the plan between two calls, as Megatron's own dispatchers do. On 0.12 Megatron has two steps instead of
six; both shapes are here on every line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle, Peers, Route, start_exchange
from fluid_npu.comm.cargo import AS_IS
from fluid_npu.comm.sink import OverlapSink, Passengers
from fluid_npu.comm.transports.base import wants_table
from fluid_npu.device import Choice, kernels_of
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows
from fluid_npu.mcore.agreed_room import AgreedRoom
from fluid_npu.mcore.bounded_plan import make_bounded_chunked_plan, make_bounded_plan
from fluid_npu.mcore.chunk_cuts import ChunkCut, make_cuts
from fluid_npu.mcore.chunk_plan import ChunkedPlan, make_chunked_plan
from fluid_npu.mcore.dispatch_choice import choose_dispatch, nodes_for
from fluid_npu.mcore.dispatch_plan import (
    DispatchPlan,
    ExpertGroups,
    exchange_counts,
    finish_counts,
    first_tokens,
    make_once_plan,
    make_plan,
    make_static_plan,
)
from fluid_npu.mcore.dispatch_rows import NodeRows
from fluid_npu.mcore.lines.groups import ProcessGroups, default_groups
from fluid_npu.mcore.node_plan import come_back, go_on, leg_of, make_node_plan, node_counts
from fluid_npu.mcore.once_chunk_plan import counts_of_chunks, make_once_chunked_plan
from fluid_npu.mcore.same_tokens import check_same_tokens
from fluid_npu.mcore.static_chunk_plan import make_static_own_first
from fluid_npu.ops.once import every_group, once_counts
from fluid_npu.ops.payload import SumParts, payload_width, wire_dtype
from fluid_npu.ops.payload_fp8 import Fp8Payload
from fluid_npu.ops.permute import PermuteLayout, counts_of_experts


class RowCounts(NamedTuple):
    """How many rows this rank sends to each expert, and each rank to each of its own; int64."""

    sent_E: Tensor
    sent_on_device: Tensor
    received_QPL: Tensor
    received_on_device: Tensor
    table: Callable[[slice], list[list[int]] | None]
    """Rows from each rank to each, for some local experts of each, where every rank was told; else None."""


class FluidTokenDispatcher(MoETokenDispatcher):
    """Dispatches tokens to the ranks of their experts and combines the outputs.

    Dropless with uneven and empty splits, capacity with and without padding, expert tensor parallelism.

    Args:
        num_local_experts: L.
        local_expert_indices: global numbers of the local experts, consecutive.
        config: Megatron's TransformerConfig.
        pg_collection: process groups ``ep``, ``expt_tp`` and ``tp_ep``; None takes Megatron's global ones.
        dispatch: 'plain' sends a token once for each of its experts, 'once-per-rank' once to each rank that holds some,
            'once-per-node' once to each node that does and inside it once to each rank, 'static' once to every rank, so
            that no rank waits for sizes (in FluidMoELayer alone); 'auto' takes what has clearly fewer rows.
            ``dispatch_form`` says which, and why.
        experts_on: type of the device of grouped experts that take ``DeviceRows``, which 'static' needs; "" for none.
        payload: codes the tokens of the dispatch in fp8; None sends them in their own dtype.
        node_size: ranks of the job on each node, for 'once-per-node' and 'auto'; 0 where that is not known.

    Raises:
        ValueError: a configuration that this dispatcher does not implement, naming the option and the fix.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroups | None = None,
        dispatch: str = "plain",
        experts_on: str = "",
        payload: Fp8Payload | None = None,
        node_size: int = 0,
    ) -> None:
        groups = pg_collection if pg_collection is not None else default_groups()
        _refuse_unsupported(config)
        super().__init__(config=config, **_base_groups(groups))
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts = config.num_moe_experts
        self.sink: OverlapSink | None = None
        self.label = ""
        self.groups = ExpertGroups(ep=Peers.of(groups.ep), etp=Peers.of(groups.expt_tp), tp_ep=Peers.of(groups.tp_ep))
        nodes = nodes_for(dispatch, self.groups.ep.ranks, node_size, coded=payload is not None)
        sizes = self.groups.ep_size, self.groups.etp_size
        self.dispatch_form = choose_dispatch(dispatch, config, *sizes, experts_on, nodes)
        self.nodes = nodes.value
        if dispatch != "plain":
            self.dispatch_form.announce("dispatch")
        self.payload = usable_payload(payload, self.groups)
        self.room: AgreedRoom | None = None
        """Where a layer is recorded that sends a token once per rank."""
        self._current: DispatchPlan | None = None

    # ---- the steps of a layer, plan in hand

    def plan(self, routing_map_TE: Tensor, tokens_shape: torch.Size) -> DispatchPlan:
        """Decides rows and splits for a bool routing map; tells the other ranks how many rows they get."""
        if self.dispatch_form.value == "static":
            return self._plan_static(routing_map_TE, tokens_shape)
        if self.dispatch_form.value == "once-per-rank":
            return self._plan_once(routing_map_TE, tokens_shape)
        if self.dispatch_form.value == "once-per-node":
            return self._plan_node(routing_map_TE, tokens_shape)
        layout, counts = self._rows(routing_map_TE)
        return make_plan(
            layout,
            tokens_shape,
            counts.sent_E,
            counts.received_QPL,
            counts.received_on_device,
            self.groups,
            counts.table(slice(None)),
        )

    def plan_chunks(
        self,
        routing_map_TE: Tensor,
        tokens_shape: torch.Size,
        chunks: int,
        local_first: bool = False,
        chunks_of: str = "tokens",
    ) -> ChunkedPlan:
        """As ``plan``, in ``chunks``: plain rows of groups of local experts, whose number they divide, or rows sent
        once per rank of some tokens each or, with ``chunks_of`` 'experts', of such groups. With ``local_first`` rows
        that stay on this rank are one more, the first; rows that go to every rank have that one and one more."""
        if self.dispatch_form.value == "static":
            assert local_first and chunks == 1, "FluidMoELayer refuses other chunks"
            check_same_tokens(routing_map_TE.shape[0], self.groups.ep)
            return make_static_own_first(routing_map_TE, self.config.moe_router_topk, tokens_shape, self.groups)
        if self.dispatch_form.value == "once-per-rank":
            cuts = make_cuts(routing_map_TE.shape[0], self.num_local_experts, chunks, chunks_of, local_first)
            return self._plan_once_chunks(routing_map_TE, tokens_shape, cuts)
        layout, counts = self._rows(routing_map_TE)
        on_device = counts.sent_on_device, counts.received_on_device[0]
        own = self.groups.ep_rank if local_first else None
        return make_chunked_plan(
            layout, tokens_shape, counts.sent_E, counts.received_QPL[0], on_device, chunks, counts.table, own
        )

    def _rows(self, routing_map_TE: Tensor) -> tuple[PermuteLayout, RowCounts]:
        """Plain rows, and how many go where. Collective."""
        capacity = self._capacity(routing_map_TE.shape[0])
        if capacity is not None:
            return PermuteLayout.from_capacity(routing_map_TE, capacity), self._fixed(capacity, routing_map_TE.device)
        topk = self.config.moe_router_topk if self.config.moe_expert_capacity_factor is None else None
        counts_E, routed = counts_of_experts(routing_map_TE, topk)
        everyone = self._everyone_counts or kernels_of(counts_E).one_wait_for_counts
        pending = None if self.groups.alone else exchange_counts(counts_E, self.groups, everyone)
        layout = PermuteLayout.from_routing_map(routing_map_TE, topk, routed=routed)
        if pending is None:
            host_E = counts_E.cpu()
            return layout, RowCounts(host_E, counts_E, host_E.view(1, 1, -1), counts_E.view(1, 1, -1), lambda _: None)
        told = finish_counts(pending, self.groups, self.num_local_experts, self._where("dispatch"))
        host_E = counts_E.cpu() if told.own is None else told.own.view(-1)
        return layout, RowCounts(host_E, counts_E, told.host, told.on_device, told.table)

    def _fixed(self, capacity: int, device: torch.device) -> RowCounts:
        ep, local = self.groups.ep_size, self.num_local_experts
        shape = self.groups.etp_size, ep, local
        sizes = ((self.num_experts,), "cpu"), ((self.num_experts,), device), (shape, "cpu"), (shape, device)
        sent, sent_there, received, received_there = (
            torch.full(size, capacity, dtype=torch.int64, device=where) for size, where in sizes
        )

        def table(experts: slice) -> list[list[int]]:
            return [[capacity * len(range(local)[experts])] * ep for _ in range(ep)]

        return RowCounts(sent, sent_there, received, received_there, table)

    def _plan_once(self, routing_map_TE: Tensor, tokens_shape: torch.Size) -> DispatchPlan:
        """One row for each (token, rank); what a rank is told is its rows, then the rows of each of its experts."""
        ranks = self.groups.ep_size
        room, tokens = self.room, [routing_map_TE.shape[0]]
        if room is not None and (agreed := room.rows_for(tokens)) is not None:
            topk = self.config.moe_router_topk
            plan, told_1N = make_bounded_plan(routing_map_TE, topk, tokens_shape, self.groups, agreed)
            room.tell(told_1N)
            return plan
        counts_PC, layout_of = once_counts(routing_map_TE, self.config.moe_router_topk, ranks)
        one_wait = kernels_of(counts_PC).one_wait_for_counts
        pending = exchange_counts(counts_PC.view(-1), self.groups, self._everyone_counts or one_wait)
        # Without a wait of its own the layout is found while the counts travel.
        host_PC = None if one_wait else counts_PC.cpu()
        layout = None if host_PC is None else layout_of(int(host_PC[:, 0].sum()))
        told = finish_counts(pending, self.groups, self.num_local_experts + 1, self._where("dispatch"))
        if host_PC is None or layout is None:
            host_PC = counts_PC.cpu() if told.own is None else told.own
            layout = layout_of(int(host_PC[:, 0].sum()))
        made = make_once_plan(layout, tokens_shape, host_PC, told, self.groups)
        if room is not None:
            room.observe([host_PC[:, 0].tolist()], tokens, [_on_host(made.tokens_per_expert)])
        return made

    def _plan_node(self, routing_map_TE: Tensor, tokens_shape: torch.Size) -> DispatchPlan:
        """One row for each (token, node), and inside each (token, rank)."""
        assert self.nodes is not None, "the form was chosen for nodes"
        counts_GD, layout_of = once_counts(routing_map_TE, self.config.moe_router_topk, self.nodes.count)
        counts_PC = node_counts(counts_GD, routing_map_TE, self.nodes)
        one_wait = kernels_of(counts_PC).one_wait_for_counts
        pending = exchange_counts(counts_PC.view(-1), self.groups, self._everyone_counts or one_wait)
        told = finish_counts(pending, self.groups, counts_PC.shape[1], self._where("dispatch"))
        host_PC = counts_PC.cpu() if told.own is None else told.own
        layout = layout_of(int(host_PC[:: self.nodes.size, 0].sum()))
        return make_node_plan(layout, tokens_shape, host_PC, told, self.groups, self.nodes)

    def _plan_static(self, routing_map_TE: Tensor, tokens_shape: torch.Size) -> DispatchPlan:
        """One row for every (token, rank), told to nobody."""
        check_same_tokens(routing_map_TE.shape[0], self.groups.ep)
        most = self._most_of_an_expert(routing_map_TE.shape[0])
        if most is not None:  # of a router that drops, all are; another one must not write behind the buffers
            routing_map_TE = first_tokens(routing_map_TE, most)
        layout = every_group(routing_map_TE, self.config.moe_router_topk, self.groups.ep_size)
        return make_static_plan(layout, tokens_shape, self.groups, most)

    def _plan_once_chunks(
        self, routing_map_TE: Tensor, tokens_shape: torch.Size, cuts: Sequence[ChunkCut]
    ) -> ChunkedPlan:
        """As ``_plan_once`` for each chunk, with one exchange of counts."""
        topk, ranks, own = self.config.moe_router_topk, self.groups.ep_size, self.groups.ep_rank
        room, sizes = self.room, [cut.num_tokens for cut in cuts]
        if room is not None and (agreed := room.rows_for(sizes)) is not None:
            bounded, told_CN = make_bounded_chunked_plan(routing_map_TE, topk, cuts, tokens_shape, self.groups, agreed)
            room.tell(told_CN)
            return bounded
        made = [once_counts(cut.map(routing_map_TE, ranks, own), topk, ranks) for cut in cuts]
        counts_PCN = counts_of_chunks([counts for counts, _ in made], cuts)
        one_wait = kernels_of(counts_PCN).one_wait_for_counts
        pending = exchange_counts(counts_PCN.view(-1), self.groups, self._everyone_counts or one_wait)
        host_PCN = None if one_wait else counts_PCN.cpu()
        told = finish_counts(pending, self.groups, counts_PCN[0].numel(), self._where("dispatch"))
        if host_PCN is None:
            host_PCN = counts_PCN.cpu() if told.own is None else told.own.view(counts_PCN.shape)
        layouts = [layout_of(int(host_PCN[:, n, 0].sum())) for n, (_, layout_of) in enumerate(made)]
        plan = make_once_chunked_plan(layouts, cuts, tokens_shape, host_PCN, told, self.groups)
        if room is not None:
            pairs = [_on_host(chunk.tokens_per_expert) for chunk in plan.chunks]
            room.observe(host_PCN[:, :, 0].t().tolist(), sizes, pairs)
        return plan

    @property
    def _everyone_counts(self) -> bool:
        """Whether the transport must know what other ranks get from each other."""
        return self.sink is not None and wants_table(self.sink.transport)

    def send(
        self, x_TH: Tensor, probs_TE: Tensor, plan: DispatchPlan, passengers: Passengers | None = None
    ) -> AllToAllHandle:
        """Starts the dispatch of tokens and probabilities; ``receive`` completes it."""
        hidden, wire = x_TH.shape[1], wire_dtype(x_TH.dtype, probs_TE.dtype)
        loading, unloading = plan.rows.pack(hidden, wire), plan.rows.unpack(hidden, wire)
        if self.payload is not None:
            loading, unloading = self.payload.cargo(plan.rows, hidden, wire, x_TH.dtype)
        return start_exchange(
            self._route(plan, "moe_dispatch", payload_width(hidden, x_TH.dtype) * x_TH.element_size()),
            [x_TH, probs_TE.to(wire)],
            loading=loading,
            unloading=unloading if self.groups.etp_size == 1 and plan.inside is None else AS_IS,
            sink=self.sink,
            passengers=passengers,
        )

    def receive(self, handle: AllToAllHandle, plan: DispatchPlan, wire: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[R, H]`` tokens by local expert and their ``[R]`` probabilities of dtype ``wire``.

        Expert-tensor-parallel ranks hold parts of the same experts and need each other's rows: an AllToAll that
        sends every rank the same rows, as many bytes as an all-gather and the only form that gloo has for
        uneven sizes.
        """
        if isinstance(plan.rows, NodeRows):
            return go_on(handle, plan, self.groups, self.label, wire, self.sink)
        if self.groups.etp_size == 1:
            return handle.wait()
        hidden, payload = plan.tokens_shape[-1], handle.wait()
        return start_exchange(
            self._route_etp(plan, payload_width(hidden, payload.dtype) * payload.element_size()),
            [payload],
            loading=plan.rows.replicate(self.groups.etp_size, hidden, wire),
            unloading=plan.rows.unpack(hidden, wire),
            sink=self.sink,
        ).wait()

    def send_back(self, out_RH: Tensor, plan: DispatchPlan) -> AllToAllHandle:
        """Starts the combine of the experts' outputs; its ``wait()`` gives the sum of each token's rows."""
        loading, row_bytes = plan.rows.collect(), out_RH.shape[1] * out_RH.element_size()
        if self.groups.etp_size > 1:
            out_RH = start_exchange(
                self._route_etp(plan, row_bytes, back=True),
                [out_RH],
                loading=loading,
                unloading=SumParts(self.groups.etp_size),
                sink=self.sink,
            ).wait()
            loading = AS_IS
        if isinstance(plan.rows, NodeRows):
            out_RH, loading = come_back(out_RH, plan, self.groups, self.label, self.sink), AS_IS
        return start_exchange(
            self._route(plan, "moe_combine", row_bytes),
            [out_RH],
            loading=loading,
            unloading=plan.rows.merge(plan.tokens_shape),
            sink=self.sink,
        )

    def _route(self, plan: DispatchPlan, comm_type: str, row_bytes: int) -> Route:
        """Of a dispatch or, the other way, of a combine; ``row_bytes`` of a row in plain form."""
        dispatch = Route(
            peers=self.groups.ep,
            output_splits=plan.output_splits,
            input_splits=plan.input_splits,
            comm_type=comm_type,
            label=self.label,
            plain_bytes=self._plain_bytes(plan, row_bytes),
            table=plan.table,
            leg=leg_of(plan, row_bytes),
        )
        return dispatch if comm_type == "moe_dispatch" else dispatch.reversed(comm_type)

    def _plain_bytes(self, plan: DispatchPlan, row_bytes: int) -> tuple[int, int] | None:
        """There and back, with a row in the tokens' dtype for each (token, expert); None where that is what is sent."""
        if plan.plain is not None:
            return plan.plain.bytes(row_bytes)
        if self.payload is None:
            return None
        own, splits = self.groups.ep_rank, (plan.input_splits, plan.output_splits)
        sent, received = ((sum(rows) - rows[own]) * row_bytes for rows in splits)
        return sent, received

    def _route_etp(self, plan: DispatchPlan, row_bytes: int, back: bool = False) -> Route:
        """To every expert-tensor-parallel rank the same rows, or back from every one its part of them."""
        own, name = plan.gather_splits[self.groups.etp_rank], "moe_expert_tp"
        there = Route(
            peers=self.groups.etp,
            output_splits=plan.gather_splits,
            input_splits=[own] * self.groups.etp_size,
            comm_type=name,
            label=self.label,
            plain_bytes=plan.plain.gathered_bytes(row_bytes) if plan.plain is not None else None,
        )
        return there.reversed(name) if back else there

    def _most_of_an_expert(self, num_tokens: int) -> int | None:
        """Tokens of a rank that Megatron's router leaves to an expert; None where it drops none."""
        factor = self.config.moe_expert_capacity_factor
        if factor is None:
            return None
        return get_capacity(num_tokens * self.config.moe_router_topk, self.num_experts, factor)

    def _capacity(self, num_tokens: int) -> int | None:
        """Rows of each expert when they are padded to a fixed number, else None."""
        if not self.config.moe_pad_expert_input_to_capacity:
            return None
        return get_capacity(
            num_tokens * self.config.moe_router_topk, self.num_experts, self.config.moe_expert_capacity_factor
        )

    def _where(self, step: str) -> str:
        return f"{step}{f' of {self.label}' if self.label else ''}"

    # ---- plain use, as in users' scripts

    def dispatch(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(tokens [R, H], tokens_per_expert [L] int64 on the host, probs [R])`` for ``[..., H]`` hidden states.

        Args:
            hidden_states: ``[..., H]``.
            routing_map: ``[T, E]`` bool.
            probs: ``[T, E]``.
        """
        tokens, probs = self.dispatch_preprocess(hidden_states, routing_map, probs)
        return self.dispatch_postprocess(*self.token_dispatch(tokens, probs))

    def combine(self, expert_output: Tensor) -> Tensor:
        """Undoes the last ``dispatch``: the sum over each token's experts, in the shape of its hidden states."""
        return self.token_combine(expert_output)

    # ---- Megatron's six steps; the reorderings happen inside the two exchanges

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Decides rows and splits."""
        if self.shared_experts is not None:
            raise ValueError(
                "moe_shared_expert_overlap=True: FluidTokenDispatcher in Megatron's MoELayer runs no shared experts; "
                "unset --moe-shared-expert-overlap, or use FluidMoELayer, which overlaps them itself"
            )
        self._current = self.plan(routing_map, hidden_states.shape)
        return hidden_states.reshape(-1, hidden_states.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The dispatch AllToAll: tokens by local expert, and their probabilities."""
        plan = self._plan_of_step("token_dispatch")
        wire = wire_dtype(hidden_states.dtype, probs.dtype)
        return self.receive(self.send(hidden_states, probs, plan), plan, wire)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens by local expert, rows of each local expert, probabilities."""
        counts = self._plan_of_step("dispatch_postprocess").tokens_per_expert
        assert isinstance(counts, GroupRows), "the constructor refuses 'static' outside FluidMoELayer"
        return hidden_states, torch.tensor(counts), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing: rows are put in order as they are sent."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The combine AllToAll and the sum of each token's rows."""
        return self.send_back(hidden_states, self._plan_of_step("token_combine")).wait()

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing: rows are summed as they are received."""
        return hidden_states

    # ---- Megatron's two steps (0.12)

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``dispatch``, with the arguments in 0.12's order."""
        return self.dispatch(hidden_states, routing_map, probs)

    def token_unpermutation(self, hidden_states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        """As ``combine``. Raises ValueError for a bias, which grouped experts do not have."""
        if bias is not None:
            raise ValueError("token_unpermutation(bias=...): a bias is not supported; set --disable-bias-linear")
        return self.combine(hidden_states), None

    def _plan_of_step(self, step: str) -> DispatchPlan:
        if self._current is None:
            raise RuntimeError(f"FluidTokenDispatcher.{step}() needs dispatch_preprocess() or dispatch() before it")
        return self._current


def _on_host(rows: GroupRows | DeviceRows) -> int:
    """How many rows the experts have in a dispatch whose sizes were told."""
    assert isinstance(rows, GroupRows), "the host was told them"
    return sum(rows)


def usable_payload(payload: Fp8Payload | None, groups: ExpertGroups) -> Fp8Payload | None:
    """None where no row is sent. Raises ValueError for an fp8 payload with expert tensor parallelism."""
    if payload is not None and groups.etp_size > 1:
        raise ValueError(
            f"--a2a-payload-dtype fp8: expert_tensor_parallel_size={groups.etp_size} sends received rows on, which "
            "is not coded; use expert_tensor_parallel_size=1, or use same"
        )
    if payload is not None and groups.ep_size == 1:
        Choice("same", "one rank has all experts: no row is sent, so none is coded").announce("payload of dispatch")
        return None
    return payload


def _base_groups(groups: ProcessGroups) -> dict[str, Any]:
    """What the base class of the installed line takes besides the configuration."""
    accepts = "pg_collection" in inspect.signature(MoETokenDispatcher.__init__).parameters
    return {"pg_collection": groups} if accepts else {}


def _refuse_unsupported(config: TransformerConfig) -> None:
    refused = {
        "moe_router_padding_for_quantization": "fp8 and fp4 experts are not supported",
        "overlap_moe_expert_parallel_comm": "Megatron's 1F1B overlap drives its own dispatcher steps; use overlap='dw'",
        "overlap_dispatch_backward_with_experts_wgrad": "Megatron's own dW overlap drives its grouped linears",
        "moe_latent_size": "latent projections need Transformer Engine",
    }
    for option, why in refused.items():
        if getattr(config, option, None):
            raise ValueError(f"{option}={getattr(config, option)!r}: {why}; unset it to use FluidTokenDispatcher")
