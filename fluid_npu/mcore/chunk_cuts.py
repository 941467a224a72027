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
        by_rank = mine.view(mine.shape[0], -1, self.local)
        return by_rank[:, :, self.experts].reshape(mine.shape[0], -1)

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


def joined(parts: Sequence[Tensor], cuts: Sequence[ChunkCut], ranks: int | None = None) -> Tensor:
    """``[T, ...]`` from what each chunk gives for its tokens; what local rows give is added at last.

    Chunks of experts are added up in their order or, with ``ranks``, have columns of their own: ``[T, P * L]``.
    """
    others = [part for part, cut in zip(parts, cuts, strict=True) if not cut.here]
    if len(others) == 1:
        whole = others[0]
    elif all(cut.whole for cut in cuts):
        whole = torch.cat(others)
    elif ranks is None:
        whole = others[0]
        for part in others[1:]:
            whole = whole.add_(part)
    else:
        tokens = others[0].shape[0]
        whole = torch.cat([part.view(tokens, ranks, -1) for part in others], dim=2).view(tokens, -1)
    return whole if len(others) == len(parts) else whole.add_(parts[0])
