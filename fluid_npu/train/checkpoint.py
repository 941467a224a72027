"""Saves and restores a whole run, bit for bit: weights, optimizer, schedule, random states, position in the data.

The format is Megatron's ``dist_checkpointing`` (torch_dist); when a directory counts as complete is decided in
``checkpoint_files``. Every function is collective: all ranks call it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from fluid_npu.train.checkpoint_files import (
    CheckpointError,
    damage,
    discard_on_failure,
    finish,
    folder_of,
    is_full_disk,
    latest_checkpoint,
    prune,
    start_writing,
)
from fluid_npu.train.checkpoint_writer import InProcessSave
from fluid_npu.train.config import ConfigError, TrainConfig, differing_flag
from fluid_npu.train.data.build import info
from fluid_npu.train.optimizer import allocate_states, load_optimizer
from fluid_npu.train.parallel import Place

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint holds. ``chunks`` are the modules inside DDP, one without virtual pipeline stages."""

    chunks: Sequence[MegatronModule]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def save(config: TrainConfig, place: Place, state: RunState, step: int) -> Path:
    """Writes the checkpoint after ``step`` steps. Raises CheckpointError on all ranks when one cannot write."""
    folder = folder_of(config.out)
    with place.phase("checkpoint"):
        work = Path(_on_rank_0(place, lambda: str(start_writing(folder, step))))
        with discard_on_failure(work):
            _write(config, place, state, step, work)
        final = _on_rank_0(place, lambda: str(_publish(folder, work)))
    return Path(final)


def restore(config: TrainConfig, place: Place, state: RunState) -> int:
    """Loads the newest complete checkpoint and returns its step; 0 when there is none.

    Raises ConfigError when the run differs from the one that wrote it.
    """
    with place.phase("restore from checkpoint"):
        chosen = _on_rank_0(place, lambda: _choose(config))
        if chosen is None:
            return 0
        content = _load_common(chosen)
        difference = differing_flag(json.loads(content["config"]), config)
        if difference is not None:
            raise ConfigError(difference)
        if content["data"] != _data_digest(config):
            raise ConfigError(
                f"--data {config.data}: the checkpoint was written with other data (sha256 {content['data'][:12]}...); "
                "resume with the data set that the run began with"
            )
        return _load(place, state, chosen)


def _choose(config: TrainConfig) -> str | None:
    folder = folder_of(config.out)
    chosen = latest_checkpoint(folder)
    for other in sorted(folder.glob("step_*")) if folder.is_dir() else []:
        problem = None if other.name.endswith(".tmp") else damage(other)
        if problem is not None:
            print(f"ignored: {problem}", flush=True)
    return None if chosen is None else str(chosen)


def _write(config: TrainConfig, place: Place, state: RunState, step: int, work: Path) -> None:
    content = {**_sharded(place, state, loading=False), "step": step, "config": config.to_json()}
    content["data"] = _data_digest(config)
    try:
        dist_checkpointing.save(content, str(work), sharded_strategy=InProcessSave())
    except BaseException as error:
        # torch's CheckpointException is no Exception; only the coordinator's knows the reason.
        if type(error).__name__ != "CheckpointException" or is_full_disk(error):
            raise
        raise CheckpointError(f"{work}: the checkpoint could not be written: {error}") from None


def _publish(folder: Path, work: Path) -> Path:
    with discard_on_failure(work):
        final = finish(work)
    prune(folder)
    return final


def _data_digest(config: TrainConfig) -> str:
    """Of the tokens: the path may change, the data may not."""
    assert config.data is not None
    return info(config.data, checksum=False).sha256[".bin"]


def _load_common(checkpoint: str) -> dict[str, Any]:
    common: dict[str, Any] = dist_checkpointing.load_common_state_dict(checkpoint)
    return common


def _load(place: Place, state: RunState, checkpoint: str) -> int:
    allocate_states(state.optimizer)
    content = dist_checkpointing.load(_sharded(place, state, loading=True), checkpoint)
    for key, chunk in _named_chunks(state):
        chunk.load_state_dict(content[key])
    load_optimizer(state.optimizer, content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    _set_random_states(place, content["random_states"])
    return int(content["step"])


def _sharded(place: Place, state: RunState, *, loading: bool) -> dict[str, Any]:
    """The state dict in Megatron's sharded form; for loading its tensors are the targets."""
    models = {key: chunk.sharded_state_dict(metadata=_METADATA) for key, chunk in _named_chunks(state)}
    return {
        **models,
        "optimizer": state.optimizer.sharded_state_dict(models, is_loading=loading, metadata=_METADATA),
        "scheduler": state.scheduler.state_dict(),
        "random_states": ShardedObject(
            "random_states", _random_states(place), (place.world,), (place.rank,), replica_id=0
        ),
    }


def _named_chunks(state: RunState) -> list[tuple[str, MegatronModule]]:
    """As Megatron-LM names them: 'model', or 'model0' and so on."""
    if len(state.chunks) == 1:
        return [("model", state.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(state.chunks)]


def _random_states(place: Place) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": place.device.get_rng_state(),
        "device_name": place.device.name,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(place: Place, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    written_on = states.get("device_name", place.device.name)
    if written_on != place.device.name:  # each kind of device has generators of its own
        if place.first:
            print(f"random states of the {written_on} are not restored on the {place.device.name}", flush=True)
        return
    place.device.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["megatron"])


def _on_rank_0(place: Place, work: Callable[[], Any]) -> Any:
    """Result of ``work`` done by rank 0 alone; its failure is raised on every rank."""
    answer: list[Any] = [None, None]
    cause: BaseException | None = None
    if place.first:
        try:
            answer = [None, work()]
        except (OSError, CheckpointError) as error:
            answer, cause = [_explain(error), None], error
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise CheckpointError(answer[0]) from cause
    return answer[1]


def _explain(error: OSError | CheckpointError) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if is_full_disk(error):
        return f"--out: cannot write a checkpoint, the disk is full ({error}); free some space, then --resume"
    return f"--out: cannot write a checkpoint ({error}); check the directory's permissions"
