"""What the simulator makes go wrong on request, and that the survivors say so by name: peers that die, hang or answer
late, memory that is exhausted, operators that are not simulated, memory that is read after it was freed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.train.exit_codes import RANK_LOST
from fluid_npu.train.launch import run_code
from tests.support.ranks import RankError, run_ranks
from tests.support.training import store, tiny


def exchange(folder: str = "") -> list[float]:
    """Six AllToAlls, each of what the one before brought; what the device reports is raised at the end."""
    from fluid_npu.comm.guard import is_communication

    if folder:
        errors_to(f"{folder}/{dist.get_rank()}.txt")
    x = torch.arange(4.0).npu() + 10 * dist.get_rank()
    begin_together()
    try:
        for _ in range(6):
            y = torch.empty_like(x)
            dist.all_to_all_single(y, x, async_op=True).wait()
            x = y + 1
        torch.npu.synchronize()
    except RuntimeError as error:
        assert is_communication(error), error
        raise
    return x.tolist()


def begin_together() -> None:
    """Waits for the other rank on the host: one that starts late would be taken for one that does not answer."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"begins{dist.get_rank()}", "")
    store.wait(["begins0", "begins1"])


def failure(function: Callable[..., Any], *args: Any, grace: float = 2.0, **env: str) -> str:
    """What the ranks of a run that fails say; ``grace``: how long one may take that notices a dead peer."""
    with pytest.raises(RankError) as caught:
        run_ranks(2, function, *args, env=env, grace=grace)
    return str(caught.value)


def survivor(folder: Path, grace: float = 2.0, **env: str) -> tuple[str, str]:
    """What the ranks of an exchange that fails say, and what rank 0 printed.

    Where it is faster, torch_npu's watchdog aborts the survivor before the error is raised, as it does on hardware.
    """
    text = failure(exchange, str(folder), grace=grace, **env)
    said = (folder / "0.txt").read_text()
    assert "error code is 507048" in text or "HCCL watchdog" in said, text + said
    return text, said


def test_a_peer_that_dies_is_named(tmp_path: Path) -> None:
    text, said = survivor(tmp_path, grace=60, FLUID_SIM_FAULT="die:1:3")
    assert "rank 1: died without an answer, exit code -9" in text
    assert re.search(r"\[fluid-sim\] rank 0: HcclAlltoAll on .*: rank 1 is gone", said), said


def test_a_peer_that_hangs_is_named(tmp_path: Path) -> None:
    _, said = survivor(tmp_path, FLUID_SIM_FAULT="hang:1:3", FLUID_SIM_HCCL_TIMEOUT="2")
    assert re.search(r"HcclAlltoAll on .*: rank 1 did not answer in 2 s \(FLUID_SIM_HCCL_TIMEOUT\)", said), said


def test_a_peer_that_is_late_is_waited_for_until_the_time_out(tmp_path: Path) -> None:
    right = run_ranks(2, exchange)
    assert run_ranks(2, exchange, env={"FLUID_SIM_FAULT": "late:1:3"}) == right
    _, said = survivor(tmp_path, FLUID_SIM_FAULT="late:1:3", FLUID_SIM_HCCL_TIMEOUT="1")
    assert "rank 1 did not answer in 1 s" in said


def errors_to(path: str) -> None:
    """What this process and its libraries print as errors goes to a file."""
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def train_to_its_exit_code(config_text: str, folder: str) -> None:
    """The trainer's rank, whose exit code becomes this process's."""
    from fluid_npu.train import parallel
    from fluid_npu.train.config import TrainConfig
    from fluid_npu.train.worker import run_rank

    board = store()
    parallel._own_store = lambda config: board
    errors_to(f"{folder}/{dist.get_rank()}.txt")
    os._exit(run_rank(TrainConfig.from_json(config_text)))


@pytest.mark.parametrize("fault", ["die:1:60", "hang:1:60"])
def test_the_trainer_ends_with_its_code_for_a_lost_rank(fault: str, tmp_path: Path) -> None:
    """The survivor ends with that code, or torch_npu's watchdog is faster and aborts it, as it does on hardware; the
    launcher makes the same of both."""
    config = tiny(tmp_path / "run", steps=8, timeout=20.0)
    Path(config.out).mkdir()
    env = {"FLUID_SIM_FAULT": fault, "FLUID_SIM_HCCL_TIMEOUT": "2"}
    grace = 60.0 if fault.startswith("die") else 2.0
    text = failure(train_to_its_exit_code, config.to_json(), str(tmp_path), grace=grace, **env)
    ended = re.search(r"rank 0: died without an answer, exit code (4|-6)", text)
    assert ended, text
    said = (tmp_path / "0.txt").read_text()
    assert re.search(r"rank 0: Hccl\w+ on .*: rank 1 (is gone|did not answer in 2 s)", said), said
    assert ("fluid-npu train: rank 0: " if ended[1] == "4" else "HCCL watchdog") in said and "Traceback" not in said, (
        said
    )
    assert run_code({0: int(ended[1]), 1: -9}, stopped=[1] if "hang" in fault else []) == RANK_LOST


def stopped(folder: str, call: str) -> None:
    """Runs a statement whose end is the process's; what it prints goes to a file."""
    errors_to(f"{folder}/stderr")
    import torch_npu

    exec(call, {"torch": torch, "torch_npu": torch_npu, "x": torch.ones(2, 8).half().npu()})
    torch.npu.synchronize()


def test_an_operator_that_is_not_simulated_ends_the_process_by_name(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code 99"):
        # Not in the operator log, where it would be a fault of the suites.
        run_ranks(1, stopped, str(tmp_path), "torch_npu.npu_fast_gelu(x)", env={"FLUID_SIM_LOG": ""})
    assert re.search(r"\[fluid-sim\] rank 0: .*FastGelu.* is not simulated", (tmp_path / "stderr").read_text())


@pytest.mark.parametrize("fault", ["explode:1:3", "die:1", "die"])
def test_a_fault_that_cannot_be_is_refused_by_name(fault: str) -> None:
    assert "exit code 99" in failure(exchange, FLUID_SIM_FAULT=fault)


def too_much() -> str:
    """Allocates more than there is, and goes on."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(80 << 20, dtype=torch.uint8, device="npu")
    assert float(torch.ones(1 << 20).npu().sum()) == 1 << 20
    return str(caught.value)


def test_memory_that_is_exhausted_raises_torch_s_own_error() -> None:
    (text,) = run_ranks(1, too_much, env={"FLUID_SIM_HBM_MB": "64"})
    assert "NPU out of memory" in text and "64.00 MiB total capacity" in text


def read_after_free() -> tuple[bool, bool, bool]:
    """Whether a view that outlives its memory was right before, is NaN after the free, and new memory is NaN too."""
    x = torch.ones(64).npu()
    torch.npu.synchronize()
    memory = torch._C._construct_storage_from_data_pointer(x.data_ptr(), x.device, 256)
    typed = torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32, _internal=True)
    stale = torch.empty(0, device="npu").set_(typed)
    before = bool((stale == 1).all())
    del x
    after = bool(stale[32:].isnan().all())
    return before, after, bool(torch.empty(64, device="npu").isnan().all())


def test_poison_makes_a_read_after_free_and_before_a_write_nan() -> None:
    """Without the cache: torch_npu's allocator then gives every block back, after it has drained the device."""
    uncached = {"PYTORCH_NO_NPU_MEMORY_CACHING": "1"}
    assert run_ranks(1, read_after_free, env={"FLUID_SIM_POISON": "1", **uncached}) == [(True, True, True)]


def chip() -> tuple[str, float]:
    """The chip's name, and the sum of a grouped product on it."""
    from fluid_npu.ops.grouped_matmul import npu_gmm

    y = npu_gmm(torch.ones(3, 4).npu(), torch.ones(2, 4, 5).npu(), group_list=[1, 3])
    return torch.npu.get_device_name(0), float(y.sum())


def test_another_chip_is_seen_and_computes() -> None:
    assert run_ranks(1, chip, env={"FLUID_SIM_SOC": "Ascend910_9392"}) == [("Ascend910_9392", 60.0)]
