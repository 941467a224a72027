"""Checks of the Triton kernels that code the payload of an AllToAll and of those that exchange rows by themselves.

Part of ``triton_cases``, whose helpers they use: imported inside, because that module may run as a program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def fp8_rows_are_those_of_plain_torch(device: str) -> None:
    """Coded and decoded, bit by bit; the interpreter rounds no bf16, so decoded ones are near there."""
    from fluid_npu.device.kernels import e4m3_rows, triton_e4m3
    from tests.support.triton_cases import random, same_bits

    for dtype in e4m3_rows.DTYPES:
        for hidden in (7, 72) if dtype != torch.bfloat16 else (1, 2050):
            x = (random(9, hidden + 3) * torch.logspace(-6, 3, 9).view(-1, 1)).to(dtype)[:, :hidden]
            x[1] = 0.0
            x[2, 0], x[3, -1] = float("nan"), float("-inf")
            wanted, got = e4m3_rows.to_e4m3(x), triton_e4m3.to_e4m3(x.to(device)).cpu()
            numbers = [0, 1, *range(4, 9)]
            same_bits(got[numbers], wanted[numbers])
            wide = torch.cat([wanted, wanted], 1).to(device)[:, : wanted.shape[1]]
            back = triton_e4m3.from_e4m3(wide, hidden).cpu()
            assert back[[2, 3]].isnan().all() and triton_e4m3.from_e4m3(got.to(device), hidden).cpu()[2:4].isnan().all()
            expected = e4m3_rows.from_e4m3(wanted, hidden)[numbers]
            if dtype == torch.bfloat16 and device == "cpu":
                assert torch.all((back[numbers] - expected).abs() <= expected.abs() * 2.0**-7)
            else:
                same_bits(back[numbers], expected)
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, -codes, (codes[1:] + codes[:-1]) / 2]).view(1, -1)
    same_bits(triton_e4m3.to_e4m3(ties.to(device)).cpu(), e4m3_rows.to_e4m3(ties))
    empty = triton_e4m3.to_e4m3(torch.zeros(0, 8, device=device))
    assert triton_e4m3.from_e4m3(empty, 8).shape == (0, 8)


def rows_go_where_a_table_on_the_device_says(device: str) -> None:
    """Two exchanges under way, each released before its area is used again; tables, areas and states of all ranks."""
    from tests.support.device_splits import Ranks
    from tests.support.exchanges import cargo, tables

    for world, count in ((2, 4), (3, 6)):
        steps = tables(world, count, seed=11, most=4)
        most = max(sum(column) for table in steps for column in zip(*table, strict=True))
        ranks, under_way = Ranks(world, most, 3, device), []
        for step, table in enumerate(steps):
            under_way.append((step, table, ranks.start(table, step)))
            if step % 2 == 0:
                continue
            for number, of_step, tickets in under_way:
                assert ranks.wait(tickets) == [0] * world, number
                for rank in range(world):
                    expected = cargo(of_step, number, 3, torch.int64, rank)[1]
                    assert ranks.table(rank, number) == of_step
                    assert torch.equal(ranks.area(rank, number)[: len(expected)].cpu(), expected), (number, rank)
                    assert int(tickets[rank][0]) == number
                ranks.release(tickets)
            under_way.clear()


def too_many_rows_for_one_rank_are_written_by_none(device: str) -> None:
    from tests.support.device_splits import Ranks
    from tests.support.exchanges import cargo

    ranks = Ranks(2, 4, 2, device)
    for number, (table, state) in enumerate([([[1, 3], [2, 1]], 0), ([[0, 3], [1, 2]], 1), ([[4, 0], [0, 4]], 0)]):
        before = [ranks.area(rank, number).clone() for rank in range(2)]
        tickets = ranks.start(table, number)
        assert ranks.wait(tickets) == [state] * 2
        for rank in range(2):
            expected = before[rank].cpu() if state else cargo(table, number, 2, torch.int64, rank)[1]
            assert torch.equal(ranks.area(rank, number)[: len(expected)].cpu(), expected)
        ranks.release(tickets)


def an_area_that_is_not_released_is_not_written(device: str) -> None:
    from tests.support.device_splits import Ranks

    ranks, table = Ranks(2, 4, 2, device), [[1, 1], [1, 1]]
    first = [ranks.start(table, number) for number in range(2)]
    for tickets in first:
        assert ranks.wait(tickets) == [0, 0]
    before = [memory.clone() for memory in ranks.memory]
    ranks.release(first[0][:1])  # rank 0 has, rank 1 has not
    states = ranks.wait(ranks.start(table, 2))
    assert states == [-2, -2], "both wait in vain for rank 1"
    assert torch.equal(ranks.area(0, 2), before[0][ranks.windows[0].areas_at :][:64].view(torch.int64).view(4, 2))
    assert ranks.table(1, 2) == table


def a_rank_that_does_not_come_is_named(device: str) -> None:
    from tests.support.device_splits import Ranks

    ranks = Ranks(3, 4, 2, device)
    tickets = ranks.start([[1, 1, 1]] * 3, 0, silent=1)
    assert ranks.wait(tickets)[::2] == [-2, -2]
    assert not any(memory[ranks.windows[0].areas_at :].any() for memory in ranks.memory), "no row was written"


def a_record_of_exchanges_is_clean_and_shows_each_fault(device: str) -> None:
    """Acknowledgements, areas and tables that are used twice, and an overflow that all must see."""
    from tests.support.device_splits_order import FAULTS, recorded

    report = recorded(device, "")
    assert report.clean, report.findings[0]
    assert report.counts["signal"] == report.counts["await"] + 2 * 2 * 2, "nobody awaits the last two"
    for fault, wanted in FAULTS.items():
        found = {
            (finding.kind, finding.first.name, finding.second.name) for finding in recorded(device, fault).findings
        }
        assert wanted in found, (fault, found)


EXCHANGE_CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case
    for case in (
        fp8_rows_are_those_of_plain_torch,
        rows_go_where_a_table_on_the_device_says,
        too_many_rows_for_one_rank_are_written_by_none,
        an_area_that_is_not_released_is_not_written,
        a_rank_that_does_not_come_is_named,
        a_record_of_exchanges_is_clean_and_shows_each_fault,
    )
}
