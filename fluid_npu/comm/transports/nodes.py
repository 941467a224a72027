"""Which ranks of a group are on one node: a number of consecutive ranks of the job, the same on every node.

Said by ``--a2a-node-size``, else by the launcher (``LOCAL_WORLD_SIZE``, which torchrun sets), else by the machines'
names. A node may also be less than a machine, or more than one: what counts is inside what the fast links reach.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from fluid_npu.comm.transports.agreement import gathered, node_name
from fluid_npu.device.choice import Choice

FLAG = "--a2a-node-size"
_LAUNCHER = "LOCAL_WORLD_SIZE"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """A group of ``count`` nodes with ``size`` ranks each: rank p of the group is on node p // size."""

    count: int
    size: int

    @property
    def two_levels(self) -> bool:
        """Whether there is something inside a node and something across."""
        return self.count > 1 and self.size > 1


def agreed_node_size(flag: int = 0, *, must: bool = True) -> Choice[int]:
    """Ranks of the job on each node, and who says so. A collective call of all ranks of the job.

    Args:
        flag: what ``--a2a-node-size`` says; 0 for nothing.
        must: False gives 0 with the reason where there is no such number and the flag does not ask for one.

    Raises:
        ValueError: on all ranks alike, when they do not agree, or the job is not so many whole nodes.
    """
    said = gathered((flag, os.environ.get(_LAUNCHER, ""), node_name()), dist.group.WORLD)
    source, sizes = _sizes(said)
    wrong = _wrong(source, sizes)
    if wrong and (must or source == FLAG):
        raise ValueError(wrong)
    return Choice(0 if wrong else sizes[0], wrong or source)


def _wrong(source: str, sizes: Sequence[int]) -> str:
    """Why these are not the nodes of a job; empty when they are."""
    world, size = len(sizes), sizes[0]
    if len(set(sizes)) > 1:
        other = next(rank for rank in range(world) if sizes[rank] != size)
        return (
            f"{source} is {size} on rank 0 and {sizes[other]} on rank {other}: "
            f"give {FLAG} with the ranks of a node, the same on every rank"
        )
    if size < 1 or world % size:
        fix = f"give {FLAG} with a divisor of {world}"
        return f"{source} is {size}: {world} ranks are not whole nodes of so many; {fix}"
    return ""


def _sizes(said: Sequence[tuple[int, str, str]]) -> tuple[str, list[int]]:
    """Where the size comes from, and what each rank has: from the first source that some rank has."""
    if any(flag for flag, _, _ in said):
        return FLAG, [flag for flag, _, _ in said]
    if any(launcher for _, launcher, _ in said):
        return _LAUNCHER, [int(launcher) if launcher.isdigit() else 0 for _, launcher, _ in said]
    names = Counter(name for _, _, name in said)
    return "the number of ranks with one machine's name", [names[name] for _, _, name in said]


def nodes_of(ranks: Sequence[int], node_size: int) -> Choice[Nodes | None]:
    """The nodes of a group of global ranks; None with the reason where they are not alike or not in a row."""
    of_rank = [rank // node_size for rank in ranks]
    counts = Counter(of_rank)
    size = max(counts.values())
    if set(counts.values()) != {size}:
        found = ", ".join(f"{count} on node {node}" for node, count in sorted(counts.items()))
        return Choice(None, f"the group of ranks {_short(ranks)} has {found}: as many on each are needed")
    if any(len(set(of_rank[at : at + size])) > 1 for at in range(0, len(ranks), size)):
        return Choice(None, f"the group of ranks {_short(ranks)} does not have the ranks of a node in a row")
    nodes = Nodes(count=len(counts), size=size)
    return Choice(nodes, f"{nodes.count} nodes of {size} ranks")


def _short(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 16 else f"{ranks[0]} to {ranks[-1]}"
