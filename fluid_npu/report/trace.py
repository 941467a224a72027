"""Chrome trace JSON: what chrome://tracing, Perfetto and the analysers of PyTorch's traces read.

Complete events ("X") with ``ts`` and ``dur`` in microseconds, ``pid`` = rank, ``tid`` = lane, and metadata events that
name both. Besides the file with all ranks, for people, there is one for each rank in the form of PyTorch's profiler,
for HolisticTraceAnalysis and its like: they take one file a rank and know communication by the name of NCCL's kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from fluid_npu.report.spans import COMMUNICATION, COMPUTE, Span

_MICRO = 1e3  # in a millisecond


def chrome_trace(spans: Sequence[Span], title: str) -> dict[str, Any]:
    """The whole file as an object, all ranks in it."""
    lanes = _lanes(spans)
    events = [_metadata(rank, None, "process_name", f"rank {rank}") for rank in sorted({span.rank for span in spans})]
    for (rank, lane), tid in lanes.items():
        events.append(_metadata(rank, tid, "thread_name", lane))
        events.append(_metadata(rank, tid, "thread_sort_index", tid))
    events += [_complete(span, lanes[span.rank, span.lane]) for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title, "writer": "fluid-npu report"}}


def rank_traces(spans: Sequence[Span], title: str) -> dict[str, dict[str, Any]]:
    """File name to object, one for each rank; communication is called as an NCCL kernel, whatever moved the bytes."""
    ranks = sorted({span.rank for span in spans})
    return {f"rank{rank}.json": _rank_trace(spans, rank, len(ranks), title) for rank in ranks}


def _rank_trace(spans: Sequence[Span], rank: int, world: int, title: str) -> dict[str, Any]:
    named = [
        replace(span, name=f"ncclKernel_AllToAll ({span.name})") if span.lane == COMMUNICATION else span
        for span in spans
        if span.rank == rank
    ]
    place = {"schemaVersion": 1, "distributedInfo": {"rank": rank, "world_size": world}}
    return {**place, **chrome_trace(named, title)}


def _lanes(spans: Iterable[Span]) -> dict[tuple[int, str], int]:
    """A number for each lane of each rank: compute first, communication second."""
    first = {COMPUTE: 0, COMMUNICATION: 1}
    named = sorted({(span.rank, span.lane) for span in spans}, key=lambda key: (key[0], first.get(key[1], 2), key[1]))
    count: dict[int, int] = {}
    numbers = {}
    for rank, lane in named:
        count[rank] = count.get(rank, 0) + 1
        numbers[rank, lane] = count[rank]
    return numbers


def _complete(span: Span, tid: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": span.name,
        "pid": span.rank,
        "tid": tid,
        "ts": span.start_ms * _MICRO,
        "dur": max(0.0, span.end_ms - span.start_ms) * _MICRO,
        "args": {"stream": tid, "lane": span.lane, **span.detail},
    }


def _metadata(rank: int, tid: int | None, what: str, value: str | int) -> dict[str, Any]:
    key = "sort_index" if what.endswith("sort_index") else "name"
    return {"ph": "M", "pid": rank, "tid": tid or 0, "ts": 0, "name": what, "args": {key: value}}
