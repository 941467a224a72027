"""What hidden, exposed, transfer and peer wait mean: one place, for ``train``, Megatron-LM's loop and every bench.

    hidden_ms        T(serialised twin) - T(overlapped); the twin is the same step, each asynchronous call waited for
                     at once
    transfer         of an AllToAll: it starts when the last rank has arrived, so it is the shortest flight of any
                     rank, in the twin, where a flight is from launch to completion
    peer wait        what the first rank to arrive waited longer than that
    beside           compute that the graph lets run between launch and use; each millisecond counts for one AllToAll:
                     of those in a pipeline, which share pieces, the first launched takes what it needs
    coverable        min(transfer, beside) on each rank, mean over ranks
    hidden_fraction  hidden_ms / sum of coverable; None where the transfer with something beside is under 5 spreads

docs/BENCHMARKS.md says the same to users. Standard library only; all times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean, median
from typing import Any

#: A transfer under so many spreads cannot be told from noise.
CLEAR_SPREADS = 5.0
#: Parts and their whole may differ by so much, and two runs by less than it.
TOLERANCE = 0.10


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One AllToAll of one step, as one rank saw it.

    ``flight_ms`` from launch to completion, ``wait_ms`` the part of it spent in the wait. ``beside`` are (name, ms) of
    what ran, or in the twin could have run, in its flight. ``ranks`` are those of its group.
    """

    name: str
    ranks: tuple[int, ...]
    bytes_to_peers: int
    flight_ms: float
    wait_ms: float
    beside: tuple[tuple[str, float], ...] = ()
    at_once: bool = False
    pieces: tuple[int, ...] = ()
    """Which piece of the step each entry of ``beside`` is: exchanges of a pipeline share some. Empty: all its own."""
    pipeline: str = ""
    """The pipeline that it is part of."""
    start_ms: float = 0.0
    until_ms: float = 0.0
    """From the step's begin to its launch, and until it and all beside it are done."""
    group: Any = field(default=None, compare=False, repr=False)
    """The process group, where the ranks are; it does not travel to others."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    @property
    def beside_ms(self) -> float:
        """Of all that ran beside."""
        return sum(ms for _, ms in self.beside)

    @property
    def region_ms(self) -> float:
        """From the launch until both the exchange and what is beside it are done."""
        return self.flight_ms + (self.beside_ms if self.at_once else 0.0)


def region_ms(exchanges: Sequence[Exchange]) -> float:
    """Of one exchange its own region; of those of a pipeline, whose regions overlap, from the first to the last."""
    if len(exchanges) == 1:
        return exchanges[0].region_ms
    return max(one.until_ms for one in exchanges) - min(one.start_ms for one in exchanges)


#: The exchanges of one step on every rank, each rank's in the order of its launches.
EveryRank = Sequence[Sequence[Exchange]]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a step's AllToAlls take and how much of it something could cover."""

    transfer_ms: float = 0.0
    with_beside_ms: float = 0.0
    beside_ms: float = 0.0
    coverable_ms: float = 0.0
    peer_wait_ms: float = 0.0


def transfers(twin: EveryRank) -> list[list[float]]:
    """The transfer of each exchange of each rank: the shortest flight of any rank of its group."""
    shortest: dict[tuple[tuple[int, ...], int], float] = {}
    keys = [_keys(exchanges) for exchanges in twin]
    for exchanges, named in zip(twin, keys, strict=True):
        for exchange, key in zip(exchanges, named, strict=True):
            shortest[key] = min(exchange.flight_ms, shortest.get(key, exchange.flight_ms))
    return [[shortest[key] for key in named] for named in keys]


def coverables(exchanges: Sequence[Exchange], transfer_ms: Sequence[float]) -> list[float]:
    """What of each exchange of one rank's step the compute beside it could cover."""
    left: dict[int, float] = {}
    found = []
    for exchange, room in zip(exchanges, transfer_ms, strict=True):
        if not exchange.pieces:
            found.append(min(exchange.beside_ms, room))
            continue
        covered = 0.0
        for piece, (_, ms) in zip(exchange.pieces, exchange.beside, strict=True):
            taken = min(left.get(piece, ms), room - covered)
            left[piece] = left.get(piece, ms) - taken
            covered += taken
        found.append(covered)
    return found


def pieces_beside(exchanges: Sequence[Exchange]) -> list[tuple[str, float]]:
    """Name and milliseconds of all that ran beside some of one rank's exchanges, each piece once."""
    found: dict[Any, tuple[str, float]] = {}
    for number, exchange in enumerate(exchanges):
        own = exchange.pieces or [(number, place) for place in range(len(exchange.beside))]
        found.update(zip(own, exchange.beside, strict=True))
    return list(found.values())


def coverage(twin: EveryRank) -> Coverage:
    """Sums over the AllToAlls of a step of the serialised twin, mean over ranks."""
    transfer = transfers(twin)
    pairs = [list(zip(one, ms, strict=True)) for one, ms in zip(twin, transfer, strict=True)]
    return Coverage(
        transfer_ms=fmean(sum(ms for _, ms in rank) for rank in pairs),
        with_beside_ms=fmean(sum(ms for exchange, ms in rank if exchange.beside) for rank in pairs),
        beside_ms=fmean(sum(ms for _, ms in pieces_beside(rank)) for rank in twin),
        coverable_ms=fmean(sum(coverables(one, ms)) for one, ms in zip(twin, transfer, strict=True)),
        peer_wait_ms=fmean(sum(exchange.flight_ms - ms for exchange, ms in rank) for rank in pairs),
    )


def median_coverage(found: Sequence[Coverage]) -> Coverage:
    """Figure by figure over some steps."""
    return Coverage(**{item.name: median(getattr(one, item.name) for one in found) for item in fields(Coverage)})


def peer_wait(flights_ms: Sequence[float]) -> float:
    """What the first rank to arrive waited for the last, from the flights of all ranks of one exchange."""
    return max(flights_ms) - min(flights_ms)


def exposed(wait_ms: float, transfer_ms: float) -> float:
    """The part of a wait of the overlapped step that was transfer; the rest was for a peer."""
    return min(wait_ms, transfer_ms)


def hidden_fraction(hidden_ms: float, spread_ms: float, found: Coverage) -> float | None:
    """hidden_ms of what could be covered; None where that cannot be told from noise or is nothing."""
    clear = found.with_beside_ms >= CLEAR_SPREADS * spread_ms and found.coverable_ms > 0
    return hidden_ms / found.coverable_ms if clear else None


def parts_agree(whole_ms: float, parts_ms: float, spread_ms: float) -> bool:
    """Whether the sum over AllToAlls is the step's hidden_ms, within 10 % or the spread."""
    return abs(parts_ms - whole_ms) <= max(TOLERANCE * abs(whole_ms), spread_ms)


def quiet(first_median: float, second_median: float) -> bool:
    """Whether two runs' medians differ by less than 10 % of the smaller."""
    return abs(first_median - second_median) < TOLERANCE * min(first_median, second_median)


def _keys(exchanges: Sequence[Exchange]) -> list[tuple[tuple[int, ...], int]]:
    """Group and number within it: ranks of other pipeline stages make other exchanges."""
    count: dict[tuple[int, ...], int] = {}
    keys = []
    for exchange in exchanges:
        keys.append((exchange.ranks, count.get(exchange.ranks, 0)))
        count[exchange.ranks] = keys[-1][1] + 1
    return keys
