"""One section of a report for each result: facts, verdict, tables, plots and traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fluid_npu.report import plots
from fluid_npu.report.bench_tables import tables_of
from fluid_npu.report.sources import Source
from fluid_npu.report.spans import Span, spans_of
from fluid_npu.report.summary_text import format_summary
from fluid_npu.report.table import Table, figure
from fluid_npu.report.trace import chrome_trace, rank_traces

_SHOWN_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A PNG and what it shows, for those who cannot see it."""

    name: str
    text: str
    png: bytes


@dataclass(kw_only=True)
class Section:
    """``traces`` are file name to JSON object."""

    name: str
    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    preformatted: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)


def section_of(source: Source, *, draw: bool) -> Section:
    """Raises KeyError, TypeError or ValueError where the result is not as its format says."""
    section = {"bench": _bench, "run": _run, "order": _order}[source.kind](source, draw)
    for title, spans in spans_of(source).items():
        if spans:
            section.traces[f"{title}.trace.json"] = chrome_trace(spans, f"{source.name} {title}")
            for name, trace in rank_traces(spans, f"{source.name} {title}").items() if title != "run" else ():
                section.traces[f"{title}/{name}"] = trace
    return section


def loss_plot(sources: Sequence[Source]) -> Plot | None:
    """The losses of all runs in one figure; None without any."""
    runs = {source.name: source.data["rows"] for source in sources if source.kind == "run" and source.data["rows"]}
    if not runs:
        return None
    return Plot(name="loss", text=f"loss over steps of {', '.join(runs)}", png=plots.loss_curves(runs))


def _bench(source: Source, draw: bool) -> Section:
    result = source.data
    section = Section(
        name=source.name,
        title=f"{result['bench']}: {source.name}",
        facts=bench_facts(result),
        verdict=list(result.get("verdict", [])),
        tables=tables_of(result),
    )
    if draw:
        section.plots = _bench_plots(result, spans_of(source))
    return section


def bench_facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Where and how it was measured."""
    machine = result["machine"]
    load = [machine[name] for name in ("load_average", "load_average_end") if machine.get(name) is not None]
    link = result.get("link")
    delay = result.get("planted_delay_ms") or 0.0
    facts = [
        ("command", result["command"]),
        ("date", result.get("date", "")),
        ("machine", machine_text(machine)),
        ("load average", " to ".join(map(str, load))),
        ("settings", " ".join(f"{name}={value}" for name, value in machine["settings"].items())),
        ("versions", versions_text(result)),
        ("dtype", result["dtype"]),
        ("link", f"{link['rate']}: {link['description']}" if link else ""),
        ("planted delay", f"{delay:g} ms in every AllToAll of ours" if delay else ""),
        ("judged", "" if result.get("judged", True) else "NO: some rows were too noisy"),
    ]
    return [(name, text) for name, text in facts if text]


def machine_text(machine: dict[str, Any]) -> str:
    """In one line."""
    ranks = f"{machine['nproc']} ranks of {machine['threads_per_rank']} thread(s) over {machine['backend']}"
    return f"{machine['description']}, {machine['system']}; {ranks}"


def versions_text(result: dict[str, Any]) -> str:
    """'torch 2.11.0, numpy 2.5.2'."""
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())


def _bench_plots(result: dict[str, Any], steps: dict[str, list[Span]]) -> list[Plot]:
    rows, kind = result["rows"], result["bench"]
    if kind == "train-step":
        return [Plot(name="steps", text="median step times with p10 to p90", png=plots.step_times(rows))]
    if kind == "layer":
        return [Plot(name="parts", text="where the layer's time goes", png=plots.layer_parts(rows))]
    if kind in ("ffn-sweep", "parallel-sweep"):
        text = "gain of grouped experts, with the published points"
        return [Plot(name="gain", text=text, png=plots.sweep_curves(result))]
    if kind == "block":
        # What one exchange of chunked attention hides is not told apart.
        rows = [{**row, "workload": row["impl"]} for row in result["exchanges"] if row["hidden_ms"] is not None]
        if not rows:
            return []
    found = [Plot(name="hidden", text="hidden, exposed and peer wait of each AllToAll", png=plots.hidden_bars(rows))]
    for workload in dict.fromkeys(title.rpartition("-")[0] for title in steps):
        mine = {title: spans for title, spans in steps.items() if title.rpartition("-")[0] == workload}
        text = f"timeline of one step under {workload}: computation and communication of each rank"
        found.append(Plot(name=f"timeline-{workload}", text=text, png=plots.timeline(mine)))
    return found


def _run(source: Source, draw: bool) -> Section:
    rows, summary = source.data["rows"], source.data["summary"]
    section = Section(name=source.name, title=f"train: {source.name}")
    if summary is not None:
        section.preformatted = format_summary(summary)
    else:
        section.verdict.append("No summary.json: the run did not come to its end, or still runs.")
    if rows:
        section.tables.append(_metrics_table(rows))
    if draw and (plot := loss_plot([source])):
        section.plots.append(plot)
    steps = {title: spans for title, spans in spans_of(source).items() if title != "run" and spans}
    if draw and steps:
        text = "timeline of traced steps: each AllToAll until its wait, and what ran beside it"
        section.plots.append(Plot(name="timeline", text=text, png=plots.timeline(steps)))
    return section


def _metrics_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Some steps from the first to the last."""
    stride = max(1, -(-(len(rows) - 1) // (_SHOWN_STEPS - 1)))
    shown = [*rows[:-1:stride], rows[-1]]
    return Table(
        name="metrics",
        title="Metrics",
        head=("step", "loss", "gradient norm", "step ms", "AllToAll ms", "tokens/s", "host MiB of rank 0"),
        rows=tuple(_metrics_row(row) for row in shown),
        note=f"{len(shown)} of {len(rows)} steps; metrics.jsonl has all.",
    )


def _metrics_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['step']}{' (twin)' if row.get('twin') else ''}",
        figure(row["loss"], 4),
        figure(row.get("grad_norm"), 4),
        figure(row["step_ms"], 1),
        figure(row.get("a2a_ms")),
        figure(row.get("tokens_per_s"), 0),
        figure(row.get("host_memory_mb"), 0),
    )


def _order(source: Source, draw: bool) -> Section:
    kinds = sorted({entry["kind"] for entries in source.data.values() for entry in entries})
    counts = {rank: Counter(entry["kind"] for entry in entries) for rank, entries in source.data.items()}
    table = Table(
        name="entries",
        title="Entries of the record",
        head=("rank", *kinds),
        rows=tuple((str(rank), *(str(count[kind]) for kind in kinds)) for rank, count in sorted(counts.items())),
        note="'fluid-npu check-order' says whether the order holds.",
    )
    section = Section(name=source.name, title=f"order record: {source.name}", tables=[table])
    steps = {title: spans for title, spans in spans_of(source).items() if spans}
    if draw and steps:
        text = "timeline of the record: what the host submitted, and each collective until its wait"
        section.plots.append(Plot(name="timeline", text=text, png=plots.timeline(steps)))
    return section
