"""dW where the chunks of a pipeline share their experts: the rows of all chunks by expert, so that no dW is split.

One dW for each chunk, added up, would read and write all of ``main_grad`` once more for each chunk (fp32, of all
experts), which is more than the rows where experts are many. So rows are put together first, for a part of the experts
at a time, which bounds the memory of the copies. C chunks, L local experts, R rows of all chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.ops.chunk_rows import places_by_expert, token_chunks
from fluid_npu.schedule.deferred import DWPart

#: Parts in which experts are joined: the copies are this part of the operands of one weight.
_PARTS = 4


@dataclass(frozen=True)
class JoinedRows:
    """Rows of each local expert in each chunk, on the host and, int64 [C, L], on the device."""

    counts: Sequence[Sequence[int]]
    counts_CL: Tensor

    @cached_property
    def _places(self) -> Sequence[Tensor]:
        """For each chunk, where its rows stand in the order (expert, chunk)."""
        rows = [sum(of_chunk) for of_chunk in self.counts]
        return places_by_expert(self.counts_CL, sum(rows)).split(rows)

    def parts(self, chunks: Sequence[DWPart]) -> Iterator[DWPart]:
        """Operands of some consecutive experts at a time, from those of each chunk; together all, in their order."""
        local = len(self.counts[0])
        start = 0
        for experts in token_chunks(local, min(_PARTS, local)):
            counts = [sum(of_chunk[expert] for of_chunk in self.counts) for expert in range(local)[experts]]
            x, dy = (self._joined([part[which] for part in chunks], experts, start, sum(counts)) for which in (0, 1))
            yield DWPart(x, dy, GroupRows(counts, self.counts_CL[:, experts].sum(0)))
            start += sum(counts)

    def _joined(self, rows: Sequence[Tensor], experts: slice, start: int, size: int) -> Tensor:
        """``[size, ...]``: the rows of some experts, which begin at place ``start``."""
        out = rows[0].new_empty(size, rows[0].shape[1])
        for of_chunk, places, counts in zip(rows, self._places, self.counts, strict=True):
            first = sum(counts[: experts.start])
            mine = slice(first, first + sum(counts[experts]))
            out.index_copy_(0, places[mine] - start, of_chunk[mine])
        return out
