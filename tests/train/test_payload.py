"""Training with tokens that travel as fp8: near the run without, and its error is in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fluid_npu.train.summary import read_summary
from tests.support.ranks import run_ranks
from tests.support.training import tiny, train_here


def _trained(folder: Path, dtype: str) -> tuple[dict[int, float], dict[str, Any]]:
    settings: dict[str, Any] = {"steps": 4, "overlap": "dw", "twin_every": 2, "dispatch": "once-per-rank"}
    config = tiny(folder / dtype, a2a_payload_dtype=dtype, **settings)
    losses = run_ranks(2, train_here, config.to_json())[0]["losses"]
    return losses, read_summary(config.out)


def test_the_loss_stays_near_and_the_error_is_told(tmp_path: Path) -> None:
    (whole, plain), (coded, summary) = (_trained(tmp_path, dtype) for dtype in ("same", "fp8"))
    assert plain["a2a_payload"] == {"dtype": "same"}
    payload = summary["a2a_payload"]
    assert payload["dtype"] == "fp8" and 0.01 < payload["frobenius"] <= payload["worst_row"] < 2.0**-4 + 1e-3
    assert summary["a2a_bytes"] < 0.9 * plain["a2a_bytes"]
    assert summary["a2a_plain_bytes"] == pytest.approx(plain["a2a_plain_bytes"], rel=0.05)  # weights and routes drift
    assert coded != whole and coded == pytest.approx(whole, rel=1e-2)
