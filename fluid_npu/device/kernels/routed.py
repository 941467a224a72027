"""What the routing kernels of every device return. N and R rows, T tokens, E experts, L local experts."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RoutedRows(NamedTuple):
    """The rows of a routing map, by expert and then token; all int64 on the map's device."""

    token_of_row: Tensor
    """[N]: the token that each row copies."""
    row_of_pair: Tensor
    """[N]: rows sorted by token, ascending within a token."""
    bag_offsets: Tensor
    """[T]: where each token's rows start in ``row_of_pair``."""
    pair_index: Tensor
    """[N]: position of each row's (token, expert) in a flattened [T, E] tensor."""
    counts_E: Tensor | None = None
    """[E]: rows of each expert; None where nobody counted."""


class RowIndices(Protocol):
    """A ``RoutedRows`` without counts, or anything with the same indices."""

    @property
    def token_of_row(self) -> Tensor: ...
    @property
    def row_of_pair(self) -> Tensor: ...
    @property
    def bag_offsets(self) -> Tensor: ...
    @property
    def pair_index(self) -> Tensor: ...


class Slots(NamedTuple):
    """The tail of a payload row of a token that goes once to a group of L experts (``ops.payload_once.SlotRow``)."""

    number: int
    """S."""
    columns: int
    """Length of the tail in elements of ``wire``."""
    wire: torch.dtype
    """Of the probabilities."""
    local: int
    """L."""

    def width(self, hidden: int, dtype: torch.dtype) -> int:
        """Columns of a payload of tokens of ``dtype``."""
        return hidden + self.columns * self.wire.itemsize // dtype.itemsize

    def hidden(self, payload: Tensor) -> int:
        """H of a payload."""
        return payload.shape[1] - self.columns * self.wire.itemsize // payload.element_size()


class ChunkOrder(NamedTuple):
    """Rows that arrive by (source, expert) and are wanted by (expert, source)."""

    rows: Tensor
    """int64 [R]: which received row comes at each place."""
    inverse: Tensor
    """int64 [R]: the place of each received row."""
    ends_L: Tensor | None = None
    """[L]: where the rows of each expert end; None where nobody computed it."""


def bag_offsets(sorted_tokens: Tensor, num_tokens: int, uniform_topk: int | None) -> Tensor:
    """[T]: where each token begins in a sorted list of tokens, of which each may have exactly K."""
    device = sorted_tokens.device
    if uniform_topk is not None:
        return torch.arange(0, num_tokens * uniform_topk, uniform_topk, device=device)
    return torch.searchsorted(sorted_tokens, torch.arange(num_tokens, device=device))
