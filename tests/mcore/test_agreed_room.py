"""Rows of a block that ranks agree on: enough for the most of any of them, never more than there are tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Ranks = Callable[..., list[Any]]


def agreed() -> list[Any]:
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import Peers
    from fluid_npu.mcore.agreed_room import AgreedRoom

    room, rank = AgreedRoom(Peers.of(dist.group.WORLD)), dist.get_rank()
    found: list[Any] = []
    room.observe([900 if rank else 400, 100], [1000, 2000])
    room.observe([300, 100 if rank else 140], [1000, 2000])
    found.append(room.settle(torch.device("cpu")))
    found.append(room.rows_for([1000, 2000]))  # nothing is kept to yet
    with room.kept_to():
        found += [room.rows_for([1000, 2000]), room.rows_for([1000, 1000])]
    short = torch.tensor(rank == 1)
    found += [room.suffices(~short & short), room.suffices(short)]
    with room.kept_to(recorded=True):
        room.ask()
        found += [room.suffices(short), room.sufficed()]
        room.ask()
        found += [room.suffices(short & ~short), room.sufficed()]
    room.forget()
    with room.kept_to():
        found.append(room.rows_for([1000, 2000]))
    for _ in range(6):
        room.observe([400, 140], [1000, 2000])
        room.settle(torch.device("cpu"))
    with room.kept_to():
        found.append(room.rows_for([1000, 2000]))
    room.observe([5], [10 + rank])
    found.append(room.settle(torch.device("cpu")))
    return found


def test_all_ranks_keep_to_the_same_rows_and_know_whether_they_suffice(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, agreed)
    assert first == second
    failed, before, kept, of_other_tokens, fits, lacks, *rest = first
    assert failed == "" and before is None and of_other_tokens is None
    assert kept == [960, 160], "900 + 30 + 28 in units of 16; 140 + 11 + 4"
    assert fits and not lacks, "one rank without room is enough"
    goes_on, sufficed, goes_on_too, sufficed_too, forgotten, grown, uneven = rest
    assert goes_on and not sufficed and goes_on_too and sufficed_too
    assert forgotten is None and grown == [528, 192], "400 + 20 + 100; 140 + 11 + 35: a quarter at most"
    assert "different numbers of tokens ([11] and [10] among them)" in uneven
