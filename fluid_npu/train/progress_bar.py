"""What a person sees while training: a bar on a terminal, one plain line per step otherwise."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from fluid_npu.train.step import StepResult


class Progress:
    """Prints on rank 0 only; other ranks make one with ``enabled=False``."""

    def __init__(self, total: int, done: int, *, enabled: bool, stream: TextIO | None = None) -> None:
        self.total = total
        self.enabled = enabled
        self.stream = stream or sys.stdout
        self._bar: Any = None
        if enabled and self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", file=self.stream, dynamic_ncols=True)

    def show(self, step: int, result: StepResult, tokens_per_s: float) -> None:
        """One finished step, counted from 1."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{result.loss:.3f}", tokens_s=f"{tokens_per_s:,.0f}", refresh=False)
            self._bar.update(1)
            return
        norm = "-" if result.grad_norm is None else f"{result.grad_norm:.2f}"
        notes = " (serialised twin)" * result.twin + " (skipped: gradient overflow)" * result.skipped
        print(
            f"step {step}/{self.total}  loss {result.loss:.4f}  grad norm {norm}  lr {result.lr:.2e}  "
            f"{result.step_ms:.0f} ms  {tokens_per_s:,.0f} tokens/s{notes}",
            file=self.stream,
            flush=True,
        )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
