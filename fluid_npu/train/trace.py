"""``train --trace``: when each AllToAll of two steps flew, and what ran beside it, for ``fluid-npu report``.

The last overlapped step and the last serialised twin are recorded; with overlap off, the last step.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fluid_npu.schedule.hidden import is_twin
from fluid_npu.schedule.lanes import Span
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

FILE = "lanes.json"
SCHEMA = 1


def traced_steps(config: TrainConfig, overlap: str, start: int) -> dict[int, str]:
    """Step to kind ('overlapped', 'twin' or 'plain') of a run that begins after ``start``; equal on all ranks."""
    if not config.trace:
        return {}
    found: dict[str, int] = {}
    for step in range(start + 1, config.steps + 1):
        kind = "twin" if is_twin(step, overlap, config.twin_every) else "plain" if overlap == "off" else "overlapped"
        found[kind] = step
    return {step: kind for kind, step in found.items()}


class StepTrace:
    """Takes the spans of the steps that are traced. ``write`` is collective."""

    def __init__(self, config: TrainConfig, overlap: str, start: int) -> None:
        self._steps = traced_steps(config, overlap, start)
        self._rows: list[dict[str, Any]] = []

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, step: int, rank: int, spans: list[Span]) -> None:
        """Keeps this rank's spans of a step."""
        kept = {"step": step, "kind": self._steps[step], "rank": rank}
        self._rows += [{**kept, **dataclasses.asdict(span)} for span in spans]

    def write(self, out: str, place: Place) -> None:
        """The spans of all ranks into ``out/lanes.json``, by the first rank. Nothing where no step is traced."""
        if not self._steps:
            return
        every: list[Any] = [None] * place.world
        with place.phase("gathering of the trace"):
            dist.all_gather_object(every, self._rows)
        if place.first:
            rows = [row for rank in every for row in rank]
            Path(out, FILE).write_text(json.dumps({"schema": SCHEMA, "lanes": rows}), encoding="utf-8")
