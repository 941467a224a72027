"""The plan of a dispatch that sends a token once to each node, and inside a node once to each rank.

Across: a row for each (token, node), to the rank of the sender's place there. Inside: that rank sends it on, a row for
each rank of the node that holds one of the token's experts. Combine is the way back, with a sum after each leg. Both
legs are exchanges of the expert-parallel group, in which most ranks have no rows for each other.

P expert-parallel ranks in G nodes of M: rank p is at place p % M of node p // M. L local experts, C numbers told.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fluid_npu.comm.all_to_all import AllToAllHandle, Route, start_exchange
from fluid_npu.comm.legs import LegBytes, NodeLeg
from fluid_npu.comm.sink import OverlapSink
from fluid_npu.comm.transports.nodes import Nodes
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.mcore.dispatch_plan import DispatchPlan, ExpertGroups, InsideLeg, PlainCounts, ToldCounts
from fluid_npu.mcore.dispatch_rows import NodeRows
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.payload_node import Relayed
from fluid_npu.ops.payload_once import Arrival


def node_counts(counts_GD: Tensor, map_TE: Tensor, nodes: Nodes) -> Tensor:
    """[P, C], C = 1 + M + L: what each rank is told. Rows for its node, for each rank of its node, for its experts.

    ``counts_GD``: rows of each node, then of each of its experts (``once_counts``).
    """
    tokens, experts = map_TE.shape
    ranks = nodes.count * nodes.size
    rows_P = map_TE.view(tokens, ranks, experts // ranks).any(2).sum(0)
    for_node = counts_GD[:, :1].repeat_interleave(nodes.size, 0)
    for_ranks = rows_P.view(nodes.count, nodes.size).repeat_interleave(nodes.size, 0)
    return torch.cat([for_node, for_ranks, counts_GD[:, 1:].reshape(ranks, -1)], dim=1)


def make_node_plan(
    layout: OnceLayout, tokens_shape: torch.Size, sent_PC: Tensor, told: ToldCounts, groups: ExpertGroups, nodes: Nodes
) -> DispatchPlan:
    """The plan for these counts. ``sent_PC``: what this rank told each, on the host; ``told``: what each told it."""
    sent, got, own, size = sent_PC.numpy(), told.host[0].numpy(), groups.ep_rank, nodes.size
    experts_L = got[:, 1 + size :].sum(0)
    inside = _inside(got, own, nodes, told.all_PPC)
    plain_sent, plain_got = sent[:, 1 + size :].sum(1), got[:, 1 + size :].sum(1)
    here = np.arange(groups.ep_size) // size == own // size
    relayed = Relayed(node_experts=layout.local, ranks=size, rows=sum(inside.input_splits))
    return DispatchPlan(
        rows=NodeRows(
            layout=layout,
            relayed=relayed,
            arrival=Arrival(expert_rows=int(experts_L.sum())),
            local=layout.local // size,
        ),
        tokens_shape=tokens_shape,
        input_splits=_to_rail(sent[:, 0], own, nodes),
        output_splits=_to_rail(got[:, 0], own, nodes),
        gather_splits=[sum(inside.output_splits)],
        tokens_per_expert=GroupRows(experts_L.tolist(), told.on_device[0, :, 1 + size :].sum(0)),
        plain=PlainCounts(
            sent=int(plain_sent.sum() - plain_sent[own]),
            received=int(plain_got.sum() - plain_got[own]),
            gathered_sent=0,
            gathered_received=0,
            across=(int(plain_sent[~here].sum()), int(plain_got[~here].sum())),
        ),
        table=_across_table(told.all_PPC, nodes),
        inside=inside,
    )


def leg_of(plan: DispatchPlan, row_bytes: int) -> NodeLeg | None:
    """What the leg across is, for statistics; None for a dispatch without legs. ``row_bytes``: of a plain row."""
    if plan.inside is None or plan.plain is None:
        return None
    there, back = (
        LegBytes(total - across * row_bytes, across * row_bytes)
        for total, across in zip(plan.plain.bytes(row_bytes), plan.plain.across, strict=True)
    )
    return NodeLeg(inside=False, plain=(there, back))


def inside_route(plan: DispatchPlan, groups: ExpertGroups, label: str, back: bool = False) -> Route:
    """From the rank that a row came to, to those that want it; or back."""
    assert plan.inside is not None, "a dispatch by nodes has a leg inside"
    there = Route(
        peers=groups.ep,
        output_splits=plan.inside.output_splits,
        input_splits=plan.inside.input_splits,
        comm_type=INSIDE,
        label=label,
        plain_bytes=(0, 0),  # the leg across has them
        table=plan.inside.table,
        leg=NodeLeg(inside=True),
    )
    return there.reversed(INSIDE) if back else there


def go_on(
    arriving: AllToAllHandle,
    plan: DispatchPlan,
    groups: ExpertGroups,
    label: str,
    wire: torch.dtype,
    sink: OverlapSink | None,
) -> tuple[Tensor, Tensor]:
    """Inside the node, from the rank that rows came to: ``[R, H]`` tokens by local expert and their probabilities."""
    rows, hidden = plan.rows, plan.tokens_shape[-1]
    assert isinstance(rows, NodeRows), "a dispatch by nodes"
    return start_exchange(
        inside_route(plan, groups, label),
        [arriving.wait()],
        loading=rows.relay(hidden, wire),
        unloading=rows.unpack(hidden, wire),
        sink=sink,
    ).wait()


def come_back(out_RH: Tensor, plan: DispatchPlan, groups: ExpertGroups, label: str, sink: OverlapSink | None) -> Tensor:
    """The experts' outputs inside the node, back at the rank that the rows came to."""
    assert isinstance(plan.rows, NodeRows), "a dispatch by nodes"
    route, loading = inside_route(plan, groups, label, back=True), plan.rows.collect()
    return start_exchange(route, [out_RH], loading=loading, unloading=plan.rows.gather(), sink=sink).wait()


#: Kind of exchange of the leg inside.
INSIDE = "moe_inside_node"


def _to_rail(rows_P: np.ndarray, own: int, nodes: Nodes) -> list[int]:
    """Splits with rows for the ranks of the own place alone."""
    on_rail = np.arange(len(rows_P)) % nodes.size == own % nodes.size
    splits: list[int] = np.where(on_rail, rows_P, 0).tolist()
    return splits


def _inside(got: np.ndarray, own: int, nodes: Nodes, all_PPC: Tensor | None) -> InsideLeg:
    """Splits inside the node: every rank sends on what its rail brought."""
    (node, place), size = divmod(own, nodes.size), nodes.size
    # [node, place] of the source, place of the target.
    by_source = got[:, 1 : 1 + size].reshape(nodes.count, size, size)
    here = slice(node * size, (node + 1) * size)
    sends, receives = np.zeros(len(got), dtype=np.int64), np.zeros(len(got), dtype=np.int64)
    sends[here], receives[here] = by_source[:, place].sum(0), by_source[:, :, place].sum(0)
    return InsideLeg(input_splits=sends.tolist(), output_splits=receives.tolist(), table=_inside_table(all_PPC, nodes))


def _across_table(all_PPC: Tensor | None, nodes: Nodes) -> list[list[int]] | None:
    if all_PPC is None:
        return None
    rows_PP = all_PPC[:, :, 0].numpy()
    place = np.arange(len(rows_PP)) % nodes.size
    table: list[list[int]] = np.where(place[:, None] == place[None, :], rows_PP, 0).tolist()
    return table


def _inside_table(all_PPC: Tensor | None, nodes: Nodes) -> list[list[int]] | None:
    if all_PPC is None:
        return None
    count, size = nodes.count, nodes.size
    told = all_PPC.numpy()[:, :, 1 : 1 + size].reshape(count, size, count, size, size)
    rows = np.einsum("gxhyy->xhy", told)  # by place of the source, which is that of the relay; node and place of target
    table = np.zeros((count, size, count, size), dtype=np.int64)
    for node in range(count):
        table[node, :, node] = rows[:, node]
    found: list[list[int]] = table.reshape(count * size, -1).tolist()
    return found
