"""The object that every bench prints: docs/BENCHMARKS.md, "JSON"."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from fluid_npu.bench.machine import describe_machine, describe_versions
from fluid_npu.link import parse_link
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

SCHEMA = 1


def envelope(
    bench: str,
    config: TrainConfig,
    options: dict[str, Any],
    place: Place,
    machine: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """The result of a bench on this rank; ``machine`` was described at its start."""
    link = options.get("link")
    return {
        "bench": bench,
        "schema": SCHEMA,
        "command": options["command"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {**machine, "load_average_end": describe_machine(place)["load_average"]},
        "versions": describe_versions(),
        "dtype": config.dtype or "fp32",
        "link": {"rate": link, "description": parse_link(link).describe()} if link else None,
        "planted_delay_ms": config.plant_delay_ms,
        **more,
        "rows": list(rows),
        "judged": all(row.get("judged", True) for row in rows),
    }
