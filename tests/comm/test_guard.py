"""Collectives that fail are named, with layer and ranks; the guard is cheap and sees through nesting."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.guard import CollectiveError, collective, is_communication, watch
from fluid_npu.comm.progress import ProgressBoard
from tests.support.ranks import RankError, run_ranks
from tests.support.training import store

#: tests/sim/test_faults.py holds what HCCL does when a rank dies or hangs.
pytestmark = pytest.mark.host


def test_a_transport_failure_names_collective_layer_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    text = r"rank 1: dispatch AllToAll of layer 3 .*waited for ranks 0, 2"
    with pytest.raises(CollectiveError, match=text) as caught, collective("dispatch AllToAll", (0, 1, 2), layer=3):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1234")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "Connection closed by peer" in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, collective("x", (0, 1)):
        raise error
    assert not isinstance(caught.value, CollectiveError)


def test_nested_collectives_restore_the_outer_one() -> None:
    assert watch.current is None
    with collective("step", (0, 1)) as outer:
        with collective("combine AllToAll", (0, 1), layer=1):
            assert "combine AllToAll of layer 1" in watch.where()
        assert watch.current is outer
    assert watch.current is None
    assert watch.where() == "outside any collective, after step"


def test_an_inner_error_is_not_named_twice() -> None:
    with pytest.raises(CollectiveError, match="inner"), collective("outer", (0, 1)), collective("inner", (0, 1)):
        raise RuntimeError("gloo timed out")


def test_it_costs_microseconds() -> None:
    rounds = 2000
    best = min(_seconds(rounds) for _ in range(5))
    assert best / rounds < 20e-6


def _seconds(rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        with collective("dispatch AllToAll", (0, 1), layer=3):
            pass
    return time.perf_counter() - start


def test_arithmetic_is_not_communication() -> None:
    assert not is_communication(RuntimeError("expected scalar type Float but found Half"))
    assert is_communication(RuntimeError("Timed out waiting 3000ms for recv operation to complete"))


def test_an_npu_that_waited_for_a_peer_in_vain_is_told_from_one_whose_kernel_failed() -> None:
    assert is_communication(RuntimeError("ACL stream synchronize failed, error code:507048"))
    assert not is_communication(RuntimeError("ACL stream synchronize failed, error code:507015"))


def wait_for_a_dead_rank() -> str:
    beat_s = 60.0 if dist.get_rank() == 2 else 0.2  # killed while its thread writes it might leave half an entry
    board = ProgressBoard(store(), dist.get_rank(), 3, interval_s=beat_s).start()
    dist.barrier()
    if dist.get_rank() == 2:
        watch.previous = "combine AllToAll of layer 7"
        board.publish()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with collective("dispatch AllToAll", (0, 1, 2), layer=4):
            dist.all_reduce(torch.ones(1))
    except CollectiveError as error:
        return str(error)
    return "no error"


def test_the_board_tells_a_dead_rank_from_the_living() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(3, describe_dead_rank, grace=60)
    text = str(caught.value)
    assert "dispatch AllToAll of layer 4" in text
    assert "rank 2 (pid" in text and "has not reported for" in text
    assert "last seen outside any collective, after combine AllToAll of layer 7" in text


def describe_dead_rank() -> None:
    raise AssertionError(wait_for_a_dead_rank())


#: Two fall into the time for which a board looks, even when the other process gets no processor for a second.
BEAT_S = 1.0


def be_late() -> str:
    board, met = ProgressBoard(store(), dist.get_rank(), 2, interval_s=BEAT_S).start(), store()
    if dist.get_rank() == 1:
        with collective("gradient reduction", (0, 1)):
            board.publish()
            met.set("rank 1 is there", "")
            met.wait(["rank 0 has asked"])
        return ""
    met.wait(["rank 1 is there"])
    text = board.blame([1])
    met.set("rank 0 has asked", "")
    return text


def test_the_board_says_where_a_living_rank_is() -> None:
    text = run_ranks(2, be_late)[0]
    assert text.startswith("waited for rank 1: rank 1 is alive, in gradient reduction")


def hang(folder: str) -> None:
    sys.stderr = open(f"{folder}/{dist.get_rank()}", "w")  # noqa: SIM115
    limit_s = 0.5 if dist.get_rank() == 0 else 0.0  # the other one has none: it is alive when it is looked for
    ProgressBoard(store(), dist.get_rank(), 2, interval_s=BEAT_S, timeout_s=limit_s).start()
    dist.barrier()
    with collective("combine AllToAll", (0, 1), layer=2):
        time.sleep(90)


def test_the_watchdog_ends_a_process_whose_collective_never_returns(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code 4"):
        run_ranks(2, hang, str(tmp_path), grace=0)
    text = (tmp_path / "0").read_text()
    assert "combine AllToAll of layer 2 (collective 1) failed" in text
    assert "rank 1 is alive" in text
