"""Figures from paired, interleaved rounds: percentiles, ratios and differences with bootstrap intervals.

Rounds are pairs: in each round every variant ran once, close in time, so what disturbs the machine disturbs all. A
ratio is the median over rounds of the per-round ratio. Its 95 % interval resamples whole rounds (percentile
bootstrap, fixed seed), and so does that of a difference of medians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fluid_npu.schedule.definitions import quiet

Times = npt.NDArray[np.float64]
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def percentiles(ms: Times) -> dict[str, float]:
    """``median_ms``, ``p10_ms`` and ``p90_ms``."""
    return {f"{name}_ms": float(np.percentile(ms, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))}


def paired_ratio(reference_ms: Times, this_ms: Times) -> Interval:
    """reference / this: above 1.0 this is faster. Raises ValueError for rounds that are not paired."""
    ratios = _paired(reference_ms, this_ms)[0] / this_ms
    return _bootstrap(len(ratios), lambda rows: np.median(ratios[rows], axis=-1))


def difference_of_medians(minuend_ms: Times, subtrahend_ms: Times) -> Interval:
    """median(minuend) - median(subtrahend). Raises ValueError for rounds that are not paired."""
    a, b = _paired(minuend_ms, subtrahend_ms)
    return _bootstrap(len(a), lambda rows: np.median(a[rows], axis=-1) - np.median(b[rows], axis=-1))


def quiet_halves(ms: Times) -> bool:
    """Whether the first and the second half of the rounds, two runs in a row, have medians within 10 %."""
    half = len(ms) // 2
    return half > 0 and quiet(float(np.median(ms[:half])), float(np.median(ms[half:])))


def _paired(a: Times, b: Times) -> tuple[Times, Times]:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"rounds must be paired: {a.shape} and {b.shape} times were given")
    return a, b


def _bootstrap(rounds: int, statistic: Callable[[Any], Any]) -> Interval:
    rows = np.random.default_rng(0).integers(0, rounds, size=(_RESAMPLES, rounds))
    low, high = np.percentile(statistic(rows), (2.5, 97.5))
    return Interval(float(statistic(np.arange(rounds))), float(low), float(high))
