"""One rank's place in the job: device, process groups, random states, progress board."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.adaptor import adapt
from fluid_npu.comm.guard import collective
from fluid_npu.comm.progress import ProgressBoard
from fluid_npu.device import Device, get_device
from fluid_npu.probes import installed
from fluid_npu.train.config import TrainConfig

_LET_GO_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands. ``dp`` counts ranks that see different samples, ``cp`` those that share one."""

    rank: int
    world: int
    local_rank: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    device: Device
    board: ProgressBoard

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def phase(self, name: str, *, watched: bool = True) -> collective:
        """Names a phase of collectives over all ranks, for error messages."""
        return collective(name, range(self.world), watched=watched)


def join(config: TrainConfig, store: dist.Store | None = None) -> Place:
    """Enters the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe and sets up Megatron.

    A default process group that exists already is used, with ``store`` for the progress board. Raises
    DeviceUnavailable for a device that is not here.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = get_device(config.device).announce("device").value
    device.set_current(local_rank)
    without_te = [] if installed("transformer_engine").value else ["no_te"]
    adapt({"cpu": ["cpu"], "npu": ["npu"]}.get(device.name, without_te))
    if not dist.is_initialized():
        # NCCL warns about its barrier when it has to guess the device.
        bound = device.torch_device(local_rank) if device.name == "cuda" else None
        dist.init_process_group(device.backend, timeout=timedelta(seconds=config.timeout), device_id=bound)
    board = ProgressBoard(store or _own_store(config), rank, world, timeout_s=config.timeout).start()
    return Place(rank=rank, world=world, local_rank=local_rank, device=device, board=board, **_init_megatron(config))


def leave(place: Place) -> None:
    """Ends the process groups in order."""
    with place.phase("closing barrier"):
        dist.barrier()
    place.board.stop()
    # A thread of gloo may still drop its last tensor, for which it needs the GIL; torch 2.7 joins it with the GIL held.
    time.sleep(_LET_GO_S)
    dist.destroy_process_group()


def _own_store(config: TrainConfig) -> dist.TCPStore:
    """A second connection to the job's store: a blocked call on the first one holds its lock."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=min(config.timeout, 10.0)),
    )


def _init_megatron(config: TrainConfig) -> dict[str, int]:
    """Makes the process groups; this rank's place in those that matter to the data."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=1,
    )
    # Pipeline stages hold different layers and must not start from the same numbers.
    seed = config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
        "cp_size": parallel_state.get_context_parallel_world_size(),
    }
