"""What is in each chunk of a dispatch that sends a token once to each rank: some tokens and some experts of every rank.

Either cut sends each (token, expert) once. In chunks of tokens a token is sent to a rank as often as in one piece, and
each chunk reads the weights of all experts. In chunks of experts each weight is read once and a hot expert's rows come
in one chunk, but a token with experts of a rank in several chunks is sent to it in each. With local rows first what
stays on its rank, of all tokens and experts, is a chunk before these.

T tokens, E experts, P ranks, L local experts of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.ops.chunk_rows import token_chunks

#: What chunks may be of.
AXES = ("tokens", "experts")


@dataclass(frozen=True, kw_only=True)
class ChunkCut:
    """One chunk. The experts of its maps and probabilities are those of the chunk alone, by rank."""

    tokens: slice
    """Of the T tokens."""
    experts: slice
    """Of each rank's L experts."""
    local: int
    """L."""
    here: bool | None = None
    """Rows that stay on their rank alone (True) or those of other ranks alone; None: all."""

    @property
    def num_tokens(self) -> int:
        """Of the chunk."""
        return self.tokens.stop - self.tokens.start

    @property
    def num_experts(self) -> int:
        """Of the chunk on each rank."""
        return self.experts.stop - self.experts.start

    @property
    def whole(self) -> bool:
        """Whether it has all experts."""
        return self.num_experts == self.local

    def sends_to(self, rank: int, own: int) -> bool:
        """Whether rank ``own`` has rows in it for ``rank``."""
        return self.here is None or self.here == (rank == own)

    def columns(self, of_experts_TE: Tensor) -> Tensor:
        """Its tokens and experts of ``[T, E]``, contiguous."""
        mine = of_experts_TE[self.tokens]
        if self.whole:
            return mine
        by_rank = mine.view(mine.shape[0], mine.shape[1] // self.local, self.local)
        return by_rank[:, :, self.experts].flatten(1).contiguous()

    def map(self, map_TE: Tensor, ranks: int, own: int) -> Tensor:
        """bool: who chose whom, without experts of ranks that it sends nothing to."""
        mine = self.columns(map_TE)
        if self.here is None:
            return mine
        own_E = torch.zeros(ranks, self.num_experts, dtype=torch.bool, device=mine.device)
        own_E[own] = True
        return mine & (own_E if self.here else ~own_E).view(-1)


def make_cuts(tokens: int, local: int, chunks: int, axis: str, local_first: bool) -> list[ChunkCut]:
    """So many chunks of the tokens or of the local experts, which they then divide; local rows before them."""
    every, all_experts = slice(0, tokens), slice(0, local)
    here = False if local_first else None
    if axis == "tokens":
        cuts = [
            ChunkCut(tokens=mine, experts=all_experts, local=local, here=here) for mine in token_chunks(tokens, chunks)
        ]
    else:
        size = local // chunks
        cuts = [
            ChunkCut(tokens=every, experts=slice(start, start + size), local=local, here=here)
            for start in range(0, local, size)
        ]
    return [ChunkCut(tokens=every, experts=all_experts, local=local, here=True), *cuts] if local_first else cuts


def share_experts(cuts: Sequence[ChunkCut]) -> bool:
    """Whether some expert has rows in several chunks."""
    return len(cuts) > 1 and any(cut.whole for cut in cuts)


class Joined:
    """``[T, ...]`` from what each chunk gives for its tokens, one after the other as they are made.

    The first that is of all tokens takes the others, which are added to it in their order. With ``ranks`` these are
    gradients of probabilities, ``[T, P * L]``, of which chunks of experts have columns of their own.
    """

    def __init__(self, cuts: Sequence[ChunkCut], ranks: int | None = None) -> None:
        self._cuts, self._ranks, self._next = cuts, ranks, 0
        #: Whether each has tokens or columns of its own; else the first is of all, and the others are added to it.
        self._apart = len(cuts) > 1 and not cuts[0].here and (cuts[0].whole or ranks is not None)
        self._whole: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Takes the next chunk's; its memory is used up."""
        cut, self._next = self._cuts[self._next], self._next + 1
        if self._whole is None and not self._apart:
            self._whole = part
            return
        if self._whole is None:
            width = part.shape[1:] if self._ranks is None else (self._ranks * cut.local,)
            self._whole = part.new_empty(self._cuts[-1].tokens.stop, *width)
        target = self._whole[cut.tokens]
        if self._ranks is not None:
            target = target.view(target.shape[0], self._ranks, cut.local)[:, :, cut.experts]
            part = part.view(target.shape)
        if self._apart:
            target.copy_(part)
        else:
            target.add_(part)

    @property
    def whole(self) -> Tensor:
        """Of all chunks."""
        assert self._whole is not None and self._next == len(self._cuts), "every chunk gives its part first"
        return self._whole
