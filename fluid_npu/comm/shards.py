"""Which rows of a sequence each rank of a context-parallel group holds, and how they become the sequence again.

Rows come from the ranks one rank after another: *rank order*. Where each rank holds one stretch, that is the sequence.
Megatron deals every sequence in 2P chunks instead, chunks r and 2P - 1 - r to rank r, so that causal attention costs
each rank the same; then whole blocks of rows change places. S rows of all ranks, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SequenceShards:
    """Rows of each rank, and for each block of the sequence its place in rank order."""

    lengths: tuple[int, ...]
    """Rows of each rank; their sum is S."""
    order: Tensor | None = None
    """int64 [S / block] on the device of the rows; None: rank order is the sequence."""
    block: int = 1
    """Rows that stay together."""

    @property
    def total(self) -> int:
        """S."""
        return sum(self.lengths)

    @staticmethod
    def stretches(lengths: Sequence[int]) -> SequenceShards:
        """Rank r holds the next ``lengths[r]`` rows. Lengths may differ and be 0."""
        return SequenceShards(tuple(int(length) for length in lengths))

    @staticmethod
    def balanced(cu_seqlens: Sequence[int] | Tensor, ranks: int, device: torch.device) -> SequenceShards:
        """Megatron's load-balanced split of packed sequences; ``[0, S]`` for one sequence.

        Args:
            cu_seqlens: where each sequence of the whole starts, and S at the end. A tensor of another device than the
                CPU is waited for.
            ranks: P.
            device: of the rows that will be reordered.

        Raises ValueError for a sequence that 2P does not divide, and for bounds that are none.
        """
        bounds = [int(bound) for bound in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
        chunks = _chunk_sizes(bounds, ranks)
        length = bounds[-1] // ranks
        block = gcd(*chunks)
        if ranks == 1 or not block:
            return SequenceShards((length,) * ranks)
        places = _places(chunks, ranks, length, block)
        return SequenceShards((length,) * ranks, torch.tensor(places, dtype=torch.int64, device=device), block)

    def in_order(self, rows: Tensor) -> Tensor:
        """``[S, ...]`` from rank order to the order of the sequence; a copy only where they differ."""
        if self.order is None:
            return rows
        return self._blocks(rows).index_select(0, self.order).flatten(0, 1)

    def by_rank(self, rows: Tensor) -> Tensor:
        """The reverse of ``in_order``."""
        if self.order is None:
            return rows
        return self.write_by_rank(torch.empty_like(rows, memory_format=torch.contiguous_format), rows)

    def write_by_rank(self, target: Tensor, rows: Tensor) -> Tensor:
        """Writes ``by_rank(rows)`` into ``target``, which may be a slice of wider rows."""
        if self.order is None:
            return target.copy_(rows)
        self._blocks(target).index_copy_(0, self.order, self._blocks(rows))
        return target

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.total // self.block, self.block))


def balanced_part(x: Tensor, ranks: int, rank: int, dim: int) -> Tensor:
    """What ``rank`` of P holds of one sequence in Megatron's load-balanced split; 2P must divide dimension ``dim``."""
    if ranks == 1:
        return x
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim)


def _chunk_sizes(bounds: list[int], ranks: int) -> list[int]:
    """Rows of one of the 2P chunks of each sequence."""
    if len(bounds) < 2 or bounds[0] != 0 or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens={bounds}: must start with 0 and rise to the length of the whole; give [0, S] for one"
        )
    lengths = [end - start for start, end in pairwise(bounds)]
    parts = 2 * ranks if ranks > 1 else 1
    for length in lengths:
        if length % parts:
            raise ValueError(
                f"cu_seqlens={bounds}: a sequence of {length} rows cannot be dealt in 2 * {ranks} equal chunks; "
                f"pad it to {-(-length // parts) * parts} rows"
            )
    return [length // parts for length in lengths]


def _places(chunks: list[int], ranks: int, length: int, block: int) -> list[int]:
    """Block by block of the sequences: its place in rank order, each rank holding ``length`` rows."""
    places: list[int] = []
    before = 0  # rows of earlier sequences on each rank
    for size in chunks:
        for chunk in range(2 * ranks):
            first = chunk < ranks
            rank = chunk if first else 2 * ranks - 1 - chunk
            start = rank * length + before + (0 if first else size)
            places += range(start // block, (start + size) // block)
        before += 2 * size
    return places
