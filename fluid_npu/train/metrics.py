"""Per-step records on disk: ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from fluid_npu.comm.legs import LEG_COUNTERS
from fluid_npu.train.step import StepResult

FILE = "metrics.jsonl"


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """All complete rows of a run, in order; a line cut by a kill is left out."""
    path = Path(out) / FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class MetricsWriter:
    """Writes on rank 0. A resumed run keeps the rows up to its first step and drops what came after."""

    def __init__(self, out: str | Path, start_step: int) -> None:
        self.path = Path(out) / FILE
        kept = [row for row in read_metrics(out) if row["step"] <= start_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._process = psutil.Process()
        self._board = _tensorboard(out, start_step)

    def write(self, step: int, result: StepResult, tokens_per_s: float) -> None:
        """One finished step, counted from 1."""
        row = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_ms": round(result.step_ms, 3),
            "a2a_ms": result.a2a_ms,
            **{name: result.counters.get(name) for name in ("a2a_bytes", "a2a_plain_bytes")},
            **{name: result.counters[name] for name in LEG_COUNTERS if result.counters.get(name)},
            "twin": result.twin,
            "tokens_per_s": round(tokens_per_s, 1),
            "host_memory_mb": round(self._process.memory_info().rss / 2**20, 1),  # of rank 0, now
        }
        self._file.write(json.dumps(row) + "\n")
        for name in ("loss", "grad_norm", "lr", "step_ms", "tokens_per_s"):
            if row[name] is not None:
                self._board.add_scalar(f"train/{name}", row[name], step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._board.close()


def _tensorboard(out: str | Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(Path(out) / "tensorboard"), purge_step=start_step + 1)
