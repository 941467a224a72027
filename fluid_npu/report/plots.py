"""Figures of a report as PNG bytes. Matplotlib is loaded only here and without a display.

Colours say the same everywhere: what is hidden is green, what is exposed red, waiting for a peer grey.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from fluid_npu.report.bench_tables import sweep_key
from fluid_npu.report.spans import COMMUNICATION, COMPUTE, Span

Row = dict[str, Any]
_HIDDEN, _EXPOSED, _WAIT, _OURS, _COMPUTE = "#2a9d5c", "#d1495b", "#a0a4ab", "#30638e", "#edae49"
MISSING = "no plots: matplotlib is missing; install it with: pip install 'fluid-npu[plot]'"


def can_draw() -> bool:
    """Whether matplotlib is here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=110, format="png")
    return out.getvalue()


def hidden_bars(rows: Sequence[Row]) -> bytes:
    """One panel for each workload, one bar for each AllToAll: hidden, exposed, and the wait for a peer.

    Without anything beside it nothing is hidden; what the table has there is noise of its region.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    most = max(sum(row["workload"] == name for row in rows) for name in workloads)
    lines = math.ceil(len(workloads) / 2)
    figure, axes = _figure(13, lines * (1.2 + 0.28 * most), lines, min(2, len(workloads)))
    for place, name in zip(axes.flat, workloads, strict=False):
        mine = [row for row in rows if row["workload"] == name]
        _stack(place, [row["a2a"] for row in mine], _hidden_parts(mine))
        place.set(title=name, xlabel="ms")
    for place in axes.flat[len(workloads) :]:
        place.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return _png(figure)


def _hidden_parts(rows: Sequence[Row]) -> list[tuple[str, str, list[float]]]:
    return [
        ("hidden", _HIDDEN, [max(0.0, row["hidden_ms"]) if row["beside"] else 0.0 for row in rows]),
        ("exposed", _EXPOSED, [row["exposed_ms"] for row in rows]),
        ("peer wait", _WAIT, [row["peer_wait_ms"] for row in rows]),
    ]


def _stack(place: Any, names: Sequence[str], parts: Sequence[tuple[str, str | None, Sequence[float]]]) -> None:
    """Stacked horizontal bars, the first name on top."""
    where = range(len(names))
    left = [0.0] * len(names)
    for label, colour, values in parts:
        place.barh(where, values, left=left, color=colour, label=label, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    place.set_yticks(where, names, fontsize=8)
    place.invert_yaxis()
    place.grid(axis="x", alpha=0.3)


def step_times(rows: Sequence[Row]) -> bytes:
    """Medians with p10 to p90, one panel for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = _figure(11, 0.8 + 1.5 * len(cases), len(cases))
    for place, case in zip(axes.flat, cases, strict=True):
        mine = [row for row in rows if row["case"] == case]
        medians = [row["median_ms"] for row in mine]
        low = [max(0.0, row["median_ms"] - row["p10_ms"]) for row in mine]
        high = [max(0.0, row["p90_ms"] - row["median_ms"]) for row in mine]
        place.barh(range(len(mine)), medians, xerr=[low, high], color=_OURS, ecolor="black", capsize=3, height=0.6)
        place.set_yticks(range(len(mine)), [row["impl"] for row in mine], fontsize=8)
        place.invert_yaxis()
        place.set(title=case, xlabel="ms, median with p10 to p90")
        place.grid(axis="x", alpha=0.3)
    return _png(figure)


def layer_parts(rows: Sequence[Row]) -> bytes:
    """Each implementation's parts as one bar, a black line at its floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    figure, axes = _figure(12, 1.5 + 0.42 * len(rows))
    place = axes[0, 0]
    parts = [(name.replace("_", " "), None, [row["parts"].get(name) or 0.0 for row in rows]) for name in names]
    _stack(place, [f"{row['impl']}, {row['pass']}" for row in rows], parts)
    for number, row in enumerate(rows):
        if row["floor_ms"] is not None:
            place.plot([row["floor_ms"]] * 2, [number - 0.45, number + 0.45], color="black", linewidth=2)
    place.set(xlabel="ms; black line: without the AllToAlls' transfer (floor)")
    figure.legend(loc="outside upper center", ncols=len(names), fontsize=8)
    return _png(figure)


def sweep_curves(result: Row) -> bytes:
    """Our gain with its interval, and the published points: as printed, and as their own times give."""
    key, rows = sweep_key(result), result["rows"]
    figure, axes = _figure(9, 5)
    place = axes[0, 0]
    gain = [100 * row["gain"] for row in rows]
    error = [
        [max(0.0, 100 * (row["gain"] - row["gain_low"])) for row in rows],
        [max(0.0, 100 * (row["gain_high"] - row["gain"])) for row in rows],
    ]
    where = range(len(rows))
    place.errorbar(where, gain, yerr=error, marker="o", capsize=4, color=_OURS, label="this run (95 %)")
    known = [(x, row["published"]) for x, row in zip(where, rows, strict=True) if row["published"]]
    if known:
        by_times = [100 * one["gain_computed"] for _, one in known]
        place.plot([x for x, _ in known], by_times, "s--", color=_COMPUTE, label="published, by its own times")
    for right, marker, label in (
        (True, "^", "published, as printed"),
        (False, "x", "printed, but not what its times give"),
    ):
        points = [(x, 100 * one["gain_printed"]) for x, one in known if one["wrong"] is not right]
        if points:
            place.plot(*zip(*points, strict=True), marker, color=_EXPOSED, markersize=9, linestyle="", label=label)
    place.axhline(0.0, color="black", linewidth=0.8)
    place.set_xticks(where, [str(row[key]) for row in rows])
    place.set(xlabel=key, ylabel="gain = baseline / grouped - 1, %")
    place.grid(alpha=0.3)
    place.legend(fontsize=8)
    return _png(figure)


def timeline(steps: dict[str, list[Span]]) -> bytes:
    """One panel for each step, two lanes for each rank, on one scale."""
    heights = [len({(span.rank, span.lane) for span in spans}) for spans in steps.values()]
    figure, axes = _figure(13, sum(0.7 + 0.42 * count for count in heights), len(steps))
    longest = max((span.end_ms for spans in steps.values() for span in spans), default=1.0)
    for place, (title, spans) in zip(axes.flat, steps.items(), strict=True):
        lanes = sorted({(span.rank, span.lane) for span in spans}, key=lambda key: (key[0], key[1] != COMPUTE, key[1]))
        for number, (rank, lane) in enumerate(lanes):
            mine = [span for span in spans if (span.rank, span.lane) == (rank, lane)]
            colour = _OURS if lane == COMMUNICATION else _COMPUTE
            bars = [(span.start_ms, max(span.end_ms - span.start_ms, longest / 2000)) for span in mine]
            place.broken_barh(bars, (number - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.4)
        place.set_yticks(range(len(lanes)), [f"rank {rank} {lane}" for rank, lane in lanes], fontsize=8)
        place.invert_yaxis()
        place.set(xlim=(0, longest), xlabel="ms", title=title)
        place.grid(axis="x", alpha=0.3)
    return _png(figure)


def loss_curves(runs: dict[str, Sequence[Row]]) -> bytes:
    """Loss over steps, a line for each run."""
    figure, axes = _figure(9, 5)
    place = axes[0, 0]
    for name, rows in runs.items():
        points = [(row["step"], row["loss"]) for row in rows if math.isfinite(row["loss"])]
        if points:
            place.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) == 1 else None, label=name)
    place.set(xlabel="step", ylabel="loss (nats per token)")
    place.grid(alpha=0.3)
    place.legend(fontsize=8)
    return _png(figure)
