"""Which transport moves the bytes of a job: one answer for all of its ranks, with the reason.

Every candidate but torch.distributed's collective must first be possible on this hardware, then be ready in each group,
then pass a self-check there; what one rank lacks no rank uses. 'auto' then takes the one with the least time in the
calibration, at the size of message that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.ctas import ctas_obstacle
from fluid_npu.comm.transports.agreement import gathered, node_name
from fluid_npu.comm.transports.base import Transport
from fluid_npu.comm.transports.calibration import Calibration, Cost, Table, measure, topology
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.few_ctas import DEFAULT_CTAS, few_ctas_missing, few_ctas_transport
from fluid_npu.comm.transports.hccl_aicpu import DEFAULT_MIB, hccl_aicpu_missing, hccl_aicpu_transport
from fluid_npu.comm.transports.high_priority import high_priority_missing, high_priority_transport
from fluid_npu.comm.transports.nodes import FLAG, agreed_node_size, nodes_of
from fluid_npu.comm.transports.pairwise import PairwiseTransport
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from fluid_npu.comm.transports.self_check import self_check
from fluid_npu.comm.transports.two_level import TwoLevelTransport
from fluid_npu.device.base import Device
from fluid_npu.device.choice import Choice

#: What ``--a2a-transport`` may be.
TRANSPORTS = ("auto", "collective", "high-priority", "peer-copy", "few-ctas", "aicpu", "pairwise", "two-level")
#: A candidate must be faster than the collective by this factor: less is noise of a short calibration.
_CLEARLY = 0.9


class TransportUnavailable(RuntimeError):
    """A transport that was asked for cannot be used here; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """Of the job: seconds to wait for a peer, bytes of a usual exchange, ranks of a node, and NCCL's CTAs."""

    timeout_s: float
    sent: int
    received: int
    nodes: Choice[int]
    """Ranks of a node; 0 with the reason where that is not known."""
    ctas: int
    """0 for the transport's own number."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    make: Callable[[str, _Needs], Transport]
    """For a device of that name."""
    missing: Callable[[str, Sequence[Any], _Needs], str]
    """What this rank's device or its groups lack; empty when nothing."""


def _peer_copy(device: str, needs: _Needs) -> Transport:
    """Landing areas with room for a quarter more than usual."""
    area = {"landing_bytes": needs.received + needs.received // 4} if needs.received else {}
    return peer_copy_transport(device, timeout_s=needs.timeout_s, **area)


def _aicpu(device: str, needs: _Needs) -> Transport:
    """Buffers with room for a quarter more than usual."""
    return hccl_aicpu_transport(-(-(needs.received + needs.received // 4) // 2**20) or DEFAULT_MIB)


def _one_level(device: str, groups: Sequence[Any], needs: _Needs) -> str:
    """Why none of the groups has two levels; a rank without groups has nothing against it."""
    size = needs.nodes.value
    if not size:
        return needs.nodes.reason
    found = [nodes_of(dist.get_process_group_ranks(group), size) for group in groups]
    if not found or any(nodes is None or nodes.two_levels for nodes, _ in found):
        return ""  # what is wrong with a group's nodes is said where it is prepared
    many = max((nodes for nodes, _ in found if nodes is not None), key=lambda nodes: nodes.count)
    only = "one node" if many.count == 1 else f"{many.count} nodes with one rank each"
    return f"no group has ranks inside and across nodes: with {size} ranks a node there is {only} ({FLAG})"


_KINDS = {
    "high-priority": _Kind(
        make=lambda _, needs: high_priority_transport(needs.ctas),
        missing=lambda device, _, needs: high_priority_missing(device, needs.ctas),
    ),
    "peer-copy": _Kind(
        make=_peer_copy,
        missing=lambda device, *_: "no copies into another NPU's memory from Python" if device == "npu" else "",
    ),
    "few-ctas": _Kind(
        make=lambda _, needs: few_ctas_transport(needs.ctas or DEFAULT_CTAS),
        missing=lambda device, *_: few_ctas_missing(device),
    ),
    "aicpu": _Kind(make=_aicpu, missing=lambda device, *_: hccl_aicpu_missing(device)),
    "pairwise": _Kind(make=lambda *_: PairwiseTransport(), missing=lambda *_: ""),
    "two-level": _Kind(make=lambda device, needs: TwoLevelTransport(needs.nodes.value), missing=_one_level),
}


def choose_transport(
    wanted: str,
    groups: Sequence[Any],
    device: Device,
    calibration: Calibration | None = None,
    *,
    bytes_to_peers: int = 0,
    timeout_s: float = 1800.0,
    node_size: int = 0,
    ctas: int = 0,
) -> Choice[Transport]:
    """The transport called ``wanted`` for these groups, announced; a call that all ranks of the job make together.

    Args:
        wanted: one of ``TRANSPORTS``.
        groups: the process groups of this rank that exchange rows.
        device: where the rows are.
        calibration: stored times for 'auto'; None measures and keeps nothing.
        bytes_to_peers: of a usual exchange, per rank; 0 for no particular size.
        timeout_s: how long a peer is waited for, where the transport itself waits.
        node_size: ranks of the job on each node; 0 asks the launcher, then the machines' names.
        ctas: how many NCCL has for an exchange of 'high-priority', at most of 'few-ctas'; 0 for their own number.

    Raises:
        ValueError: an unknown name, CTAs that the transport cannot have, nodes that the ranks do not agree on, or a
            calibration that cannot be read.
        TransportUnavailable: on all ranks, when the one that was asked for cannot be used on one of them.
    """
    if wanted not in TRANSPORTS:
        raise ValueError(f"--a2a-transport {wanted!r}: allowed are {', '.join(TRANSPORTS)}")
    obstacle = ctas_obstacle(ctas, wanted)
    if obstacle:
        raise ValueError(f"--a2a-ctas {ctas}: {obstacle}")
    if wanted == "collective":
        return Choice(CollectiveTransport(), "--a2a-transport collective")
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    world = max((dist.get_world_size(group) for group in groups), default=2)
    needs = _Needs(
        timeout_s=timeout_s,
        sent=bytes_to_peers,
        received=bytes_to_peers * world // (world - 1),
        nodes=_nodes(wanted, node_size),
        ctas=ctas,
    )
    if wanted == "auto":
        chosen = _automatic(groups, device, calibration or Calibration(), needs)
    else:
        transport, reason = _ready(wanted, groups, device, needs)
        if transport is None:
            raise TransportUnavailable(f"--a2a-transport {wanted}: {reason}; use --a2a-transport collective or auto")
        chosen = Choice(transport, f"--a2a-transport {wanted}; {reason}")
    Choice(chosen.value.name, chosen.reason).announce("AllToAll transport")
    return chosen


def _ready(name: str, groups: Sequence[Any], device: Device, needs: _Needs) -> Choice[Transport | None]:
    """The transport, prepared and checked in every group on every rank; or None and the first reason."""
    lacks = _first(_KINDS[name].missing(device.name, groups, needs))
    if lacks:
        return Choice(None, lacks)
    transport = _KINDS[name].make(device.name, needs)
    where = _where(device)
    said, failed = "", ""
    for group in groups:  # each on its own: ranks may have different groups
        prepare = getattr(transport, "prepare", None)
        good, said = prepare(group) if prepare is not None else (True, "")
        problem = self_check(transport, group, where) if good else said
        failed = failed or problem
    failed = _first(failed)
    if failed:
        close(transport)
        return Choice(None, failed)
    return Choice(transport, f"{said + ', ' if said else ''}self-check passed")


def _nodes(wanted: str, node_size: int) -> Choice[int]:
    """Ranks of a node, agreed where some transport may ask."""
    asks = wanted in ("auto", "two-level")
    return agreed_node_size(node_size, must=wanted == "two-level") if asks else Choice(0, "not asked for")


def _first(reason: str) -> str:
    """The first reason of any rank of the job: what one rank lacks no rank uses."""
    return next((text for text in gathered(reason, dist.group.WORLD) if text), "")


def _automatic(groups: Sequence[Any], device: Device, calibration: Calibration, needs: _Needs) -> Choice[Transport]:
    ready: dict[str, Transport] = {"collective": CollectiveTransport()}
    absent = []
    for name in _KINDS:
        transport, reason = _ready(name, groups, device, needs)
        if transport is None:
            absent.append(f"{name}: {reason}")
        else:
            ready[name] = transport
    if not _anywhere(groups) or len(ready) == 1:
        return Choice(ready["collective"], "; ".join(absent) or "no group has two ranks")
    table = _table(ready, groups, device, calibration, needs.nodes.value)
    best, why = _best({name: table[name] for name in ready if name in table}, needs.sent)
    for name, transport in ready.items():
        if name != best:
            close(transport)
    return Choice(ready[best], "; ".join([why, *absent]))


def _anywhere(groups: Sequence[Any]) -> bool:
    return any(gathered(bool(groups), dist.group.WORLD))


def _table(
    ready: dict[str, Transport], groups: Sequence[Any], device: Device, calibration: Calibration, node_size: int
) -> Table:
    """Rank 0's stored table if it has all of them, else a new one: the slowest of all ranks."""
    everyone = dist.group.WORLD
    nodes = max(len(set(gathered(node_name(), everyone))), dist.get_world_size() // node_size if node_size else 1)
    key, stored, error = gathered(_stored(topology(groups, device, nodes), calibration), everyone)[0]
    if error:
        raise ValueError(error)
    if stored is not None and set(ready) <= set(stored):
        return stored
    mine = measure(ready, groups[0], device, _where(device)) if groups else {}
    table = _slowest([told for told in gathered(mine, everyone) if told])
    if dist.get_rank() == 0:
        calibration.keep(key, table)
    return table


def _stored(key: str, calibration: Calibration) -> tuple[str, Table | None, str]:
    """What rank 0 has; an error is for all ranks."""
    if dist.get_rank() != 0:
        return key, None, ""
    try:
        return key, calibration.find(key), ""
    except ValueError as error:
        return key, None, str(error)


def _slowest(tables: Sequence[Table]) -> Table:
    return {
        name: {
            size: Cost(
                alone_ms=max(table[name][size].alone_ms for table in tables),
                exposed_ms=max(table[name][size].exposed_ms for table in tables),
            )
            for size in tables[0][name]
        }
        for name in tables[0]
    }


def _best(table: Table, bytes_to_peers: int) -> tuple[str, str]:
    """The fastest at the measured size next to the one that is asked for, and the figures of all."""
    sizes = sorted(table["collective"])
    size = min(sizes, key=lambda known: abs(known - bytes_to_peers)) if bytes_to_peers else sizes[-1]
    total = {name: costs[size].total_ms for name, costs in table.items()}
    fastest = min(total, key=lambda name: total[name])
    best = fastest if total[fastest] < _CLEARLY * total["collective"] else "collective"
    figures = ", ".join(
        f"{name} {costs[size].alone_ms:.3g} + {costs[size].exposed_ms:.3g} ms" for name, costs in table.items()
    )
    return best, f"{size / 2**20:.3g} MiB to the peers, alone + exposed beside a product: {figures}"


def _where(device: Device) -> torch.device:
    if device.name == "cpu":
        return device.torch_device()
    return torch.device(device.name, torch.get_device_module(device.name).current_device())


def close(transport: Transport) -> None:
    """Gives back what a transport holds, if it holds anything."""
    closing = getattr(transport, "close", None)
    if closing is not None:
        closing()
