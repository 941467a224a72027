"""Ratios and differences on planted numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fluid_npu.bench.stats import difference_of_medians, paired_ratio, percentiles, quiet_halves


def test_a_ratio_is_paired_by_round() -> None:
    # The machine slows down threefold over the rounds; in each round stock takes 1.25 times as long.
    ours = np.linspace(10.0, 30.0, 60)
    ratio = paired_ratio(1.25 * ours, ours)
    assert ratio.value == pytest.approx(1.25)
    assert ratio.low == pytest.approx(1.25) and ratio.high == pytest.approx(1.25)


def test_the_interval_covers_the_planted_ratio_and_narrows_with_rounds() -> None:
    draw = np.random.default_rng(3)
    widths = []
    for rounds in (20, 500):
        ours = 10.0 + draw.normal(0, 0.5, rounds)
        ratio = paired_ratio(1.1 * ours + draw.normal(0, 0.5, rounds), ours)
        assert ratio.low < 1.1 < ratio.high
        widths.append(ratio.spread)
    assert widths[1] < widths[0] / 2


def test_equal_variants_are_not_told_apart() -> None:
    draw = np.random.default_rng(5)
    a, b = (10.0 + draw.normal(0, 1.0, 60) for _ in range(2))
    ratio = paired_ratio(a, b)
    assert ratio.low < 1.0 < ratio.high


def test_a_difference_of_medians_keeps_its_sign() -> None:
    fast, slow = np.full(9, 4.0), np.full(9, 7.0)
    assert difference_of_medians(slow, fast).value == 3.0
    assert difference_of_medians(fast, slow).value == -3.0


def test_rounds_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        paired_ratio(np.ones(3), np.ones(4))


def test_percentiles_are_named() -> None:
    assert percentiles(np.arange(101.0)) == {"median_ms": 50.0, "p10_ms": 10.0, "p90_ms": 90.0}


def test_halves_that_differ_by_ten_percent_are_not_quiet() -> None:
    assert quiet_halves(np.array([100.0, 100.0, 109.0, 109.0]))
    assert not quiet_halves(np.array([100.0, 100.0, 111.0, 111.0]))
    assert not quiet_halves(np.array([100.0]))  # one round says nothing about another
