"""Checkpoints of grouped experts in the form that SequentialMLP and the legacy GroupedMLP write.

On disk an expert's weights are ``linear_fc1.weight [2F, H]`` (gate rows, then value rows) and
``linear_fc2.weight [H, F]``, stacked over all experts, or one key per expert with ``singleton_local_shards``. In memory
they are ``[L, H, 2F]`` and ``[L, F, H]``: the transpose. Contract read from megatron-core 0.16.1,
``transformer/moe/experts.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.nn.parameter import Parameter


class GroupedExperts(Protocol):
    """What is read of the experts module."""

    num_local_experts: int
    config: Any
    ep_group: Any
    tp_group: Any
    dp_group: Any
    weight1: Parameter
    weight2: Parameter
    fc1_view: tuple[int, int, int]
    fc2_view: tuple[int, int, int]


def forget_extra_state(_module: Any, incompatible_keys: Any) -> None:
    """Drops the ``_extra_state`` keys that SequentialMLP's linear layers write and grouped experts do not have."""
    keys = incompatible_keys.unexpected_keys
    keys[:] = [key for key in keys if "_extra_state" not in key]


def expert_sharded_state_dict(
    experts: GroupedExperts, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """One factory per weight, and the empty extra states of SequentialMLP's linear layers."""
    singletons = bool((metadata or {}).get("singleton_local_shards", False))
    shard = _Shard(experts, prefix, sharded_offsets, singletons)
    fc1 = shard.factory("weight1", "linear_fc1", experts.weight1, experts.fc1_view, experts.config.gated_linear_unit)
    fc2 = shard.factory("weight2", "linear_fc2", experts.weight2, experts.fc2_view, False)
    return {f"{prefix}weight1": fc1, f"{prefix}weight2": fc2, **shard.extra_states()}


class _Shard:
    """Where this rank's experts stand among all."""

    def __init__(self, experts: GroupedExperts, prefix: str, offsets: tuple[Any, ...], singletons: bool) -> None:
        self.prefix, self.offsets, self.singletons = prefix, offsets, singletons
        self.local = experts.num_local_experts
        self.ep_rank, self.ep_size = experts.ep_group.rank(), experts.ep_group.size()
        self.tp_rank, self.tp_size = experts.tp_group.rank(), experts.tp_group.size()
        self.dp_rank = experts.dp_group.rank()

    def factory(
        self, name: str, linear: str, parameter: Parameter, view: tuple[int, int, int], gated: bool
    ) -> ShardedTensorFactory:
        """Builds the shards of one weight from its storage, and the storage from loaded shards."""
        # FC1 is split over tensor ranks along its outputs, FC2 along its inputs: rows and columns on disk.
        axis = 0 if name == "weight1" else 1
        return ShardedTensorFactory(
            f"{self.prefix}experts.{linear}.weight",
            parameter,
            partial(self._build, view=view, axis=axis, gated=gated),
            partial(_merge, shape=tuple(parameter.shape), gated=gated),
            (0, 0, self.dp_rank),
        )

    @torch.no_grad()
    def _build(
        self,
        key: str,
        tensor: Tensor,
        replica_id: Any,
        flattened_range: slice | None,
        *,
        view: tuple[int, int, int],
        axis: int,
        gated: bool,
    ) -> Any:
        if flattened_range is not None:
            raise NotImplementedError(
                f"{key}: flattened ranges are not supported; use a newer distributed optimizer format"
            )
        on_disk = tensor.view(view).transpose(-1, -2)
        if not gated:
            return self._shards(key, on_disk, axis, self.tp_rank, self.tp_size, replica_id)
        gate, value = on_disk.chunk(2, dim=-2)
        if self.singletons:
            parts = {
                part: self._singles(f"{key}_{part}", half, axis, self.tp_rank, self.tp_size, replica_id)
                for part, half in (("w", gate), ("v", value))
            }
            return {"singleton_local_shards": LocalNonpersistentObject(True), "data": parts}
        return [
            self._stack(key, gate, axis, self.tp_rank, 2 * self.tp_size, replica_id),
            self._stack(key, value, axis, self.tp_size + self.tp_rank, 2 * self.tp_size, replica_id),
        ]

    def _shards(self, key: str, experts: Tensor, axis: int, rank: int, size: int, replica_id: Any) -> Any:
        if not self.singletons:
            return self._stack(key, experts, axis, rank, size, replica_id)
        data = self._singles(key, experts, axis, rank, size, replica_id)
        return {"singleton_local_shards": LocalNonpersistentObject(True), "data": data}

    def _stack(self, key: str, experts: Tensor, axis: int, rank: int, size: int, replica_id: Any) -> ShardedTensor:
        depth = len(self.offsets)
        return ShardedTensor.from_rank_offsets(
            key,
            experts.contiguous(),
            *self.offsets,
            (depth, self.ep_rank, self.ep_size),
            (depth + 1 + axis, rank, size),
            replica_id=replica_id,
            prepend_axis_num=depth,
        )

    def _singles(
        self, key: str, experts: Tensor, axis: int, rank: int, size: int, replica_id: Any
    ) -> list[ShardedTensor]:
        depth = len(self.offsets)
        return [
            ShardedTensor.from_rank_offsets(
                key.replace(f"{self.prefix}experts.", f"{self.prefix}experts.{self._number(i)}."),
                expert.contiguous(),
                *self.offsets,
                (depth + axis, rank, size),
                replica_id=replica_id,
                prepend_axis_num=depth,
            )
            for i, expert in enumerate(experts)
        ]

    def _number(self, local_index: int) -> int:
        return self.ep_rank * self.local + local_index

    def extra_states(self) -> dict[str, Any]:
        """SequentialMLP's linear layers save an empty ``_extra_state`` each; strict loading wants them."""
        states = {}
        for local_index in range(self.local):
            number = self._number(local_index)
            place = (len(self.offsets), number, self.ep_size * self.local)
            for linear in ("linear_fc1", "linear_fc2"):
                key = f"{self.prefix}experts.{number}." if self.singletons else f"{self.prefix}experts."
                states[f"{self.prefix}expert{number}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                    None,
                    f"{key}{linear}._extra_state",
                    self.offsets if self.singletons else (*self.offsets, place),
                    (0, self.tp_rank, self.dp_rank),
                )
        return states


@torch.no_grad()
def _merge(loaded: Any, *, shape: tuple[int, ...], gated: bool) -> Tensor:
    if isinstance(loaded, dict):
        data = loaded["data"]
        loaded = [torch.stack(data["w"]), torch.stack(data["v"])] if gated else torch.stack(data)
    if gated:
        loaded = torch.cat(loaded, dim=-2)
    return loaded.transpose(-1, -2).reshape(shape)
