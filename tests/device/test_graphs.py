"""Recordings are given back before the process groups end: NCCL does not end a communicator that one has recorded."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from fluid_npu.device.graphs import bytes_of_pool, release_at_the_end
from tests.support.ranks import run_ranks


class Recorded:
    """A recording that knows whether groups lived when it was given back."""

    def __init__(self) -> None:
        self.groups_lived: list[bool] = []

    def reset(self) -> None:
        self.groups_lived.append(dist.is_initialized())


def end_groups(store: str) -> tuple[list[bool], list[bool], list[bool]]:
    """What two recordings saw when a part of the groups ended, and when all did."""
    first, second = Recorded(), Recorded()
    release_at_the_end(first)
    release_at_the_end(second)
    dist.destroy_process_group(dist.new_group([0]))
    of_a_part = list(first.groups_lived)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)  # for the end of the test
    return of_a_part, first.groups_lived, second.groups_lived


def test_recordings_are_given_back_once_before_all_groups_end(tmp_path: Path) -> None:
    (found,) = run_ranks(1, end_groups, str(tmp_path / "store"))
    assert found == ([], [True], [True])


def test_the_memory_of_a_recorder_is_that_of_its_pool_alone() -> None:
    sizes = {(0, 0): [900], (1, 0): [7, 20], (2, 0): [300]}
    segments = [{"segment_pool_id": list(pool), "total_size": n} for pool, all_ in sizes.items() for n in all_]
    assert bytes_of_pool(segments, (1, 0)) == 27 and bytes_of_pool(segments, (3, 0)) == 0
