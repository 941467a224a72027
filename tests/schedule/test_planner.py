"""Plans from costs: arithmetic by hand, and the limits at which another plan wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluid_npu.schedule.planner import PLAIN, Costs, Plan, choose_plan, expected_ms

#: An exchange takes 4 ms: 1 to start and 3 for 3 MiB.
COSTS = Costs(
    alpha_ms=1.0,
    beta_ms_per_mib=1.0,
    dispatch_mib=3.0,
    combine_mib=3.0,
    forward_ms=6.0,
    dx_ms=6.0,
    dw_ms=6.0,
    chunk_ms=0.5,
    hiding=1.0,
)


def test_each_plan_takes_what_its_timeline_says() -> None:
    assert expected_ms(COSTS, PLAIN) == 4 * 4.0 + 18.0
    assert expected_ms(COSTS, Plan(overlap="dw")) == (4 + 6 + 4) + (4 + 6 + max(4, 6))
    # FC2's 3 ms beside the combine, FC1's beside the dispatch.
    assert expected_ms(COSTS, Plan(overlap="dw", carry_over=True)) == (4 + 6 + 4) + (4 + 6 + 4)
    # Two chunks: exchanges of 2.5 ms, chunks of 3.25.
    # There at 2.5 and 5, computed at 5.75 and 9, back at 8.25 and 11.5.
    forward = 11.5
    backward = max(9 + 6, 11.5)
    assert expected_ms(COSTS, Plan(overlap="full", chunks=2)) == forward + backward


def test_chunks_of_experts_send_more_rows_and_join_none() -> None:
    """Of tokens that are sent once per rank: two chunks are of experts here, four of tokens."""
    costs = replace(COSTS, join_ms=2.0, rows_of_chunks=((2, 1.5),))
    two, four = (Plan(overlap="full", chunks=number) for number in (2, 4))
    more = replace(COSTS, dispatch_mib=1.5 * COSTS.dispatch_mib, combine_mib=1.5 * COSTS.combine_mib)
    assert expected_ms(costs, two) == expected_ms(more, two) > expected_ms(COSTS, two)
    assert expected_ms(costs, four) == expected_ms(replace(COSTS, join_ms=2.0), four)
    halves = Plan(overlap="dw", interleave_batches=True)
    assert expected_ms(costs, halves) == expected_ms(COSTS, halves)
    assert costs.weights_ms(two) == costs.dw_ms and costs.weights_ms(four) == costs.dw_ms + 2.0


def test_joining_rows_is_part_of_the_weight_gradients_of_chunks_alone() -> None:
    joined = replace(COSTS, join_ms=2.0)
    for plan in (PLAIN, Plan(overlap="dw"), Plan(overlap="dw", carry_over=True)):
        assert expected_ms(joined, plan) == expected_ms(COSTS, plan)
    assert expected_ms(joined, Plan(overlap="full", chunks=2)) == 11.5 + max(9 + 8, 11.5)
    dear = replace(COSTS, alpha_ms=0.05, beta_ms_per_mib=2.0, chunk_ms=0.1, join_ms=50.0)
    assert choose_plan(dear, (1, 2, 4), carry_over=False).value == Plan(overlap="dw")


def test_half_of_what_could_be_hidden_where_half_hides() -> None:
    half = replace(COSTS, hiding=0.5)
    full, plain = (expected_ms(half, plan) for plan in (Plan(overlap="dw"), PLAIN))
    assert plain - full == 0.5 * (expected_ms(COSTS, PLAIN) - expected_ms(COSTS, Plan(overlap="dw")))


def test_plain_is_best_where_nothing_hides_and_within_the_spread() -> None:
    plan, reason = choose_plan(replace(COSTS, hiding=0.0), (1, 2, 4))
    assert plan == PLAIN
    assert "plain 34.00 ms, dw 34.00 ms, full in 2 chunks 39.00 ms" in reason and "0% of an exchange hides" in reason
    plan, reason = choose_plan(replace(COSTS, spread_ms=50.0), (1, 2, 4))
    assert plan == PLAIN and "less than 50.00 ms cannot be told from plain" in reason


def test_without_transfers_chunks_only_cost() -> None:
    assert choose_plan(replace(COSTS, alpha_ms=0.0, beta_ms_per_mib=0.0), (1, 2, 4)).value == PLAIN


def test_chunks_win_on_a_slow_link_and_fewer_where_starting_one_is_dear() -> None:
    slow = replace(COSTS, alpha_ms=0.05, beta_ms_per_mib=2.0, chunk_ms=0.1)
    dear = replace(slow, chunk_ms=1.5, alpha_ms=1.0)
    plans = [choose_plan(costs, (1, 2, 4), carry_over=False).value for costs in (slow, dear)]
    assert plans == [Plan(overlap="full", chunks=4), Plan(overlap="full", chunks=2)]


def test_carry_over_is_taken_only_where_it_may_be() -> None:
    assert choose_plan(COSTS, (1,), carry_over=False).value == Plan(overlap="dw")
    assert choose_plan(COSTS, (1,)).value == Plan(overlap="dw", carry_over=True)


def test_local_rows_first_fill_the_first_exchange_of_each_direction() -> None:
    local = replace(COSTS, local_share=0.5, local_join_ms=2.0)
    # One chunk of 4 ms there and back; two pieces of 3.25. Forward: local rows by 3.25, there at 4, computed at 7.25.
    one = expected_ms(local, Plan(overlap="full", chunks=1, local_first=True))
    assert one == (4 + 3.25 + 4) + max(4 + 3.25 + 6 + 2, 4 + 3.25 + 4)
    # Two chunks of 2.5 ms. Forward: local FC1, 2/3 of 3 + 1/3, before these are there; 1.5 + 1/3 each, done at 4.33,
    # and 6.83; both there at 5, back at 7.5 and 10; local FC2 by 7.94, beside the last.
    # Backward: local rows by 3 + 1/3, computed at 31/6 and 7, back at 31/6 + 5.
    two = expected_ms(local, Plan(overlap="full", chunks=2, local_first=True))
    assert two == pytest.approx(10 + max(7 + 8, 31 / 6 + 5))
    # Without transfers nothing is saved by the order: 6 ms of forward and what the second piece costs.
    free = replace(local, alpha_ms=0.0, beta_ms_per_mib=0.0)
    assert expected_ms(free, Plan(overlap="full", chunks=1, local_first=True)) == pytest.approx(6.5 + 6.5 + 8)


def test_local_rows_first_are_taken_where_they_pay_and_never_where_none_stays() -> None:
    slow = replace(COSTS, beta_ms_per_mib=3.0, dispatch_mib=1.0, combine_mib=1.0, chunk_ms=0.1)
    assert not choose_plan(slow, (1, 2), carry_over=False).value.local_first
    cheap = choose_plan(replace(slow, local_share=0.5), (1, 2), carry_over=False)
    assert cheap.value.local_first and ", local rows first " in cheap.reason
    dear = choose_plan(replace(slow, local_share=0.5, local_join_ms=20.0), (1, 2), carry_over=False)
    assert not dear.value.local_first


HALVES = Plan(overlap="dw", interleave_batches=True)


def test_halves_compute_attention_and_the_other_half_beside_exchanges() -> None:
    costs = replace(COSTS, around_forward_ms=8.0, around_backward_ms=10.0)
    # Exchanges of 2.5 ms, experts of 3.25. Forward: attention to 8, dispatch B lands at 10.5, experts A to 11.25 and B
    # to 14.5, combine B at 17: 9 beside attention's 8.
    # Backward: experts B to 5.75, dW to 8.75, experts A to 12, dW to 15, attention B to 20 and A to 25: 15 beside 10.
    assert expected_ms(costs, HALVES) == 9 + 15
    alone = expected_ms(COSTS, HALVES)
    # Without attention: experts A 2.5 to 5.75, B to 9, back at 11.5; backward to 15 by dW.
    assert alone == 11.5 + 15


def test_halves_are_considered_only_where_they_may_run_and_win_beside_long_attention() -> None:
    costs = replace(COSTS, around_forward_ms=20.0, around_backward_ms=40.0, chunk_ms=0.1)
    assert not choose_plan(costs, (1,)).value.interleave_batches
    plan, reason = choose_plan(costs, (1,), halves=True)
    assert plan == HALVES and "two halves interleaved" in reason
    assert choose_plan(replace(costs, chunk_ms=5.0), (1,), halves=True).value != HALVES


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_no_plan_is_faster_than_its_longer_resource(chunks: int) -> None:
    plan = Plan(overlap="full" if chunks > 1 else "dw", chunks=chunks)
    transfers = 4 * chunks * COSTS.transfer_ms(3.0 / chunks)
    compute = 18.0 + 2 * (chunks - 1) * COSTS.chunk_ms
    assert max(transfers, compute) <= expected_ms(COSTS, plan) <= transfers + compute
