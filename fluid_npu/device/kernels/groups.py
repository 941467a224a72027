"""The rows of each group, on the host for shapes and on the device for operators, without a copy for every call.

A tensor made from host numbers waits for a copy to the device. Counts usually come from the device, so their running
total is summed there, once for all grouped matmuls of a layer. ``DeviceRows`` are never asked for on the host at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor


class GroupRows(list[int]):
    """[L] rows of each group as host integers, never changed afterwards; knows the same numbers on the device.

    Args:
        counts: rows of each group.
        on_device: the same numbers as an integer tensor [L]; None where only the host knows them.
        ends: their running total as int64 [L], where it is there already.
    """

    def __init__(self, counts: Iterable[int], on_device: Tensor | None = None, ends: Tensor | None = None) -> None:
        super().__init__(counts)
        self._on_device = on_device
        #: Whether all groups have as many rows.
        self.equal = len(set(self)) == 1
        self._ends: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._kept: dict[Any, Tensor] = {}
        if ends is not None:
            self._ends[ends.device, ends.dtype] = ends

    def ends(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[L]: where each group ends. Copied from the host at most once for each device and dtype."""
        known = self._ends.get((device, dtype))
        if known is None:
            known = self._ends[device, dtype] = self._sum(device, dtype)
        return known

    def kept(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` derives from these counts, made at most once for each ``name``."""
        known = self._kept.get(name)
        if known is None:
            known = self._kept[name] = make()
        return known

    def _sum(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        for (where, _), ends in self._ends.items():
            if where == device:
                return ends.to(dtype)
        if self._on_device is not None and self._on_device.device == device:
            return self._on_device.cumsum(0, dtype=dtype)
        return _copied(self, device, dtype)


class DeviceRows:
    """[L] rows of each group that only the device knows, in buffers with room for more.

    The rows of all groups lie at the front of a buffer of ``capacity`` rows; what is behind them is memory that nobody
    wrote, and no result may depend on it. Made before the rows arrive, ``settle``d when they have.

    Args:
        groups: L.
        capacity: rows that there is room for.
        expected: rows under even routing, for what needs a number on the host such as a choice between kernels.
    """

    def __init__(self, groups: int, capacity: int, expected: int) -> None:
        self.capacity = capacity
        self.expected = expected
        self._groups = groups
        self._ends: dict[torch.dtype, Tensor] = {}
        self._kept: dict[Any, Tensor] = {}
        self._host: GroupRows | None = None

    def __len__(self) -> int:
        return self._groups

    def settle(self, ends_L: Tensor) -> None:
        """The running total, an integer tensor [L] on the device of the rows."""
        self._ends, self._kept, self._host = {ends_L.dtype: ends_L}, {}, None

    def ends(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[L]: where each group ends. Raises RuntimeError before the rows have arrived."""
        if not self._ends:
            raise RuntimeError("the rows of the experts are not known before the dispatch has arrived: wait for it")
        if dtype not in self._ends:
            self._ends[dtype] = next(iter(self._ends.values())).to(dtype)
        return self._ends[dtype].to(device)

    def kept(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` derives from these counts, made at most once for each ``name``."""
        known = self._kept.get(name)
        if known is None:
            known = self._kept[name] = make()
        return known

    def on_host(self) -> GroupRows:
        """The same as host integers: the first call waits for the device."""
        if self._host is None:
            ends = next(iter(self._ends.values()))
            self._host = GroupRows(torch.diff(ends, prepend=ends.new_zeros(1)).tolist(), ends=ends)
        return self._host

    def among(self, first: int, groups: int) -> DeviceRows:
        """The same rows as those of so many groups, of which these are the ones from ``first`` on."""
        return self if groups == self._groups else _Among(self, first, groups)


class _Among(DeviceRows):
    """Some groups' rows among those of all; known as soon as they are."""

    def __init__(self, some: DeviceRows, first: int, groups: int) -> None:
        super().__init__(groups, some.capacity, some.expected)
        self._some, self._first = some, first

    def ends(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[L]: where each group ends; those without rows end where the one before does."""
        if not self._ends:
            some = self._some.ends(device, dtype)
            after = some[-1:].expand(len(self) - self._first - len(self._some))
            self.settle(torch.cat([some.new_zeros(self._first), some, after]))
        return super().ends(device, dtype)

    def on_host(self) -> GroupRows:
        """The same as host integers."""
        if self._host is None:
            some = self._some.on_host()
            self._host = GroupRows([*[0] * self._first, *some, *[0] * (len(self) - self._first - len(some))])
        return self._host


#: Rows of each group: host integers (``GroupRows`` or bare ones), or what only the device knows.
Groups: TypeAlias = Sequence[int] | DeviceRows


def rows_in(counts_L: Groups, x: Tensor) -> int:
    """Rows of x that belong to a group; of ``DeviceRows`` as many as are expected."""
    return counts_L.expected if isinstance(counts_L, DeviceRows) else x.shape[0]


def ends_of(counts_L: Groups, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[L]: where each group ends, on ``device``; of bare integers a copy from the host, of one of them none."""
    if isinstance(counts_L, GroupRows | DeviceRows):
        return counts_L.ends(device, dtype)
    return _copied(counts_L, device, dtype)


def _copied(counts_L: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    if len(counts_L) == 1:
        # Filled by the device itself: the host waits for the end of a copy, and so for all before it.
        return torch.full((1,), counts_L[0], dtype=dtype, device=device)
    return torch.tensor(list(accumulate(counts_L)), dtype=dtype, device=device)
