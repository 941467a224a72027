"""Bytes that a real model of Megatron holds on a rank, to compare the estimate of fluid_npu.cluster with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fluid_npu.train.config import TrainConfig


def measure(config: TrainConfig, dtype: str) -> dict[str, int]:
    """Parameters, gradients, optimizer states, and what layers and their parts keep for the backward, in bytes."""
    from fluid_npu.train.model import build_model, build_model_config
    from fluid_npu.train.optimizer import allocate_states, build_optimizer
    from fluid_npu.train.step import wrap_ddp

    model_config = build_model_config(config, dtype)
    model = build_model(config, model_config, config.overlap)
    ddp = wrap_ddp(config, model_config, model)
    optimizer = build_optimizer(config, [ddp], dtype)
    allocate_states(optimizer)
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "gradients": _bytes(buffer.grad_data for buffer in buffers),
        "optimizer": _states(optimizer, [*(buffer.param_data for buffer in buffers)]),
    }
    layer = model.decoder.layers[-1]
    preset = config.model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shape = (preset.seq_length, preset.micro_batch_size, preset.hidden)
    hidden = torch.randn(shape, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, requires_grad=True)
    mask = torch.ones(1, 1, preset.seq_length, preset.seq_length, dtype=torch.bool).triu_(1)
    found["experts"] = kept_bytes(lambda: layer.mlp(hidden), weights)
    found["rows"] = sum(layer.mlp.token_dispatcher.plan(*_routing(layer.mlp, hidden)).tokens_per_expert)
    found["layer"] = kept_bytes(lambda: layer(hidden, attention_mask=mask), weights)
    return found


def kept_bytes(call: Callable[[], Any], weights: set[int]) -> int:
    """Bytes of the storages that autograd keeps after ``call``, each counted once, weights not counted."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call()  # kept alive: a storage that is freed could lend its address to another
    del output
    return sum(kept.values())


def _routing(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
    with torch.no_grad():
        return layer.router(hidden)[1], hidden.shape


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _states(optimizer: Any, weights: Iterable[torch.Tensor]) -> int:
    """Adam's moments and the fp32 master weights that are not the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        total += _bytes(value for state in inner.state.values() for value in state.values() if value.dim())
        masters = [weight for group in inner.param_groups for weight in group["params"]]
        total += _bytes(weight for weight in masters if weight.untyped_storage().data_ptr() not in own)
    return total
