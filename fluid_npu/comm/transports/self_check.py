"""A small exchange of known bytes: a transport that does not give them back is not used.

Every entry says who sent it, to whom and in which step, so a block in the wrong place, an old one or a piece of another
exchange is seen. The exchanges are even, uneven, with ranks that send or get nothing, and several under way at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.guard import one_line
from fluid_npu.comm.transports.agreement import gathered
from fluid_npu.comm.transports.base import PendingWork, Transport, begin

_WIDTH = 64
_ROUNDS = 12
_LIMIT_S = 30.0


def self_check(transport: Transport, group: Any, where: torch.device) -> str:
    """Why the transport cannot be used in the group, the same on all ranks; empty when it can. A collective call."""
    limited = getattr(transport, "time_limit", None)
    with limited(_LIMIT_S) if limited is not None else nullcontext():
        try:
            error = _exchange(transport, group, where)
        except RuntimeError as failure:
            error = one_line(str(failure))
    wrong = [(rank, text) for rank, text in enumerate(gathered(error, group)) if text]
    return f"self-check on rank {wrong[0][0]} of the group: {wrong[0][1]}" if wrong else ""


def _exchange(transport: Transport, group: Any, where: torch.device) -> str:
    """All of them in any case: a rank that stopped early would let the others wait."""
    world, own = dist.get_world_size(group), dist.get_rank(group)
    error = ""
    under_way: list[tuple[int, PendingWork, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for step in range(_ROUNDS):
        table = [[_rows(step, rank, peer, world) for peer in range(world)] for rank in range(world)]
        to_peers, from_peers = table[own], [row[own] for row in table]
        source = torch.cat([_block(step, own, peer, rows) for peer, rows in enumerate(to_peers)]).to(where)
        expected = torch.cat([_block(step, peer, own, rows) for peer, rows in enumerate(from_peers)])
        output = torch.full_like(expected, -1, device=where)
        work = begin(transport, output, source, (from_peers, to_peers), group, table)
        under_way.append((step, work, source, output, expected))
        if step % 3 == 2:
            for number, pending, _, got, wanted in under_way:
                pending.wait()
                if not error and not torch.equal(got.cpu(), wanted):
                    error = f"wrong data in exchange {number}"
            under_way.clear()
    return error


def _rows(step: int, source: int, target: int, world: int) -> int:
    """Even in every fourth step; else uneven, and every fourth step one rank sends nothing and one gets nothing."""
    if step % 4 == 0:
        return 8 * (step + 1)
    if step % 4 == 1 and (source == step % world or target == (step + 1) % world):
        return 0
    return (source * 7 + target * 5 + step * 3) % 17 + (40 * step if target == step % world else 0)


def _block(step: int, source: int, target: int, rows: int) -> torch.Tensor:
    place = torch.arange(rows * _WIDTH, dtype=torch.int32).view(rows, _WIDTH)
    return place + (step * 64 + source) * 1_000_003 + target * 7919
