"""``summary.json``: the figures of a finished run."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from fluid_npu.comm.legs import LEG_COUNTERS
from fluid_npu.version import __version__

FILE = "summary.json"
_WARM_UP = 3  # steps of a process that are left out of medians: allocators and connections warm up


def versions() -> dict[str, str]:
    """Versions of what shaped the result."""
    found = {"fluid_npu": __version__, "python": platform.python_version()}
    for package in ("torch", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def step_figures(rows: list[dict[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    """Loss, speed and AllToAll from the rows of ``metrics.jsonl``; twins count for AllToAll alone."""
    plain = [row for row in rows if not row["twin"]] or rows
    timed = plain[_WARM_UP:] or plain
    step_ms = median(row["step_ms"] for row in timed)
    a2a = [row["a2a_ms"] for row in rows[_WARM_UP:] or rows if row["a2a_ms"] is not None]
    return {
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "steps": rows[-1]["step"],
        "step_ms_median": step_ms,
        "tokens_per_s": tokens_per_step / step_ms * 1e3,
        "a2a_ms": median(a2a) if a2a else None,
        **_bytes(rows),
    }


def _bytes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of a step, to other ranks, mean over ranks and steps; and what a row for every (token, expert) would be; inside
    nodes and across them where exchanges have two legs."""
    names = ("a2a_bytes", "a2a_plain_bytes")
    known = [row for row in rows if all(row.get(name) is not None for name in names)]
    legs = [name for name in LEG_COUNTERS if any(name in row for row in known)]
    return {name: sum(row.get(name, 0.0) for row in known) / len(known) for name in (*names, *legs)} if known else {}


def write_summary(out: str | Path, summary: dict[str, Any]) -> None:
    """Writes the file as a whole or not at all."""
    path = Path(out) / FILE
    work = path.with_suffix(".json.tmp")
    work.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(work, path)


def read_summary(out: str | Path) -> dict[str, Any]:
    """What ``write_summary`` wrote."""
    summary: dict[str, Any] = json.loads((Path(out) / FILE).read_text(encoding="utf-8"))
    return summary
