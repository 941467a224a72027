"""Groups that ranks make by themselves: one name on all of them, and none twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Ranks = Callable[..., list[Any]]


def one_after_another() -> tuple[list[str], list[float]]:
    """Names and sums of groups that are made and ended in turn, beside a group that one rank has to itself."""
    import torch.distributed as dist

    from fluid_npu.comm.group_names import new_local_group

    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)
    names, sums = [], []
    for _ in range(3):
        group = new_local_group([0, 1], "gloo")
        total = torch.full((), 1.0 + dist.get_rank())
        dist.all_reduce(total, group=group)
        names.append(group.group_name)
        sums.append(float(total))
        dist.destroy_process_group(group)
    return names, sums


def test_a_name_is_that_of_all_ranks_and_never_used_again(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, one_after_another, timeout=60)
    assert first == second
    names, sums = first
    assert len(set(names)) == 3 and sums == [3.0] * 3
