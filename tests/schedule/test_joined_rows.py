"""Rows of chunks that share their experts, brought together by expert: all of them, each once, in the same order."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.ops.chunk_rows import token_chunks
from fluid_npu.schedule.deferred import DWPart
from fluid_npu.schedule.joined_rows import JoinedRows

COUNTS = [[3, 0, 2, 4, 1], [0, 0, 5, 1, 0], [2, 0, 0, 1, 6]]


def by_hand(parts: list[torch.Tensor], expert: int) -> torch.Tensor:
    """The rows of one expert in all chunks, chunk after chunk."""
    return torch.cat([part.split(counts)[expert] for part, counts in zip(parts, COUNTS, strict=True)])


def test_all_rows_of_an_expert_come_together_in_the_order_of_the_chunks() -> None:
    xs = [torch.randn(sum(counts), 3) for counts in COUNTS]
    dys = [torch.randn(sum(counts), 2, dtype=torch.float64) for counts in COUNTS]
    chunks = [DWPart(x, dy, counts) for x, dy, counts in zip(xs, dys, COUNTS, strict=True)]
    parts = list(JoinedRows(COUNTS, torch.tensor(COUNTS)).parts(chunks))
    assert len(parts) == 4, "some experts at a time"
    assert [rows for part in parts for rows in part.counts] == [5, 0, 7, 6, 7]
    for at, rows in ((0, xs), (1, dys)):
        whole = torch.cat([part[at] for part in parts])
        assert torch.equal(whole, torch.cat([by_hand(rows, expert) for expert in range(5)]))


def test_no_rows_at_all() -> None:
    empty = [DWPart(torch.empty(0, 3), torch.empty(0, 2), [0, 0])] * 2
    parts = list(JoinedRows([[0, 0], [0, 0]], torch.zeros(2, 2, dtype=torch.int64)).parts(empty))
    assert [part.x.shape for part in parts] == [(0, 3), (0, 3)]


@pytest.mark.parametrize(("tokens", "chunks"), [(7, 3), (8, 4), (1, 4), (0, 2)])
def test_ranges_of_tokens_are_neighbours_and_even(tokens: int, chunks: int) -> None:
    ranges = token_chunks(tokens, chunks)
    assert [token for mine in ranges for token in range(tokens)[mine]] == list(range(tokens))
    sizes = [len(range(tokens)[mine]) for mine in ranges]
    assert len(sizes) == chunks and max(sizes) - min(sizes) <= 1
