"""Several ranks' windows in one process, and their kernels one after the other: on a CPU in Triton's interpreter.

Everything here imports Triton, which must know by then whether it is to interpret.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluid_npu.device.kernels import triton_device_splits as kernels
from tests.support.exchanges import Table, cargo

_SPINS = 20


class Ranks:
    """``world`` ranks with areas of ``capacity`` rows of ``width`` int64 columns."""

    def __init__(self, world: int, capacity: int, width: int, device: str) -> None:
        size = kernels.SplitsWindow.bytes_of(world, capacity, width * 8)
        self.memory = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(world)]
        bases = torch.tensor([memory.data_ptr() for memory in self.memory], dtype=torch.int64, device=device)
        self.windows = [
            kernels.SplitsWindow(bases_P=bases, index=index, world=world, capacity=capacity, row_bytes=width * 8)
            for index in range(world)
        ]
        self.world, self.capacity, self.width, self.device = world, capacity, width, device
        self.number = [self._ints(1) for _ in range(world)]
        self.done = [self._ints(1) for _ in range(world)]

    def _ints(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def start(self, table: Table, step: int, silent: int | None = None) -> list[Tensor]:
        """All tickets; ``silent`` is a rank that does not take part."""
        tickets = [self._ints(2) for _ in range(self.world)]
        awake = [rank for rank in range(self.world) if rank != silent]
        for rank in awake:
            counts = torch.tensor(table[rank], device=self.device)
            kernels.tell(self.windows[rank], counts, self.number[rank], tickets[rank], _SPINS)
        for rank in awake:
            rows = cargo(table, step, self.width, torch.int64, rank)[0].to(self.device)
            kernels.send(self.windows[rank], rows, tickets[rank], self.done[rank], _SPINS, programs=3)
        return tickets

    def wait(self, tickets: list[Tensor]) -> list[int]:
        """The states of all ranks."""
        for rank, ticket in enumerate(tickets):
            kernels.await_(self.windows[rank], ticket, _SPINS)
        return [int(ticket[1]) for ticket in tickets]

    def release(self, tickets: list[Tensor]) -> None:
        for rank, ticket in enumerate(tickets):
            kernels.release(self.windows[rank], ticket)

    def area(self, rank: int, number: int) -> Tensor:
        """[capacity, width] of that exchange's area."""
        size = self.capacity * self.width * 8
        start = self.windows[rank].areas_at + number % 2 * size
        return self.memory[rank][start : start + size].view(torch.int64).view(self.capacity, self.width)

    def table(self, rank: int, number: int) -> list[list[int]]:
        size = self.world * self.world * 8
        start = self.windows[rank].table_at + number % 2 * size
        return self.memory[rank][start : start + size].view(torch.int64).view(self.world, self.world).tolist()
