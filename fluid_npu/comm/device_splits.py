"""AllToAll of rows whose numbers are on the device alone: ``device.kernels.triton_device_splits`` over windows.

No user can ask for it yet: it has run in Triton's interpreter and not on a GPU. It is no ``Transport`` either, whose
splits are on the host: what arrives is an area with room for ``capacity`` rows and a table of how many there are.

    arrival = splits.start(rows, counts_P)      # two kernels on a stream of its own
    ...
    arrival.wait()                              # the current stream: what is issued next reads rows and table
    ...
    arrival.release()                           # before the exchange after the next is started

``arrival.state()`` waits for the device: FINE; OVERFLOW, then no rank has got any row and all know, so all may exchange
the same rows by another transport; or LOST, a peer that did not come within the time limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.transports.peer_cuda import symmetric_buffers
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.triton_support import load, triton_on

_LOOKS_A_SECOND = 1_000_000
_MOST_LOOKS = 2**31 - 1


class DeviceSplits:
    """The windows of one group.

    Args:
        windows: uint8 of each rank as this one sees them, of ``SplitsWindow.bytes_of`` bytes, flags zero.
        index: this rank.
        capacity: rows of an area.
        row_shape, dtype: of a row; a multiple of 8 bytes.
        programs: of the kernel that moves rows: about as many multiprocessors are taken from what runs beside it.
        timeout_s: about how long a peer is waited for.
        name, ranks: by which records know the group, and its ranks in the job.
    """

    def __init__(
        self,
        windows: Sequence[Tensor],
        index: int,
        *,
        capacity: int,
        row_shape: Sequence[int],
        dtype: torch.dtype,
        programs: int = 8,
        timeout_s: float = 60.0,
        name: str = "device splits",
        ranks: Sequence[int] = (),
    ) -> None:
        self._kernels: Any = load("triton_device_splits")
        device = windows[index].device
        self._windows = list(windows)
        self._shape, self._dtype, self._programs = tuple(row_shape), dtype, programs
        self._window = self._kernels.SplitsWindow(
            bases_P=torch.tensor([window.data_ptr() for window in windows], dtype=torch.int64, device=device),
            index=index,
            world=len(windows),
            capacity=capacity,
            row_bytes=row_bytes(row_shape, dtype),
            name=name,
            ranks=tuple(ranks),
        )
        self._spins = min(int(timeout_s * _LOOKS_A_SECOND), _MOST_LOOKS)
        self._number, self._done = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        self._stream = torch.cuda.Stream(device=device, priority=-1)
        self._started = 0

    def start(self, rows: Tensor, counts_P: Tensor) -> DeviceArrival:
        """Starts an exchange of contiguous rows, ordered by target; ``counts_P``: int64 on the device, for each rank.

        Rows behind the sum of the counts are not sent. All must stay as they are until ``wait()``.
        """
        current = torch.cuda.current_stream(rows.device)
        ticket = torch.zeros(2, dtype=torch.int32, device=rows.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._kernels.tell(self._window, counts_P, self._number, ticket, self._spins)
            self._kernels.send(self._window, rows, ticket, self._done, self._spins, self._programs)
            sent = self._stream.record_event()
        area = self._started % self._kernels.AREAS
        self._started += 1
        return DeviceArrival(self, ticket, sent, *self._views(area), kept=(rows, counts_P))

    def _views(self, area: int) -> tuple[Tensor, Tensor]:
        """Of an area, ``[capacity, ...]`` rows and the ``[P, P]`` table."""
        window, memory = self._window, self._windows[self._window.index]
        size, of_table = window.capacity * window.row_bytes, window.world**2 * 8
        rows = memory[window.areas_at + area * size :][:size].view(self._dtype).view(window.capacity, *self._shape)
        table = memory[window.table_at + area * of_table :][:of_table].view(torch.int64)
        return rows, table.view(window.world, window.world)

    def wait(self, ticket: Tensor) -> None:
        """The current stream goes on when all ranks have written their rows."""
        self._kernels.await_(self._window, ticket, self._spins)

    def release(self, ticket: Tensor) -> None:
        """Tells all ranks that the area is not read any more by what the current stream was given so far."""
        self._kernels.release(self._window, ticket)


class DeviceArrival:
    """One exchange. ``rows`` are ``[capacity, ...]``, by source, of which ``table[:, index].sum()`` are there."""

    def __init__(
        self, splits: DeviceSplits, ticket: Tensor, sent: Any, rows: Tensor, table: Tensor, kept: tuple[Tensor, ...]
    ) -> None:
        self.rows = rows
        self.table = table
        self._splits, self._ticket, self._sent, self._kept = splits, ticket, sent, kept

    def wait(self) -> None:
        """What is issued next on the current stream may read rows and table, and write what was sent."""
        self._sent.wait()
        self._splits.wait(self._ticket)
        self._kept = ()

    def release(self) -> None:
        """What is issued next on the current stream reads neither."""
        self._splits.release(self._ticket)

    def state(self) -> int:
        """After ``wait()``, of the device: FINE, OVERFLOW or LOST - rank. The host waits for the current stream."""
        return int(self._ticket[1])


def row_bytes(row_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a row. Raises ValueError where the kernels cannot move it."""
    size = torch.Size(row_shape).numel() * dtype.itemsize
    if not size or size % 8:
        raise ValueError(f"row_shape={tuple(row_shape)} of {dtype}: {size} bytes are no multiple of 8; pad the rows")
    return size


def open_device_splits(
    group: Any, *, capacity: int, row_shape: Sequence[int], dtype: torch.dtype, **more: Any
) -> Choice[DeviceSplits | None]:
    """For the CUDA ranks of a group on one node; a collective call. ``more``: arguments of ``DeviceSplits``."""
    usable = triton_on(torch.device("cuda", torch.cuda.current_device()))
    if not usable.value:
        return Choice(None, usable.reason)
    world, index = dist.get_world_size(group), dist.get_rank(group)
    size, of_row = load("triton_device_splits").SplitsWindow.bytes_of, row_bytes(row_shape, dtype)
    windows, reason = symmetric_buffers(group, size(world, capacity, of_row), zeroed=size(world, 0, of_row))
    if windows is None:
        return Choice(None, reason)
    known: dict[str, Any] = {"name": f"group {group.group_name}", "ranks": dist.get_process_group_ranks(group)}
    splits = DeviceSplits(windows, index, capacity=capacity, row_shape=row_shape, dtype=dtype, **known, **more)
    return Choice(splits, reason)
