"""Chrome trace JSON: what chrome://tracing, Perfetto and the analysers of PyTorch's traces read.

Complete events ("X") with ``ts`` and ``dur`` in microseconds, ``pid`` = rank, ``tid`` = lane, and metadata events that
name both. ``cat`` and ``args.stream`` are as PyTorch's profiler writes them for kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
