"""A bar on a terminal, a plain line per step elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest

from fluid_npu.train.progress_bar import Progress
from fluid_npu.train.step import StepResult

pytestmark = pytest.mark.host


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def result(**changes: object) -> StepResult:
    values = {"loss": 4.5, "grad_norm": 1.5, "lr": 1e-3, "step_ms": 20.0, "twin": False, "skipped": False}
    return StepResult(**{**values, "counters": {}, **changes})  # type: ignore[arg-type]


def test_a_pipe_gets_one_line_per_step() -> None:
    out = io.StringIO()
    progress = Progress(2, 0, enabled=True, stream=out)
    progress.show(1, result(), 1000.0)
    progress.show(2, result(twin=True, skipped=True, grad_norm=None), 1000.0)
    first, second = out.getvalue().splitlines()
    assert first == "step 1/2  loss 4.5000  grad norm 1.50  lr 1.00e-03  20 ms  1,000 tokens/s"
    assert "grad norm -" in second and "(serialised twin)" in second and "(skipped: gradient overflow)" in second


def test_a_terminal_gets_a_bar_that_goes_on_where_a_resumed_run_does() -> None:
    out = Terminal()
    progress = Progress(10, 4, enabled=True, stream=out)
    progress.show(5, result(), 1000.0)
    progress.close()
    assert "5/10" in out.getvalue() and "loss=4.500" in out.getvalue()


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    progress = Progress(2, 0, enabled=False, stream=out)
    progress.show(1, result(), 1000.0)
    progress.close()
    assert out.getvalue() == ""
