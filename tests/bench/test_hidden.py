"""hidden_ms and hidden_fraction on planted times."""

from __future__ import annotations

import numpy as np
import pytest

from fluid_npu.bench.train_step import hidden
from fluid_npu.schedule.definitions import Coverage

OVERLAPPED, TWIN = 2, 3


def times(overlapped: float, twin: float, noise: float = 0.0) -> np.ndarray:
    ms = np.full((40, 4), 100.0)
    ms[:, OVERLAPPED], ms[:, TWIN] = overlapped, twin
    return ms + np.random.default_rng(1).normal(0, 1, ms.shape) * noise


def test_the_fraction_is_of_what_dw_can_cover() -> None:
    found = hidden(
        times(94.0, 100.0), OVERLAPPED, Coverage(transfer_ms=40.0, with_beside_ms=10.0, beside_ms=8.0, coverable_ms=8.0)
    )
    assert found["hidden_ms"] == pytest.approx(6.0)
    assert found["hidden_fraction"] == pytest.approx(0.75)


def test_a_loss_keeps_its_sign() -> None:
    found = hidden(
        times(103.0, 100.0), OVERLAPPED, Coverage(transfer_ms=9.0, with_beside_ms=9.0, beside_ms=9.0, coverable_ms=9.0)
    )
    assert found["hidden_ms"] == pytest.approx(-3.0)
    assert found["hidden_fraction"] == pytest.approx(-1 / 3)


def test_a_transfer_lost_in_noise_gives_no_fraction() -> None:
    found = hidden(
        times(99.0, 100.0, noise=5.0),
        OVERLAPPED,
        Coverage(transfer_ms=2, with_beside_ms=2, beside_ms=2, coverable_ms=2),
    )
    assert found["hidden_fraction"] is None
    assert found["hidden_spread_ms"] is not None and 5 * found["hidden_spread_ms"] > 2


def test_without_dw_beside_it_nothing_can_be_covered() -> None:
    assert hidden(times(99.0, 100.0), OVERLAPPED, Coverage(transfer_ms=50.0))["hidden_fraction"] is None


@pytest.mark.parametrize("column", [0, 1, TWIN])
def test_variants_without_overlap_hide_nothing(column: int) -> None:
    found = hidden(
        times(94.0, 100.0), column, Coverage(transfer_ms=40.0, with_beside_ms=10.0, beside_ms=8.0, coverable_ms=8.0)
    )
    assert found["hidden_ms"] == 0.0 and found["hidden_fraction"] is None
