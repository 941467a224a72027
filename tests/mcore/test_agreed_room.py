"""What ranks agree on for a recorded dispatch: enough for the most of any of them, and told alike when it is not."""

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
    room.observe([[900, 0] if rank else [400, 990], [100, 7]], [1000, 2000], [2500, 10])
    room.observe([[300, 0], [100 if rank else 140, 3]], [1000, 2000], [100, 10 if rank else 400])
    found.append(room.settle(torch.zeros(1)))
    found.append(room.rows_for([1000, 2000]))  # nothing is kept to yet
    with room.kept_to():
        found += [room.rows_for([1000, 2000]), room.rows_for([1000, 1000])]
    found.append(room.sufficed())  # nothing kept to it yet
    blocks = [[0, 0, 0], [int(rank == 1), 0, 0]]
    # What rank 1 receives in the second chunk is as much as there is room for, and then one more.
    full, over = ([[0, 1328, 1328], [0, 0, 232 + rank * more]] for more in (0, 1))
    for numbers in (blocks, full, over):
        for replay in (False, True):
            room.ask(replay)
            room.tell(torch.tensor(numbers, dtype=torch.int32))
            found.append(room.sufficed())
    room.forget()
    with room.kept_to():
        found.append(room.rows_for([1000, 2000]))
    for _ in range(6):
        room.observe([[400, 400], [140, 140]], [1000, 2000], [800, 80])
        room.settle(torch.zeros(1))
        with room.kept_to():
            found.append(room.rows_for([1000, 2000]))
    room.observe([[5, 5]], [10 + rank], [5])
    found.append(room.settle(torch.zeros(1)))
    room.observe([[5, 5]] * 3, [10] * 3, [5] * 3)
    room.settle(torch.zeros(1))
    room.ask(True)
    room.tell(torch.zeros(3, 3, dtype=torch.int32))  # of three chunks now
    found.append(room.sufficed())
    return found


def test_all_ranks_keep_to_the_same_rows_and_know_whether_they_suffice(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, agreed)
    assert first == second
    failed, before, kept, of_other_tokens, unasked, lacks, lacks_in_replay, *rest = first
    assert failed == "" and before is None and of_other_tokens is None and unasked
    # 400 + 3 * 15.5 in units of 16; 990 + 3 * 3.1, of 1,000; 900 + 3 * 9.5; no fewer than a unit.
    assert kept.rows[0] == [[816, 1000], [944, 16]], "not 400 but the mean of three, 764"
    assert kept.rows[1] == [[176, 96], [144, 96]], "140 + 3 * 11.4; 100 + 3 * 9.7; not 7 but the mean, 64"
    assert kept.pairs == [2656, 464], "2500 + 150 in units of 16; 400 + 60: of experts, of any rank"
    assert not lacks and not lacks_in_replay, "one rank without room is enough"
    fits, fits_in_replay, over, over_in_replay, forgotten, *anew, uneven, of_three_chunks = rest
    assert not over and not over_in_replay, "one row more than the experts of a rank have room for"
    firsts, seconds = zip(*((each.rows[0][0][1], each.rows[1][1][0]) for each in anew), strict=True)
    # 400 + 47 and then a 32nd, a 16th, an 8th and a quarter, which is the most; 140 + 35 likewise; in units of 16.
    assert firsts == (464, 480, 512, 560, 560, 560)
    assert seconds == (192, 192, 192, 224, 224, 224)
    assert forgotten is None and uneven == "ranks have different numbers of tokens: rank 0 [10], rank 1 [11]"
    assert fits and fits_in_replay and of_three_chunks


def alone() -> str:
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import Peers
    from fluid_npu.mcore import agreed_room

    agreed_room._TIMEOUT_S = 0.2
    room = agreed_room.AgreedRoom(Peers.of(dist.group.WORLD))
    room.observe([[5, 5]], [10], [5])
    if dist.get_rank() == 0:
        try:
            room.settle(torch.zeros(1))
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_rank_that_does_not_come_to_agree_is_named(run_ranks: Ranks) -> None:
    message, _ = run_ranks(2, alone)
    assert message.startswith("rank 0 agrees on sizes to record a layer with, but rank 1 did not come to it in 0 s")
