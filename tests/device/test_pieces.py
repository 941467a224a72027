"""Rows of chunks that share their experts, brought together by expert: all of them, each once, in the same order."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.device.kernels import pieces
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.device.kernels.torch_kernels import TorchKernels
from fluid_npu.ops.chunk_rows import token_chunks

COUNTS = [[3, 0, 2, 4, 1], [0, 0, 5, 1, 0], [2, 0, 0, 1, 6]]


def by_hand(parts: list[torch.Tensor], expert: int) -> torch.Tensor:
    """The rows of one expert in all chunks, chunk after chunk."""
    return torch.cat([part.split(counts)[expert] for part, counts in zip(parts, COUNTS, strict=True)])


@pytest.mark.parametrize("number", [1, 4], ids=["at_once", "some_experts_at_a_time"])
def test_all_rows_of_an_expert_come_together_in_the_order_of_the_chunks(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of_all = sum(map(sum, COUNTS))
    monkeypatch.setattr(pieces, "_AT_ONCE", rows_of_all * (3 * 4 + 2 * 8) - (number > 1))  # of x and dy, to the byte
    xs = [torch.randn(sum(counts), 3) for counts in COUNTS]
    dys = [torch.randn(sum(counts), 2, dtype=torch.float64) for counts in COUNTS]
    chunks = [DWPart(x, dy, counts) for x, dy, counts in zip(xs, dys, COUNTS, strict=True)]
    parts = list(PieceRows(COUNTS, torch.tensor(COUNTS)).joined(chunks))
    assert len(parts) == number
    assert [rows for part in parts for rows in part.counts] == [5, 0, 7, 6, 7]
    for at, rows in ((0, xs), (1, dys)):
        whole = torch.cat([part[at] for part in parts])
        assert torch.equal(whole, torch.cat([by_hand(rows, expert) for expert in range(5)]))


def test_dw_of_all_pieces_is_added_once() -> None:
    xs, dys = ([torch.randn(sum(counts), width) for counts in COUNTS] for width in (3, 2))
    main_grad = torch.ones(5, 3, 2)
    parts = [DWPart(x, dy, counts) for x, dy, counts in zip(xs, dys, COUNTS, strict=True)]
    TorchKernels().grouped_dw_pieces_add_(main_grad, parts, PieceRows(COUNTS, torch.tensor(COUNTS)))
    for expert in range(5):
        torch.testing.assert_close(main_grad[expert], 1 + by_hand(xs, expert).t() @ by_hand(dys, expert))


def test_no_rows_at_all() -> None:
    empty = [DWPart(torch.empty(0, 3), torch.empty(0, 2), [0, 0])] * 2
    parts = list(PieceRows([[0, 0], [0, 0]], torch.zeros(2, 2, dtype=torch.int64)).joined(empty))
    assert [part.x.shape for part in parts] == [(0, 3)]


@pytest.mark.parametrize(("tokens", "chunks"), [(7, 3), (8, 4), (1, 4), (0, 2)])
def test_ranges_of_tokens_are_neighbours_and_even(tokens: int, chunks: int) -> None:
    ranges = token_chunks(tokens, chunks)
    assert [token for mine in ranges for token in range(tokens)[mine]] == list(range(tokens))
    sizes = [len(range(tokens)[mine]) for mine in ranges]
    assert len(sizes) == chunks and max(sizes) - min(sizes) <= 1
