"""Transfer, peer wait, coverable and fraction on planted flights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluid_npu.schedule.definitions import (
    Coverage,
    Exchange,
    coverables,
    coverage,
    exposed,
    hidden_fraction,
    parts_agree,
    peer_wait,
    pieces_beside,
    quiet,
    region_ms,
    transfers,
)
from fluid_npu.schedule.hidden import OverlapStats


def flight(ms: float, *beside: float, ranks: tuple[int, ...] = (0, 1)) -> Exchange:
    pieces = tuple((f"dW {number}", ms) for number, ms in enumerate(beside))
    return Exchange(name="x", ranks=ranks, bytes_to_peers=8, flight_ms=ms, wait_ms=ms, beside=pieces, at_once=True)


def test_transfer_starts_when_the_last_rank_has_arrived() -> None:
    late = [[flight(30.0), flight(4.0)], [flight(10.0), flight(9.0)]]  # rank 1 came late first, then rank 0
    assert transfers(late) == [[10.0, 4.0], [10.0, 4.0]]
    assert peer_wait([30.0, 10.0]) == 20.0
    assert coverage(late).peer_wait_ms == pytest.approx((20 + 0 + 0 + 5) / 2)


def test_groups_are_matched_by_their_ranks() -> None:
    stages = [[flight(5.0, ranks=(0, 1))], [flight(3.0, ranks=(0, 1))], [flight(7.0, ranks=(2,))] * 2]
    assert transfers(stages) == [[3.0], [3.0], [7.0, 7.0]]


def test_each_exchange_is_covered_by_what_runs_beside_it_alone() -> None:
    found = coverage([[flight(10.0, 3.0, 4.0), flight(10.0), flight(2.0, 50.0)]])
    assert found == Coverage(
        transfer_ms=22.0, with_beside_ms=12.0, beside_ms=57.0, coverable_ms=7.0 + 0.0 + 2.0, peer_wait_ms=0.0
    )


def shared(ms: float, *pieces: tuple[int, float], start: float = 0.0) -> Exchange:
    """An exchange of a pipeline."""
    beside = tuple((f"chunk {number}", length) for number, length in pieces)
    places = {"pieces": tuple(number for number, _ in pieces), "start_ms": start, "until_ms": start + ms}
    return replace(flight(ms), beside=beside, pipeline="AllToAlls of layer 1", **places)


def test_exchanges_of_a_pipeline_share_pieces_and_each_millisecond_counts_once() -> None:
    step = [shared(10.0), shared(10.0, (0, 14.0)), shared(10.0, (0, 14.0), (1, 3.0)), shared(10.0, (1, 3.0))]
    assert coverables(step, [10.0] * 4) == [0.0, 10.0, 7.0, 0.0]
    found = coverage([step])
    assert found.coverable_ms == 17.0 and found.beside_ms == 17.0 and found.with_beside_ms == 30.0
    assert pieces_beside(step) == [("chunk 0", 14.0), ("chunk 1", 3.0)]


def test_the_regions_of_a_pipeline_are_one() -> None:
    assert region_ms([shared(10.0, start=5.0), shared(10.0, start=7.0), shared(2.0, start=8.0)]) == 12.0
    assert region_ms([flight(10.0, 3.0)]) == 13.0


def test_ranks_cover_what_they_have() -> None:
    found = coverage([[flight(10.0, 30.0)], [flight(10.0)]])  # rank 1 got no tokens, so it has no dW
    assert found.coverable_ms == pytest.approx(5.0)


def test_no_fraction_of_a_transfer_lost_in_noise() -> None:
    found = Coverage(transfer_ms=40.0, with_beside_ms=10.0, beside_ms=8.0, coverable_ms=8.0)
    assert hidden_fraction(6.0, 2.0, found) == pytest.approx(0.75)
    assert hidden_fraction(6.0, 2.1, found) is None
    assert hidden_fraction(6.0, 0.1, Coverage(transfer_ms=40.0)) is None


def test_a_wait_beyond_the_transfer_was_for_a_peer() -> None:
    assert exposed(25.0, 10.0) == 10.0
    assert exposed(4.0, 10.0) == 4.0


def test_the_region_of_a_twin_holds_what_comes_after() -> None:
    assert flight(10.0, 3.0).region_ms == 13.0
    overlapped = Exchange(name="x", ranks=(0,), bytes_to_peers=0, flight_ms=10.0, wait_ms=7.0, beside=(("dW", 3.0),))
    assert overlapped.region_ms == 10.0


def test_agreement_is_ten_percent_or_the_spread() -> None:
    assert parts_agree(100.0, 109.0, 1.0) and not parts_agree(100.0, 111.0, 1.0)
    assert parts_agree(0.1, 2.0, 3.0)


def test_two_runs_ten_percent_apart_are_not_judged() -> None:
    assert quiet(100.0, 109.0) and not quiet(100.0, 111.0) and not quiet(111.0, 100.0)


def test_training_reports_a_fraction_only_above_its_noise() -> None:
    twin = Coverage(transfer_ms=40.0, with_beside_ms=20.0, beside_ms=30.0, coverable_ms=20.0)
    still, noisy = OverlapStats(), OverlapStats()
    for step in range(12):
        still.add(100.0 + step % 3)
        still.add(115.0 + step % 3, twin)
        noisy.add(100.0 + 37 * (step % 4))
        noisy.add(115.0 + 41 * (step % 3), twin)
    report = still.report("dw")
    assert report["hidden_ms"] == pytest.approx(15.0) and report["hidden_fraction"] == pytest.approx(0.75)
    assert noisy.report("dw")["hidden_fraction"] is None
    assert still.report("off") == {"hidden_ms": 0.0, "hidden_spread_ms": None, "hidden_fraction": None}
    assert OverlapStats().report("dw")["hidden_ms"] is None
