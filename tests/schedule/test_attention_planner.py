"""The planner of attention chunks on costs whose best number of chunks can be said by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fluid_npu.schedule.attention_planner import AttentionCosts, choose_attention_chunks, expected_attention_ms

pytestmark = pytest.mark.host

#: Each stage as long as each exchange; nothing per chunk, per exchange or of dW.
EVEN = AttentionCosts(
    qkv_ms=(4.0, 4.0),
    core_ms=(4.0, 4.0),
    proj_ms=(4.0, 4.0),
    dw_ms=0.0,
    alpha_ms=0.0,
    beta_ms_per_mib=1.0,
    to_heads_mib=4.0,
    to_rows_mib=4.0,
    chunk_ms=0.0,
    hiding=1.0,
)


def test_one_chunk_is_the_sum_and_chunks_hide_what_runs_beside_others() -> None:
    assert expected_attention_ms(EVEN, 1) == 2 * (3 * 4 + 2 * 4)
    # Forward: qkv of two chunks until 2 and 4, there by 4 and 6; attention until 6 and 8, back by 8 and 10; projection
    # until 14. Backward: projection until 4, there by 6 and 8; attention until 8, 10, back by 10, 12; qkv until 16.
    assert expected_attention_ms(EVEN, 2) == 14 + 16
    # Of four, back by 6, 7, 8 and 9; backward there by 5 to 8, and by 9 to 12 with the link always in use.
    assert expected_attention_ms(EVEN, 4) == 13 + 16
    chosen = choose_attention_chunks(EVEN, (1, 2, 4))
    assert chosen.value == 4 and chosen.reason.startswith("expected of a layer's attention: 1 40.00 ms, 2 30.00 ms, 4")


def test_weight_gradients_fill_the_link_s_time_first() -> None:
    """With one chunk dW of 8 ms hides beside the backward's exchanges; with two there is a gap of 4 ms for it."""
    costs = replace(EVEN, dw_ms=8.0)
    assert expected_attention_ms(costs, 1) == expected_attention_ms(EVEN, 1)
    assert expected_attention_ms(costs, 2) == expected_attention_ms(EVEN, 2) + 4.0
    assert expected_attention_ms(replace(costs, dw_ms=10.0), 1) == expected_attention_ms(EVEN, 1) + 2.0


@pytest.mark.parametrize(
    ("changes", "numbers", "wanted"),
    [
        ({"hiding": 0.0}, (1, 2, 4), 1),  # nothing is saved
        ({"beta_ms_per_mib": 0.0}, (1, 2, 4), 1),  # nothing to hide
        ({"alpha_ms": 8.0, "beta_ms_per_mib": 0.0}, (1, 2, 4), 1),  # each chunk pays for its launches
        ({"chunk_ms": 1.0}, (1, 2, 4, 8), 2),
        ({"chunk_ms": 20.0}, (1, 2, 4, 8), 1),
        ({"spread_ms": 10.5}, (1, 2), 1),  # 10 ms are gained
        ({"spread_ms": 9.5}, (1, 2), 2),
        ({}, (1,), 1),
    ],
    ids=str,
)
def test_the_number_that_is_chosen(changes: dict[str, Any], numbers: tuple[int, ...], wanted: int) -> None:
    assert choose_attention_chunks(replace(EVEN, **changes), numbers).value == wanted


def test_half_of_what_could_hide_is_half_of_the_gain() -> None:
    gain = expected_attention_ms(EVEN, 1) - expected_attention_ms(EVEN, 2)
    half = replace(EVEN, hiding=0.5)
    assert expected_attention_ms(half, 1) - expected_attention_ms(half, 2) == pytest.approx(gain / 2)


def test_the_reason_has_the_figures() -> None:
    reason = choose_attention_chunks(replace(EVEN, hiding=0.25, spread_ms=0.5), (1, 2)).reason
    assert "2 37.50 ms; 25% of an exchange hides; less than 0.50 ms cannot be told from 1" in reason
