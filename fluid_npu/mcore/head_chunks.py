"""Which heads of an attention make a chunk, where the heads of each context-parallel rank are cut in C equal parts.

Chunk c holds part c of every rank's query heads, so each chunk is an exchange between all ranks. Key heads travel with
the first chunk that uses them; a later chunk of the same key heads sends queries alone. N query heads, M key heads (of
a tensor-parallel rank), P context-parallel ranks, n = N / P, m = lcm(M, P) / P key heads of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm


@dataclass(frozen=True, kw_only=True)
class HeadChunk:
    """One chunk: its query heads in the order of the ranks, and the key heads that travel with them, or none."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def whole_groups(self, shared: int) -> bool:
        """Whether it has all ``shared`` query heads of each of its key heads."""
        return len(self.queries) == shared * len(self.keys)

    def blocks(self, shared: int) -> list[int]:
        """Its blocks of Megatron's qkv weight, which has of each key head ``shared`` query heads, then key, then value.

        Whole groups in that order; else the query heads, then key and value of each key head.
        """
        width = shared + 2
        if self.whole_groups(shared):
            return [key * width + block for key in self.keys for block in range(width)]
        queries = [head // shared * width + head % shared for head in self.queries]
        return [*queries, *(key * width + shared + block for key in self.keys for block in range(2))]


@dataclass(frozen=True, kw_only=True)
class HeadChunks:
    """The chunks of one attention; ``heads`` and ``key_heads`` of one rank in one chunk."""

    chunks: tuple[HeadChunk, ...]
    heads: int
    key_heads: int

    @staticmethod
    def of(heads: int, key_heads: int, ranks: int, chunks: int) -> HeadChunks:
        """For N, M, P and C. Raises ValueError, naming ``attention_chunks``, where the heads cannot be cut so."""
        local, local_keys = heads // ranks, lcm(key_heads, ranks) // ranks
        if local % chunks:
            raise _refusal(chunks, f"each of {ranks} ranks has {local} of {heads} query heads", local)
        if key_heads % ranks and ranks % key_heads:
            raise _refusal(chunks, f"{ranks} ranks share {key_heads} key heads unevenly", 1)
        if local_keys % chunks and chunks % local_keys:
            raise _refusal(
                chunks, f"each of {ranks} ranks has {local_keys} key heads, which it cuts in part", local_keys
            )
        made = tuple(
            HeadChunk(
                queries=tuple(head for rank in range(ranks) for head in _part(rank, local, local // chunks, number)),
                keys=_keys(key_heads, ranks, local_keys, chunks, number),
            )
            for number in range(chunks)
        )
        return HeadChunks(chunks=made, heads=local // chunks, key_heads=max(1, local_keys // chunks))


def _part(rank: int, of_rank: int, size: int, number: int) -> range:
    start = rank * of_rank + number * size
    return range(start, start + size)


def _keys(key_heads: int, ranks: int, local: int, chunks: int, number: int) -> tuple[int, ...]:
    """The key heads that travel with chunk ``number``; each rank's, or once each where ranks share them."""
    if local >= chunks:
        return tuple(key for rank in range(ranks) for key in _part(rank, local, local // chunks, number))
    each = chunks // local  # chunks that use one key head
    if number % each:
        return ()
    if key_heads < ranks:
        return tuple(range(key_heads))
    return tuple(rank * local + number // each for rank in range(ranks))


def _refusal(chunks: int, why: str, fit: int) -> ValueError:
    allowed = [size for size in (1, 2, 4, 8) if fit % size == 0]
    return ValueError(f"attention_chunks={chunks}: {why}; use attention_chunks={max(allowed)}")
