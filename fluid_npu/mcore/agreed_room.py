"""How many rows a recorded dispatch has room for, agreed by expert-parallel ranks, and whether a step needs no more.

A recording has fixed sizes. A dispatch that sends a token once to each rank that wants it is recorded with blocks of so
many rows for each rank: the most that any rank sent to any other in the calls before, and some more. Each step all
ranks find out together whether the blocks suffice: one flag, reduced over the group on the device while the dispatch
goes on. Where they do not, no rank uses what it computed, and all of them compute the step as ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import collective, rank_names
from fluid_npu.device import Device, device_of
from fluid_npu.device.choice import Choice
from fluid_npu.mcore.store_round import answers_of_all

#: Rows of a block go in units.
_UNIT = 16
#: Spare rows at the first agreement, as one part in so many, and at most: each agreement after the first doubles them.
_FIRST_SPARE, _MOST_SPARE = 32, 4
_UNKNOWN = -1
_SPIN_S, _TIMEOUT_S = 0.05, 300.0


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
        self._open = self._told = False
        self._answer: Tensor | None = None
        self._device: Device | None = None

    def observe(self, most: Sequence[int], tokens: Sequence[int]) -> None:
        """A dispatch as ever sent so many rows at most to a rank, and had so many tokens; of each chunk."""
        if self._tokens != list(tokens) or not self._most:
            self._most, self._tokens = list(most), list(tokens)
        self._most = [max(pair) for pair in zip(self._most, most, strict=True)]

    def settle(self, x: Tensor) -> str:
        """Agrees on the rows of a block of each chunk; why that cannot be, '' where it can. ``x`` is on the device.

        Raises RuntimeError, naming them, where ranks did not come to agree in time.
        """
        told = self._told_by_all()
        tokens = {rank: of_rank["tokens"] for rank, of_rank in told.items()}
        if any(of_rank != self._tokens for of_rank in tokens.values()):
            return f"ranks have different numbers of tokens: {', '.join(f'rank {r} {t}' for r, t in tokens.items())}"
        most = [max(of_chunk) for of_chunk in zip(*(of_rank["most"] for of_rank in told.values()), strict=True)]
        spared = [_with_spare(rows, self._times) for rows in most]
        self._rows = [min(pair) for pair in zip(spared, self._tokens, strict=True)]
        self._times += 1
        said = ", ".join(f"{room} for at most {rows} so far" for room, rows in zip(self._rows, most, strict=True))
        Choice(self._rows, f"agreed by the ranks: {said}").announce("rows to a rank in a recorded dispatch")
        self._most = []  # the next agreement is on what comes from now on, such as steps without enough room
        if self._answer is None:  # recordings write there; memory of the host cannot be had while they are made
            self._device = device_of(x)
            self._answer = self._device.on_host(torch.full((), _UNKNOWN, dtype=torch.int32))
        return ""

    def _told_by_all(self) -> dict[int, dict[str, list[int]]]:
        """Most rows and tokens of each chunk, of each rank."""
        mine = json.dumps({"most": self._most, "tokens": self._tokens})
        answers = answers_of_all(self._peers, "room", mine, _TIMEOUT_S)
        missing = [rank for rank, answer in answers.items() if answer is None]
        if missing:
            me = self._peers.ranks[self._peers.index]
            raise RuntimeError(
                f"rank {me} agrees on sizes to record a layer with, but {rank_names(missing)} did not come to it in "
                f"{_TIMEOUT_S:.0f} s; do without recording (cuda_graph=False) and compare what the ranks compute"
            )
        return {rank: json.loads(answer) for rank, answer in answers.items() if answer is not None}

    def forget(self) -> None:
        """Nothing is agreed any more."""
        self._rows = None

    def rows_for(self, tokens: Sequence[int]) -> list[int] | None:
        """Rows of a block of each chunk that a dispatch of so many tokens is to keep to; None where it need not."""
        return self._rows if self._open and list(tokens) == self._tokens else None

    @contextmanager
    def kept_to(self) -> Iterator[None]:
        """Dispatches keep to the agreed rows, if there are any; ``sufficed`` says afterwards whether that was right."""
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before

    def tell(self, told_CN: Tensor) -> None:
        """Lets all ranks know whether this one is short of room: int32 on its device, 1 in column 0 where a chunk is.

        Collective.

        The dispatch goes on whatever comes of it: so a rank that replays and one that does not exchange the same.
        """
        flag = told_CN[:, 0].amax()
        with collective("whether a dispatch has room", self._peers.ranks):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._peers.group)
        assert self._answer is not None, "rows were agreed on before they are kept to"
        self._answer.copy_(flag, non_blocking=True)
        self._told = True

    def ask(self, replay: bool) -> None:
        """Before a forward: the answer of the one before is not this one's. A ``replay`` tells without a call."""
        self._told = replay
        if self._answer is not None:
            self._answer.fill_(_UNKNOWN)

    def sufficed(self) -> bool:
        """Whether all ranks had room in the forward that was started last. Waits for its flag, not for its end."""
        if not self._told:  # it kept to nothing
            return True
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
