"""dispatch='static' on GPUs: no wait of the host, and the same bits when the layer is recorded and replayed.

Two ranks need two GPUs; one rank, which holds all experts, needs one.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.recorded_layer import Steps, run_steps

pytestmark = pytest.mark.cuda

CASES = [
    Steps(dtype=torch.bfloat16, device="cuda"),
    Steps(dtype=torch.bfloat16, device="cuda", overlap="off", topk=1),
    Steps(dtype=torch.float32, device="cuda", recompute=True, aux=True),
    Steps(dtype=torch.bfloat16, device="cuda", tokens=1000, topk=8),
]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RANKS = [1, pytest.param(2, marks=TWO_GPUS)]
FIRST = Steps(dtype=torch.bfloat16, device="cuda", overlap="full", local_first=True)
#: Of several ranks alone.
BETWEEN_RANKS = [replace(CASES[0], high_priority=True), FIRST, replace(FIRST, high_priority=True, tokens=1000, topk=8)]


class NoWait:
    """Whatever makes the host wait for the GPU raises; a context to be entered again and again."""

    def __enter__(self) -> None:
        self._before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode(self._before)


def _on_nccl(store: str) -> None:
    """Megatron's groups over NCCL, in the place of the gloo group of the test's processes."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.FileStore(store, world), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)


def both(cases: list[Steps], store: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each case as ever and recorded, without a wait of the host once kernels are chosen and the layer is recorded."""
    os.environ.setdefault("FLUID_ROW_KERNELS", "triton")
    _on_nccl(store)
    found = []
    for case in cases:
        case = replace(case, ep=int(os.environ["WORLD_SIZE"]))
        pair = run_steps(case, NoWait()), run_steps(replace(case, graph=True), NoWait(), watch_from=2)
        found.append(tuple(_on_host(run) for run in pair))
    return found


def ends(case: Steps, store: str) -> bool:
    """Records a layer, and ends the process groups while its recordings live; whether that came to an end."""
    import torch.distributed as dist

    from fluid_npu.device.choice import Choice
    from fluid_npu.device.graphs import CudaGraphRecorder
    from fluid_npu.mcore import graph_choice

    kept: list[Any] = []

    class Keeping(CudaGraphRecorder):
        def record(self, body: Any) -> Any:
            kept.append(super().record(body))
            return kept[-1]

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("FLUID_ROW_KERNELS", "triton")
    _on_nccl(store)
    graph_choice.graph_recorder = lambda device: Choice(Keeping, "kept")
    run_steps(replace(case, graph=True, ep=world, kept=False))
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{store}-end", world), rank=rank, world_size=world)
    return len(kept) == 2


def _on_host(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "tensors": {name: tensor.cpu() for name, tensor in run["tensors"].items()}}


@pytest.mark.parametrize("ranks", RANKS)
def test_a_recorded_layer_has_the_bits_of_the_layer_as_ever(ranks: int, tmp_path: Path) -> None:
    _check(ranks, CASES, tmp_path)


@TWO_GPUS
def test_so_it_has_with_local_rows_first_and_at_high_priority(tmp_path: Path) -> None:
    _check(2, BETWEEN_RANKS, tmp_path)


def _check(ranks: int, cases: list[Steps], folder: Path) -> None:
    for found in run_ranks(ranks, both, cases, str(folder / "store"), timeout=300, start="spawn"):
        for case, (eager, recorded) in zip(cases, found, strict=True):
            assert recorded["recorded"] and not eager["recorded"], case
            assert recorded["held"] > 0 == eager["held"], case
            for name, wanted in eager["tensors"].items():
                assert torch.equal(recorded["tensors"][name], wanted), (case, name)
            for name in ("a2a_count", "a2a_bytes", "total_dw_tasks", "completed_dw_tasks"):
                assert recorded["stats"][name] == eager["stats"][name], (case, name)


#: Sizes that depend on the routing, recorded with room for more; fp32, so that other kernels differ little.
ONCE = [
    replace(
        FIRST, dtype=torch.float32, dispatch="once-per-rank", tokens=1000, topk=1, rate=1e-3, chunks=chunks, steps=4
    )
    for chunks in (1, 2)
]
ONCE += [replace(ONCE[0], high_priority=True, topk=2), replace(ONCE[0], overlap="dw", local_first=False, chunks="auto")]


def both_once(cases: list[Steps], store: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """As ``both``; told sizes are waited for, a recorded layer's are not."""
    os.environ.setdefault("FLUID_ROW_KERNELS", "triton")
    _on_nccl(store)
    pairs = ((run_steps(case), run_steps(replace(case, graph=True), NoWait(), watch_from=3)) for case in cases)
    return [(_on_host(eager), _on_host(recorded)) for eager, recorded in pairs]


@TWO_GPUS
def test_sizes_that_depend_on_the_routing_are_recorded_with_room(tmp_path: Path) -> None:
    for found in run_ranks(2, both_once, ONCE, str(tmp_path / "store"), timeout=300, start="spawn"):
        for case, (eager, recorded) in zip(ONCE, found, strict=True):
            assert recorded["recorded"], case
            for name, wanted in eager["tensors"].items():
                error = (recorded["tensors"][name].double() - wanted.double()).norm() / wanted.double().norm()
                assert error < 1e-5, (case, name, float(error))


@pytest.mark.parametrize("high_priority", [False, True])
def test_process_groups_end_while_a_recording_is_alive(high_priority: bool, tmp_path: Path) -> None:
    ranks, case = min(2, torch.cuda.device_count()), replace(CASES[0], high_priority=high_priority)
    assert run_ranks(ranks, ends, case, str(tmp_path / "store"), timeout=100, start="spawn") == [True] * ranks


def many(steps: int, store: str) -> tuple[int, int]:
    """Bytes allocated after a few replays, and after many."""
    _on_nccl(store)
    case = replace(CASES[0], graph=True, ep=int(os.environ["WORLD_SIZE"]), kept=False)
    levels = []
    for number in (4, steps):
        run_steps(replace(case, steps=number))
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
    return levels[0], levels[1]


@pytest.mark.parametrize("ranks", RANKS)
def test_replays_keep_no_memory(ranks: int, tmp_path: Path) -> None:
    for few, more in run_ranks(ranks, many, 60, str(tmp_path / "store"), timeout=300, start="spawn"):
        assert more <= few + (1 << 20)
