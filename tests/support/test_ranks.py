"""The multi-process helper itself: results, tracebacks, dead and stuck ranks."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_rank(), value


def expert_group() -> tuple[int, float]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

    with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
        return parallel_state.get_expert_model_parallel_world_size(), torch.rand(1).item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted failure")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_every_rank_answers_in_order() -> None:
    assert run_ranks(2, sum_of_ranks, 10) == [(0, torch.tensor([21])), (1, torch.tensor([21]))]


def test_megatron_groups_and_random_states_are_ready() -> None:
    (size0, draw0), (size1, draw1) = run_ranks(2, expert_group, sizes={"expert_model_parallel_size": 2})
    assert size0 == size1 == 2
    assert draw0 != draw1


def test_the_traceback_of_the_failing_rank_comes_first() -> None:
    with pytest.raises(RankError, match="(?s)^--- rank 1.*planted failure"):
        run_ranks(2, fail_on_one)


def test_a_dead_rank_ends_the_call() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(2, die_on_one)
    assert time.monotonic() - start < 30


def test_a_stuck_rank_shows_its_stack() -> None:
    with pytest.raises(RankError, match="die_on_one|sleep"):
        run_ranks(1, die_on_one, timeout=3)
