"""Rows of the same groups in several pieces, each with operands of its own, such as the chunks of a pipeline.

A weight gradient is the sum over the rows of all pieces. One dW for each piece, added up, would read and write all of
``main_grad`` once more for each (fp32, of all groups), which is more than the rows where groups are many. A kernel that
reads rows where they lie needs no copies (``gemm_forms``); for others rows are put together first, large ones for a
part of the groups at a time, which bounds the memory of the copies. C pieces, L groups, R rows of all pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import DeviceRows, GroupRows, Groups

#: Copies of more bytes than this are made for a part of the groups at a time, in so many parts.
_AT_ONCE, _PARTS = 256 * 2**20, 4


class DWPart(NamedTuple):
    """Operands of the dW of some consecutive groups: ``[R, K]`` input rows, ``[R, N]`` gradient rows, rows of each."""

    x: Tensor
    dy: Tensor
    counts: Groups


class PieceRows:
    """Rows of each group in each piece; never changed afterwards.

    Args:
        counts: for each piece the rows of all L groups, of all pieces or of none known to the device alone.
        counts_CL: the same numbers as int64 [C, L] on the device of the rows; None where the host knows none.
    """

    def __init__(self, counts: Sequence[Groups], counts_CL: Tensor | None = None) -> None:
        there = [None] * len(counts) if counts_CL is None else list(counts_CL.unbind(0))
        self.counts = [
            rows if isinstance(rows, GroupRows | DeviceRows) else GroupRows(rows, on_device)
            for rows, on_device in zip(counts, there, strict=True)
        ]
        self._counts_CL = counts_CL

    @property
    def on_device(self) -> bool:
        """Whether the host knows none of them."""
        return self._counts_CL is None

    def known(self, device: torch.device) -> KnownPieces:
        """The same with the rows on the host; waits for them where only the device knows them."""
        if self._counts_CL is not None:
            return self._known
        counts = [rows.on_host() for rows in self.counts if isinstance(rows, DeviceRows)]
        return KnownPieces(counts, torch.tensor(counts, device=device))

    @cached_property
    def _known(self) -> KnownPieces:
        assert self._counts_CL is not None
        return KnownPieces([rows for rows in self.counts if isinstance(rows, GroupRows)], self._counts_CL)

    def joined(self, pieces: Sequence[DWPart]) -> Iterator[DWPart]:
        """Operands of some consecutive groups at a time, from those of each piece; together all, in their order."""
        known = self.known(pieces[0].x.device)
        row_bytes = sum(rows.shape[1] * rows.element_size() for rows in pieces[0][:2])
        for counts, targets in known.parts(1 if known.rows * row_bytes <= _AT_ONCE else _PARTS):
            x, dy = (_together([part[which] for part in pieces], targets, sum(counts)) for which in (0, 1))
            yield DWPart(x, dy, counts)


class KnownPieces:
    """Where rows go that are put together: rows of each group in each piece, on the host and as int64 [C, L]."""

    def __init__(self, counts: Sequence[GroupRows], counts_CL: Tensor) -> None:
        self.counts, self._counts_CL = counts, counts_CL
        self.rows = sum(map(sum, counts))
        self._parts: dict[int, list[_Target]] = {}

    def parts(self, number: int) -> list[_Target]:
        """For some groups at a time their rows, and of each piece which these are and where they go; made once."""
        found = self._parts.get(number)
        if found is None:
            found = self._parts[number] = self._made(min(number, len(self.counts[0])))
        return found

    @cached_property
    def _places(self) -> Sequence[Tensor]:
        """For each piece, where its rows stand in the order (group, piece)."""
        return places_by_group(self._counts_CL, self.rows).split([sum(of_piece) for of_piece in self.counts])

    def _made(self, parts: int) -> list[_Target]:
        local, start, found = len(self.counts[0]), 0, []
        for number in range(parts):
            groups = slice(local * number // parts, local * (number + 1) // parts)
            counts = [sum(of_piece[group] for of_piece in self.counts) for group in range(local)[groups]]
            firsts = [sum(of_piece[: groups.start]) for of_piece in self.counts]
            mine = [slice(f, f + sum(of_piece[groups])) for f, of_piece in zip(firsts, self.counts, strict=True)]
            targets = [
                (of, where[of] - start if start else where[of]) for of, where in zip(mine, self._places, strict=True)
            ]
            found.append((GroupRows(counts, self._counts_CL[:, groups].sum(0)), targets))
            start += sum(counts)
        return found


#: Rows of some groups; of each piece which these are, and where they go.
_Target: TypeAlias = tuple[GroupRows, list[tuple[slice, Tensor]]]


def _together(rows: Sequence[Tensor], targets: Sequence[tuple[slice, Tensor]], size: int) -> Tensor:
    """``[size, ...]``: some rows of each piece at their places."""
    out = rows[0].new_empty(size, rows[0].shape[1])
    for of_piece, (mine, places) in zip(rows, targets, strict=True):
        out.index_copy_(0, places, of_piece[mine])
    return out


def places_by_group(counts_CL: Tensor, rows: int) -> Tensor:
    """int64 [rows]: where each row, in the order (piece, group), stands in the order (group, piece).

    ``counts_CL``: rows of each of L groups in each of C pieces; the host knows their sum.
    """
    counts = counts_CL.reshape(-1)
    by_group = counts_CL.t().reshape(-1)
    start_CL = (by_group.cumsum(0) - by_group).view(counts_CL.t().shape).t().reshape(-1)
    shift = start_CL - (counts.cumsum(0) - counts)
    return torch.arange(rows, device=counts.device) + torch.repeat_interleave(shift, counts, output_size=rows)
