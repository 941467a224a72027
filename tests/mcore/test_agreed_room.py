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
    found.append(room.settle(torch.zeros(1)))
    found.append(room.rows_for([1000, 2000]))  # nothing is kept to yet
    with room.kept_to():
        found += [room.rows_for([1000, 2000]), room.rows_for([1000, 1000])]
    short = torch.tensor([[rank == 1, 3, 5]], dtype=torch.int32)
    found.append(room.sufficed())  # nothing kept to it yet
    for told in (short, torch.tensor([[0, 3, 5]], dtype=torch.int32)):
        for replay in (False, True):
            room.ask(replay)
            room.tell(told)
            found.append(room.sufficed())
    room.forget()
    with room.kept_to():
        found.append(room.rows_for([1000, 2000]))
    for _ in range(6):
        room.observe([400, 140], [1000, 2000])
        room.settle(torch.zeros(1))
    with room.kept_to():
        found.append(room.rows_for([1000, 2000]))
    room.observe([5], [10 + rank])
    found.append(room.settle(torch.zeros(1)))
    return found


def test_all_ranks_keep_to_the_same_rows_and_know_whether_they_suffice(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, agreed)
    assert first == second
    failed, before, kept, of_other_tokens, unasked, *rest = first
    assert failed == "" and before is None and of_other_tokens is None and unasked
    assert kept == [960, 160], "900 + 30 + 28 in units of 16; 140 + 11 + 4"
    lacks, lacks_in_replay, fits, fits_in_replay, forgotten, grown, uneven = rest
    assert not lacks and not lacks_in_replay, "one rank without room is enough"
    assert fits and fits_in_replay
    assert forgotten is None and grown == [528, 192], "400 + 20 + 100; 140 + 11 + 35: a quarter at most"
    assert uneven == "ranks have different numbers of tokens: rank 0 [10], rank 1 [11]"


def alone() -> str:
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import Peers
    from fluid_npu.mcore import agreed_room

    agreed_room._TIMEOUT_S = 0.2
    room = agreed_room.AgreedRoom(Peers.of(dist.group.WORLD))
    room.observe([5], [10])
    if dist.get_rank() == 0:
        try:
            room.settle(torch.zeros(1))
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_rank_that_does_not_come_to_agree_is_named(run_ranks: Ranks) -> None:
    message, _ = run_ranks(2, alone)
    assert message.startswith("rank 0 agrees on sizes to record a layer with, but rank 1 did not come to it in 0 s")
