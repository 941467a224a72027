"""An AllToAll whose sizes never reach the host: kernels that write rows into the memory of the other ranks of a node.

Each rank has a *window* that all ranks can write: three flags for each rank, two tables of rows [source][target], and
two areas for received rows. Exchange n uses table and area n modulo 2. Four kernels, in this order on each rank:

``tell``     waits until all ranks have released exchange n - 2, then writes this rank's row of the table into every
             rank's window and raises its flag COUNTED there;
``send``     few programs, which wait until all rows of the table are there, then write rows where the table says:
             behind those of lower ranks, in the target's area; the last program to end raises LANDED everywhere;
``await_``   waits until all ranks have landed theirs;
``release``  tells all ranks, by the flag RELEASED, that the area is not read any more.

*Overflow*: every rank has the whole table, so all know alike when some rank would get more rows than an area holds.
Then nobody writes any row, and the exchange's state says OVERFLOW on all ranks. A rank that is waited for in vain makes
the state LOST - its number, and nothing more is written. What a state is, only a copy to the host tells.

An exchange's *ticket* is int32 [2]: its number, which the kernels count themselves so that a captured graph may be
replayed, and its state. P ranks, rows of a multiple of 8 bytes.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FINE, OVERFLOW, LOST = 0, 1, -1
AREAS = 2
_FLAG_BYTES = 128
_BLOCK = 1024  # words of 8 bytes


@dataclass(frozen=True, kw_only=True)
class SplitsWindow:
    """One group's windows as a rank sees them: where each begins, and how they are divided."""

    bases_P: Tensor
    """int64, on the device: the address of each rank's window."""
    index: int
    world: int
    capacity: int
    """Rows of an area."""
    row_bytes: int
    name: str = "device splits"
    """By which all ranks know it, for records."""
    ranks: tuple[int, ...] = ()
    """Of the job, in the group's order, for records."""

    @staticmethod
    def bytes_of(world: int, capacity: int, row_bytes: int) -> int:
        """Of one window."""
        return _areas_at(world) + AREAS * capacity * row_bytes

    @property
    def table_at(self) -> int:
        """Where the tables begin."""
        return 3 * self.world * _FLAG_BYTES

    @property
    def areas_at(self) -> int:
        """Where the areas begin."""
        return _areas_at(self.world)


def _areas_at(world: int) -> int:
    return -(-(3 * world * _FLAG_BYTES + AREAS * world * world * 8) // 256) * 256


def tell(window: SplitsWindow, counts_P: Tensor, number: Tensor, ticket: Tensor, spins: int) -> None:
    """``counts_P``: int64, rows for each rank; ``number``: int32 [1], exchanges so far; ``spins``: looks at a flag."""
    _tell[(1,)](
        window.bases_P, counts_P, number, ticket, window.index, window.table_at, spins,
        WORLD=window.world, PADDED=_padded(window), num_warps=1,
    )  # fmt: skip


def send(window: SplitsWindow, rows: Tensor, ticket: Tensor, done: Tensor, spins: int, programs: int) -> None:
    """``rows``: contiguous, by target; ``done``: int32 [1], zero between exchanges."""
    _send[(programs,)](
        window.bases_P, rows.view(torch.int64), ticket, done, window.index, window.table_at, window.areas_at,
        window.capacity, window.row_bytes // 8, spins,
        WORLD=window.world, PADDED=_padded(window), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def await_(window: SplitsWindow, ticket: Tensor, spins: int) -> None:
    """What is issued next on the stream may read the area and the table."""
    _await[(1,)](window.bases_P, ticket, window.index, spins, WORLD=window.world, num_warps=1)


def release(window: SplitsWindow, ticket: Tensor) -> None:
    """What was issued before has read area and table."""
    _release[(1,)](window.bases_P, ticket, window.index, WORLD=window.world, num_warps=1)


def _padded(window: SplitsWindow) -> int:
    return max(triton.next_power_of_2(window.world), 2)


@triton.jit
def _flag(bases, kind: tl.constexpr, holder, teller, WORLD: tl.constexpr):
    """The flag of a kind (0 COUNTED, 1 LANDED, 2 RELEASED) that ``teller`` raises in the window of ``holder``."""
    return (tl.load(bases + holder) + (kind * WORLD + teller) * 128).to(tl.pointer_type(tl.int32))


@triton.jit
def _reached(flag, count, spins):
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    left = spins
    while (seen < count) & (left > 0):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        left -= 1
    return seen >= count


@triton.jit
def _all_reached(bases, kind: tl.constexpr, me, count, spins, state, WORLD: tl.constexpr):
    """0 when all ranks have raised their flags to ``count``, else LOST - rank; a state that is not 0 stays."""
    for peer in range(WORLD):
        if state == 0:  # noqa: SIM102  (Triton's `and` would look at the flag all the same)
            if _reached(_flag(bases, kind, me, peer, WORLD), count, spins) == 0:
                state = -1 - peer
    return state


@triton.jit
def _raise_all(bases, kind: tl.constexpr, me, count, WORLD: tl.constexpr):
    """All that this program did before is seen by whoever sees the flag."""
    tl.debug_barrier()
    for peer in range(WORLD):
        tl.atomic_xchg(_flag(bases, kind, peer, me, WORLD), count, sem="release", scope="sys")


@triton.jit
def _table(bases, holder, number, table_at, WORLD: tl.constexpr):
    start = tl.load(bases + holder) + table_at + (number % 2) * (WORLD * WORLD * 8)
    return start.to(tl.pointer_type(tl.int64))


@triton.jit
def _tell(bases, counts, number, ticket, me, table_at, spins, WORLD: tl.constexpr, PADDED: tl.constexpr):
    n = tl.load(number)
    state = _all_reached(bases, 2, me, n - 1, spins, n - n, WORLD)
    tl.store(number, n + 1)
    tl.store(ticket, n)
    tl.store(ticket + 1, state)
    if state == 0:
        targets = tl.arange(0, PADDED)
        row = tl.load(counts + targets, mask=targets < WORLD, other=0)
        for peer in range(WORLD):
            tl.store(_table(bases, peer, n, table_at, WORLD) + me * WORLD + targets, row, mask=targets < WORLD)
        _raise_all(bases, 0, me, n + 1, WORLD)


@triton.jit
def _send(
    bases, rows, ticket, done, me, table_at, areas_at, capacity, words, spins,
    WORLD: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.load(ticket)
    state = _all_reached(bases, 0, me, n + 1, spins, tl.load(ticket + 1), WORLD)
    if state == 0:
        sources, targets = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
        known = (sources < WORLD) & (targets < WORLD)
        place = _table(bases, me, n, table_at, WORLD) + sources * WORLD + targets
        table = tl.load(place, mask=known, other=0, volatile=True)
        if tl.max(tl.sum(table, axis=0), axis=0) > capacity:
            state = 1
        else:
            mine = tl.sum(tl.where(sources == me, table, 0), axis=0)
            ends = tl.cumsum(mine, axis=0)
            shift = tl.sum(tl.where(sources < me, table, 0), axis=0) - (ends - mine)
            area = areas_at + (n % 2).to(tl.int64) * capacity * words * 8
            numbers = tl.arange(0, PADDED)
            for row in range(tl.program_id(0), tl.sum(mine, axis=0).to(tl.int32), tl.num_programs(0)):
                target = tl.sum((ends <= row).to(tl.int32), axis=0)
                to = row + tl.sum(tl.where(numbers == target, shift, 0), axis=0)
                start = tl.load(bases + target) + area + to * words * 8
                out = start.to(tl.pointer_type(tl.int64))
                for at in range(0, words, BLOCK):
                    columns = at + tl.arange(0, BLOCK)
                    whole = tl.zeros((BLOCK,), tl.int64) + row
                    word = tl.load(rows + whole * words + columns, mask=columns < words)
                    tl.store(out + columns, word, mask=columns < words)
    if state < 0:  # another program may have seen all ranks: what one has lost the exchange has lost
        tl.atomic_min(ticket + 1, state, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    ended = tl.atomic_add(done, 1, sem="acq_rel", scope="sys")
    if ended == tl.num_programs(0) - 1:
        tl.store(done, 0)
        if tl.atomic_add(ticket + 1, 0, sem="acquire", scope="gpu") >= 0:
            tl.store(ticket + 1, state)
            _raise_all(bases, 1, me, n + 1, WORLD)


@triton.jit
def _await(bases, ticket, me, spins, WORLD: tl.constexpr):
    n = tl.load(ticket)
    tl.store(ticket + 1, _all_reached_keeping(bases, me, n + 1, spins, tl.load(ticket + 1), WORLD))


@triton.jit
def _all_reached_keeping(bases, me, count, spins, state, WORLD: tl.constexpr):
    """As ``_all_reached`` for LANDED; ranks raise it after an overflow too, so OVERFLOW waits as well."""
    lost = _all_reached(bases, 1, me, count, spins, tl.minimum(state, 0), WORLD)
    return tl.where(lost < 0, lost, state)


@triton.jit
def _release(bases, ticket, me, WORLD: tl.constexpr):
    if tl.load(ticket + 1) >= 0:
        _raise_all(bases, 2, me, tl.load(ticket) + 1, WORLD)
