"""``--fluid-report DIR``: what was patched and reached, what was chosen and why, what the AllToAlls cost.

Rank 0 writes ``report.json`` and ``report.txt``; counters are those of rank 0.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluid_npu.adaptor import PatchStatus, status
from fluid_npu.adaptor.versions import installed_version
from fluid_npu.device.choice import announced
from fluid_npu.schedule.hidden import OverlapStats
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.version import __version__

_NO_TWINS = "no step ran as its serialised twin; --fluid-twin-every N measures it"


def write_report(
    args: Namespace,
    totals: Mapping[str, float],
    steps: int,
    hidden: OverlapStats,
    schedulers: Sequence[BackwardScheduler],
) -> None:
    """Writes both files where ``args.fluid_report`` says, on rank 0. Raises OSError when it cannot."""
    if args.fluid_report is None or int(os.environ.get("RANK", "0")) != 0:
        return
    report = make_report(totals, steps, hidden, schedulers)
    folder = Path(args.fluid_report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(text_of(report) + "\n", encoding="utf-8")
    print(f"fluid_npu: report in {folder / 'report.txt'} and report.json", flush=True)


def make_report(
    totals: Mapping[str, float], steps: int, hidden: OverlapStats, schedulers: Sequence[BackwardScheduler]
) -> dict[str, Any]:
    """The report as plain data. ``totals`` are sums over ``steps`` of ``BackwardScheduler.get_stats``."""
    overlap = schedulers[0].overlap if schedulers else "off"
    patches = [_patch(state) for state in status() if state.applied]
    return {
        "versions": {"fluid_npu": __version__, "megatron-core": installed_version("megatron-core")},
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "steps": steps,
        "models": [scheduler.name for scheduler in schedulers],
        "overlap": overlap,
        "choices": [{"what": what, "value": choice.value, "reason": choice.reason} for what, choice in announced()],
        "totals": dict(totals),
        "per_step": {name: value / steps for name, value in totals.items()} if steps else {},
        "communication_ms_per_twin": _median([twin.transfer_ms for twin in hidden.covered]),
        "step_ms": {"overlapped": _median(hidden.overlapped_ms), "twin": _median(hidden.twin_ms)},
        **hidden.report(overlap),
        "patches": patches,
        "never_reached": [patch["target"] for patch in patches if patch["hits"] == 0],
        "not_reachable": {patch["target"]: patch["unreachable"] for patch in patches if patch["unreachable"]},
    }


def _patch(state: PatchStatus) -> dict[str, Any]:
    row = asdict(state.patch)
    kept = {name: row[name] for name in ("target", "kind", "feature", "manifest", "replacement")}
    return {**kept, "hits": state.hits, "problem": state.problem, "unreachable": list(state.unreachable)}


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def text_of(report: Mapping[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [f"{versions}; {report['steps']} steps on {report['world_size']} ranks, overlap {report['overlap']}", ""]
    lines += ["Choices", *(f"  {item['what']}: {item['value']} ({item['reason']})" for item in report["choices"]), ""]
    lines += ["Per step, rank 0", *_figures(report), ""]
    lines += ["Patches", *(_line(patch) for patch in report["patches"])]
    if report["never_reached"]:
        lines += ["", "Applied and never reached", *(f"  {target}" for target in report["never_reached"])]
    for target, where in report["not_reachable"].items():
        lines += ["", f"{target} is still the original in", *(f"  {place}" for place in where)]
    return "\n".join(lines)


def _figures(report: Mapping[str, Any]) -> list[str]:
    per_step = report["per_step"]
    sent = per_step.get("a2a_bytes", 0) / 2**20
    lines = [
        f"  AllToAlls        {per_step.get('a2a_count', 0):.1f}, {sent:.3f} MiB to other ranks",
        f"  exposed          {per_step.get('exposed_ms', 0):.3f} ms in waits",
        f"  weight gradients {per_step.get('dw_ms', 0):.3f} ms in {per_step.get('total_dw_tasks', 0):.1f} tasks",
    ]
    if report["overlap"] == "off":
        return [
            *lines,
            f"  communication    {per_step.get('a2a_ms', 0):.3f} ms",
            "  hidden           nothing: overlap is off",
        ]
    if report["communication_ms_per_twin"] is None:
        return [*lines, f"  communication    not measured: {_NO_TWINS}", "  hidden           not measured"]
    lines.append(f"  communication    {report['communication_ms_per_twin']:.3f} ms in a twin step")
    return [*lines, f"  hidden           {_hidden(report['hidden_ms'], report['hidden_fraction'])}"]


def _hidden(milliseconds: float | None, fraction: float | None) -> str:
    if milliseconds is None:
        return "not measured: the twins fell into the first steps; lower --fluid-twin-every"
    if milliseconds < 0:
        return f"nothing: an overlapped step takes {-milliseconds:.3f} ms longer than its twin"
    if fraction is None:
        return f"{milliseconds:.3f} ms"
    noise = "; more than all of it is noise of the timing" if fraction > 1 else ""
    return f"{milliseconds:.3f} ms, {fraction:.0%} of what can run beside them{noise}"


def _line(patch: Mapping[str, Any]) -> str:
    hits = "not counted" if patch["hits"] is None else f"{patch['hits']} hits"
    return f"  {patch['feature']:<14} {patch['kind']:<8} {patch['target']}: {hits}"
