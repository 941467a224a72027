"""What each lever of ours gives the layer: an ablation from the rounds of one run of ``bench layer``.

A lever is a pair of implementations that differ in one thing. Its milliseconds are the difference of the two medians,
with the interval of ``difference_of_medians``; positive is faster with it. Only pairs of which both ran are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluid_npu.bench.layer_impls import (
    IN_CHUNKS,
    LOCAL_FIRST,
    ONCE,
    ONCE_FP8,
    ONCE_GRAPH,
    ONCE_IN_CHUNKS,
    ONCE_IN_CHUNKS_GRAPH,
    ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH,
    ONCE_LOCAL_FIRST,
    ONCE_LOCAL_FIRST_GRAPH,
    ONCE_NODE,
    ONCE_PEER,
    PEER,
    STATIC,
    STATIC_GRAPH,
    STATIC_LOCAL_FIRST,
    STATIC_LOCAL_FIRST_GRAPH,
    STATIC_PEER,
)
from fluid_npu.bench.rig import OVERLAPPED, PLAIN
from fluid_npu.bench.stats import Times, difference_of_medians, quiet_halves

#: The stock form to compare with is the fastest of this run; this name stands for it.
STRONGEST = "strongest stock"


@dataclass(frozen=True)
class Lever:
    """From which implementation to which, and what differs."""

    what: str
    without: str
    with_it: str


LEVERS = (
    Lever("kernels and the host", STRONGEST, PLAIN.name),
    Lever("overlap: dW beside the AllToAll", PLAIN.name, OVERLAPPED.name),
    *(Lever(f"overlap: {n} chunks of experts", OVERLAPPED.name, kind.name) for n, kind in IN_CHUNKS.items()),
    Lever("overlap: local rows first", OVERLAPPED.name, LOCAL_FIRST.name),
    Lever("bytes: a token once per rank", OVERLAPPED.name, ONCE.name),
    Lever("bytes: a token once per node", ONCE.name, ONCE_NODE.name),
    Lever("bytes: fp8 in the dispatch", ONCE.name, ONCE_FP8.name),
    Lever("overlap: 2 chunks of tokens", ONCE.name, ONCE_IN_CHUNKS.name),
    Lever("overlap: local rows first, once per rank", ONCE.name, ONCE_LOCAL_FIRST.name),
    Lever("host: no wait for sizes", ONCE.name, STATIC.name),
    Lever("host: one launch a pass (CUDA graphs)", STATIC.name, STATIC_GRAPH.name),
    Lever("host: one launch a pass, once per rank", ONCE.name, ONCE_GRAPH.name),
    Lever("overlap: local rows first, once per rank, recorded", ONCE_GRAPH.name, ONCE_LOCAL_FIRST_GRAPH.name),
    Lever("overlap: 2 chunks, recorded", ONCE_LOCAL_FIRST_GRAPH.name, ONCE_IN_CHUNKS_GRAPH.name),
    Lever(
        "overlap: chunks of experts, recorded, not of tokens",
        ONCE_IN_CHUNKS_GRAPH.name,
        ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH.name,
    ),
    Lever("overlap: local rows first, static", STATIC.name, STATIC_LOCAL_FIRST.name),
    Lever("overlap: local rows first, recorded", STATIC_GRAPH.name, STATIC_LOCAL_FIRST_GRAPH.name),
    Lever("transport: peer copies", OVERLAPPED.name, PEER.name),
    Lever("transport: peer copies, once per rank", ONCE.name, ONCE_PEER.name),
    Lever("transport: peer copies, static", STATIC.name, STATIC_PEER.name),
)


def lever_rows(
    times: Mapping[tuple[str, str], Times], held_mb: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """One row for each lever and pass whose two implementations ran.

    Args:
        times: milliseconds of each (implementation, pass), one a round.
        held_mb: activation memory of each, MiB.
    """
    found = []
    for name in dict.fromkeys(name for _, name in times):
        for lever in LEVERS:
            without = _strongest(times, name) if lever.without == STRONGEST else lever.without
            pair = (without, name), (lever.with_it, name)
            if all(cell in times for cell in pair):
                found.append(_row(lever, without, name, [times[cell] for cell in pair], [held_mb[c] for c in pair]))
    return found


def _strongest(times: Mapping[tuple[str, str], Times], name: str) -> str:
    stock = [impl for impl, own in times if own == name and impl.startswith("stock")]
    return min(stock, key=lambda impl: float(np.median(times[impl, name])), default=STRONGEST)


def _row(lever: Lever, without: str, name: str, times: Sequence[Times], held: Sequence[float]) -> dict[str, Any]:
    saved = difference_of_medians(*times)
    return {
        "lever": lever.what,
        "pass": name,
        "without": without,
        "with": lever.with_it,
        "saved_ms": saved.value,
        "saved_low_ms": saved.low,
        "saved_high_ms": saved.high,
        "held_mb": held[1] - held[0],
        "judged": all(quiet_halves(ms) for ms in times),
    }
