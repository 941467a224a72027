"""How many rows a recorded dispatch has room for, agreed by expert-parallel ranks, and whether a step needs no more.

A recording has fixed sizes. A dispatch that sends a token once to each rank that wants it is recorded with blocks of so
many rows for each rank, and buffers of so many rows of experts: the most that any rank sent to any other and that any
received in the calls before, and some more. Each step all ranks find out together whether that suffices: a few numbers,
summed over the group on the device while the dispatch goes on. Where it does not, no rank uses what it computed, and
all of them compute the step as ever.

P ranks, C chunks of a dispatch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

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
#: Spare rows at the first agreement, in standard deviations.
_DEVIATIONS = 3.0
#: Spare rows at the second agreement, as one part in so many, and at most: each agreement after it doubles them.
_FIRST_SPARE, _MOST_SPARE = 32, 4
_UNKNOWN = -1
_SPIN_S, _TIMEOUT_S = 0.05, 300.0


@dataclass(frozen=True)
class AgreedRows:
    """What a dispatch keeps to, of each chunk."""

    rows: list[list[list[int]]]
    """``[C][P][P]``: of the block from each rank to each."""
    pairs: list[int]
    """Of experts on a rank, one for each (token, expert) that it gets; perhaps more than all blocks can ask for."""


class AgreedRoom:
    """Of one layer's dispatch.

    Args:
        peers: the expert-parallel group.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._agreed: AgreedRows | None = None
        self._most: list[list[int]] = []
        self._pairs: list[int] = []
        self._tokens: list[int] = []
        self._times = 0
        self._open = self._told = False
        self._answer: Tensor | None = None
        self._device: Device | None = None
        self._until_told: Callable[[], None] = _nothing

    def observe(self, sent: Sequence[Sequence[int]], tokens: Sequence[int], pairs: Sequence[int]) -> None:
        """A dispatch as ever sent so many rows to each rank, had so many tokens, and brought so many rows of experts
        here; of each chunk."""
        if self._tokens != list(tokens) or not self._most:
            self._most, self._tokens, self._pairs = [list(rows) for rows in sent], list(tokens), list(pairs)
        self._most = [
            [max(seen) for seen in zip(before, rows, strict=True)]
            for before, rows in zip(self._most, sent, strict=True)
        ]
        self._pairs = [max(seen) for seen in zip(self._pairs, pairs, strict=True)]

    def settle(self, x: Tensor) -> str:
        """Agrees on the rows of each chunk; why that cannot be, '' where it can. ``x`` is on the device.

        Raises RuntimeError, naming them, where ranks did not come to agree in time.
        """
        told = self._told_by_all()
        tokens = {rank: of_rank["tokens"] for rank, of_rank in told.items()}
        if any(of_rank != self._tokens for of_rank in tokens.values()):
            return f"ranks have different numbers of tokens: {', '.join(f'rank {r} {t}' for r, t in tokens.items())}"
        most_CPP = [[of_rank["most"][chunk] for of_rank in told.values()] for chunk in range(len(self._tokens))]
        rows = [
            [[_with_spare(most, self._times, of) for most in of_rank] for of_rank in _at_least_usual(most_PP)]
            for most_PP, of in zip(most_CPP, self._tokens, strict=True)
        ]
        pairs = [max(seen) for seen in zip(*(of_rank["pairs"] for of_rank in told.values()), strict=True)]
        self._agreed = AgreedRows(rows, [_with_spare(number, self._times) for number in pairs])
        self._times += 1
        sent = [(_most_of(room), _most_of(seen)) for room, seen in zip(rows, most_CPP, strict=True)]
        brought = list(zip(self._agreed.pairs, pairs, strict=True))
        for what, sizes in (("rows to a rank", sent), ("rows of experts", brought)):
            said = ", ".join(f"{room} for at most {seen} so far" for room, seen in sizes)
            Choice([room for room, _ in sizes], f"agreed by the ranks: {said}").announce(f"{what} when recorded")
        self._most = []  # the next agreement is on what comes from now on, such as steps without enough room
        shape = len(rows), 1 + len(self._peers.ranks)
        if self._answer is None or self._answer.shape != shape:
            # Recordings write there; memory of the host cannot be had while they are made.
            self._device = device_of(x)
            self._answer = self._device.on_host(torch.full(shape, _UNKNOWN, dtype=torch.int32))
        return ""

    def _told_by_all(self) -> dict[int, dict[str, Any]]:
        """Most rows, tokens and rows of experts of each chunk, of each rank."""
        mine = json.dumps({"most": self._most, "tokens": self._tokens, "pairs": self._pairs})
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
        self._agreed = None

    def rows_for(self, tokens: Sequence[int]) -> AgreedRows | None:
        """What a dispatch of so many tokens, of each chunk, is to keep to; None where it need not."""
        return self._agreed if self._open and list(tokens) == self._tokens else None

    @contextmanager
    def kept_to(self) -> Iterator[None]:
        """Dispatches keep to the agreed rows, if there are any; ``sufficed`` says afterwards whether that was right."""
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before
            self._until_told()
            self._until_told = _nothing

    def tell(self, told_CN: Tensor) -> None:
        """Lets all ranks know what this one sends, beside what follows. Collective; the tensor is used up.

        Of each chunk, int32 [C, 1 + P] on its device: whether its blocks are too few, and how many (token, expert) are
        for each rank (``ops.once_bounded``). Summed over ranks they say what each rank gets, and all decide alike.
        The dispatch goes on whatever comes of it: so a rank that replays and one that does not exchange the same.
        """
        answer = self._answer
        assert answer is not None, "rows were agreed on before they are kept to"

        def reduce() -> None:
            with collective("whether a dispatch has room", self._peers.ranks):
                dist.all_reduce(told_CN, group=self._peers.group)
            answer.copy_(told_CN, non_blocking=True)

        # On the stream of what is computed the dispatch would wait until the slowest rank is here.
        rejoin = device_of(told_CN).aside(reduce)

        def until_told(_alive: Tensor = told_CN) -> None:
            rejoin()

        self._until_told, self._told = until_told, True

    def ask(self, replay: bool) -> None:
        """Before a forward: the answer of the one before is not this one's. A ``replay`` tells without a call."""
        self._told = replay
        if self._answer is not None:
            self._answer.fill_(_UNKNOWN)

    def sufficed(self) -> bool:
        """Whether all ranks had room in the forward that was started last. Waits for the answer, not for its end."""
        if not self._told:  # it kept to nothing
            return True
        answer, agreed = self._answer, self._agreed
        assert answer is not None and agreed is not None, "something was recorded, for rows that were agreed on"
        seen_CN, until = answer.numpy(), time.perf_counter() + _SPIN_S
        while (seen_CN == _UNKNOWN).any():  # of a few numbers that are written in whatever order
            if time.perf_counter() > until:  # a device that failed would never answer: this raises its error
                assert self._device is not None, "there is an answer"
                self._device.synchronize()
                break
            time.sleep(0)
        return not seen_CN[:, 0].any() and bool((seen_CN[:, 1:].max(1) <= agreed.pairs).all())


def _nothing() -> None:
    """Nobody is being told anything."""


def _most_of(rows_PP: Sequence[Sequence[int]]) -> int:
    return max(map(max, rows_PP))


def _at_least_usual(most_PP: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same, but no fewer than the mean of those that are not 0.

    A few calls say much about what is usual for all pairs of ranks together, and little about a single one.
    """
    sent = [most for of_rank in most_PP for most in of_rank if most]
    usual = ceil(sum(sent) / len(sent)) if sent else 0
    return [[max(most, usual) if most else 0 for most in of_rank] for of_rank in most_PP]


def _with_spare(most: int, times: int, of: int | None = None) -> int:
    """Rows to have room for where ``most`` were seen, ``of`` so many that there can be, after so many agreements.

    Spare rows are sent in every step, and a step without room costs about one launched by the host, so there are few.
    A first agreement is on the most of several steps: it adds three standard deviations of a binomial number,
    sqrt(n p (1 - p)), which even random routing varies by: one step in some hundreds lacks room then. A thirty-second
    besides was 3 % of each step that waits for its link, on H200, mostly for nothing. Later agreements come after steps
    that lacked room: they add a part of the rows that grows where the routing goes on to vary more.
    """
    varies = sqrt(most * (1 - most / of)) if of else sqrt(most)
    part = min(2 ** (times - 1) / _FIRST_SPARE, 1 / _MOST_SPARE) if times else 0.0
    room = max(_UNIT, -(-(most + ceil(_DEVIATIONS * varies) + int(most * part)) // _UNIT) * _UNIT)
    return room if of is None else min(room, of)
