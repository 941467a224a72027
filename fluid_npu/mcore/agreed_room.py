"""How many rows a recorded dispatch has room for, agreed by expert-parallel ranks, and whether a step needs no more.

A recording has fixed sizes. A dispatch that sends a token once to each rank that wants it is recorded with blocks of so
many rows for each rank: the most that any rank sent to any other in the calls before, and some more. Each step all
ranks find out together whether the blocks suffice: one flag, reduced over the group on the device while the dispatch
goes on. Where they do not, no rank uses what it computed, and all of them compute the step as ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import collective
from fluid_npu.device import Device, device_of
from fluid_npu.device.choice import Choice

#: Rows of a block go in units.
_UNIT = 16
#: Spare rows at the first agreement, as one part in so many, and at most: each agreement after the first doubles them.
_FIRST_SPARE, _MOST_SPARE = 32, 4
_UNKNOWN = -1
_SPIN_S = 0.05


class AgreedRoom:
    """Of one layer's dispatch.

    Args:
        peers: the expert-parallel group.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._rows: list[int] | None = None
        self._most: list[int] = []
        self._tokens: list[int] = []
        self._times = 0
        self._open = self._recorded = False
        self._answer: Tensor | None = None
        self._device: Device | None = None

    def observe(self, most: Sequence[int], tokens: Sequence[int]) -> None:
        """A dispatch as ever sent so many rows at most to a rank, and had so many tokens; of each chunk."""
        if self._tokens != list(tokens) or not self._most:
            self._most, self._tokens = list(most), list(tokens)
        self._most = [max(pair) for pair in zip(self._most, most, strict=True)]

    def settle(self, device: torch.device) -> str:
        """Agrees on the rows of a block of each chunk; why that cannot be, '' where it can. Collective."""
        told = torch.tensor([*self._most, *self._tokens, *(-t for t in self._tokens)], device=device)
        with collective("the room of a recorded dispatch", self._peers.ranks):
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._peers.group)
        most, tokens, fewest = (part.tolist() for part in told.chunk(3))
        if any(a != -b for a, b in zip(tokens, fewest, strict=True)):
            return f"ranks have different numbers of tokens ({tokens} and {[-few for few in fewest]} among them)"
        self._rows = [min(_with_spare(rows, self._times), all_of) for rows, all_of in zip(most, tokens, strict=True)]
        self._times += 1
        said = ", ".join(f"{room} for at most {rows} so far" for room, rows in zip(self._rows, most, strict=True))
        Choice(self._rows, f"agreed by the ranks: {said}").announce("rows to a rank in a recorded dispatch")
        self._most = []  # the next agreement is on what comes from now on, such as steps without enough room
        if self._answer is None:  # recordings write there; memory of the host cannot be had while they are made
            self._device = device_of(told)
            self._answer = self._device.on_host(torch.full((), _UNKNOWN, dtype=torch.int32))
        return ""

    def forget(self) -> None:
        """Nothing is agreed any more."""
        self._rows = None

    def rows_for(self, tokens: Sequence[int]) -> list[int] | None:
        """Rows of a block of each chunk that a dispatch of so many tokens is to keep to; None where it need not."""
        return self._rows if self._open and list(tokens) == self._tokens else None

    @contextmanager
    def kept_to(self, recorded: bool = False) -> Iterator[None]:
        """Dispatches keep to the agreed rows. ``recorded``: whether they suffice is asked later (``sufficed``)."""
        before = self._open, self._recorded
        self._open, self._recorded = True, recorded
        try:
            yield
        finally:
            self._open, self._recorded = before

    def suffices(self, short: Tensor) -> bool:
        """Whether no rank is ``short`` of room, a bool scalar on its device; what is recorded goes on. Collective."""
        flag = short.to(torch.int32)
        with collective("whether a dispatch has room", self._peers.ranks):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._peers.group)
        if not self._recorded:
            return not flag.item()
        assert self._answer is not None, "rows were agreed on before they are kept to"
        self._answer.copy_(flag, non_blocking=True)
        return True

    def ask(self) -> None:
        """Before a replay: the answer of the one before is not this one's."""
        if self._answer is not None:
            self._answer.fill_(_UNKNOWN)

    def sufficed(self) -> bool:
        """Whether all ranks had room in the replay that was started last. Waits for its flag, not for its end."""
        answer = self._answer
        assert answer is not None, "something was recorded, for rows that were agreed on"
        seen, until = answer.numpy(), time.perf_counter() + _SPIN_S
        while seen == _UNKNOWN:
            if time.perf_counter() > until:  # a device that failed would never answer: this raises its error
                assert self._device is not None, "there is an answer"
                self._device.synchronize()
                break
            time.sleep(0)
        return int(seen) == 0


def _with_spare(most: int, times: int) -> int:
    """Rows of a block for ``most`` rows seen, after so many agreements.

    Spare rows are sent in every step, and a step without room costs about one launched by the host, so there are few:
    what even random routing varies by, which is at most the root of the rows, and a part of them that grows where the
    routing varies more.
    """
    part = min(2**times / _FIRST_SPARE, 1 / _MOST_SPARE)
    return -(-(most + isqrt(most) + int(most * part)) // _UNIT) * _UNIT
