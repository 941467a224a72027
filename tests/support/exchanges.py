"""AllToAlls whose result is known: every row says who sent it, to whom, in which step and at which place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import begin

#: [source][target] rows.
Table = list[list[int]]


def tables(world: int, steps: int, seed: int, most: int = 40) -> list[Table]:
    """Random splits, the same on every rank; one in four steps has a rank that sends or gets nothing, or a hot one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        table = torch.randint(0, most, (world, world), generator=generator)
        victim = int(torch.randint(0, world, (1,), generator=generator))
        if step % 4 == 1:
            table[victim] = 0
        elif step % 4 == 2:
            table[:, victim] = 0
        elif step % 4 == 3:
            table[:, victim] *= 8
        found.append(table.tolist())
    return found


def even(world: int, rows: int) -> Table:
    """The same number of rows for every pair."""
    return [[rows] * world for _ in range(world)]


def rows_of(source: int, target: int, count: int, step: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What ``source`` sends to ``target``: ``[count, width]`` of small whole numbers, which every dtype holds."""
    place = torch.arange(count * width).view(count, width)
    return ((place * 7 + source * 3 + target * 5 + step * 11) % 127).to(dtype)


def cargo(table: Table, step: int, width: int, dtype: torch.dtype, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(source, expected) of one rank, on the CPU."""
    world = len(table)
    sent = [rows_of(index, peer, table[index][peer], step, width, dtype) for peer in range(world)]
    received = [rows_of(peer, index, table[peer][index], step, width, dtype) for peer in range(world)]
    return torch.cat(sent), torch.cat(received)


class Exchange:
    """One AllToAll of a transport, started; ``ok()`` waits and compares.

    ``lands``: into the transport's memory if that has room; ``landed`` says whether it did.
    """

    def __init__(
        self,
        transport: Any,
        group: Any,
        table: Table,
        step: int,
        *,
        width: int = 16,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        lists: bool = True,
        lands: bool = False,
    ) -> None:
        index = dist.get_rank(group)
        source, self.expected = cargo(table, step, width, dtype, index)
        self.source = source.to(device)
        self.landing = transport.land(self.source, table, group) if lands else None
        self.landed = self.landing is not None
        if self.landing is not None:
            self.work, self.output = self.landing, self.landing.rows
            return
        self.output = torch.full_like(self.expected, 99, device=device)
        incoming, outgoing = [row[index] for row in table], table[index]
        splits: tuple[Any, Any] = (incoming, outgoing) if lists else (None, None)
        self.work = begin(transport, self.output, self.source, splits, group, table if lists else None)

    def ok(self) -> bool:
        """Whether every byte is right; gives the transport its memory back."""
        self.work.wait()
        got = self.output.clone()
        if self.landing is not None:
            self.landing.release()
        return torch.equal(got.cpu(), self.expected)
