"""Megatron's optimizer and learning-rate schedule, and which Adam is behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fluid_npu.adaptor.providers.detect import detect_apex
from fluid_npu.device import Choice
from fluid_npu.train.config import ConfigError, TrainConfig, dense_stages
from fluid_npu.train.model import TORCH_DTYPES


def build_optimizer(config: TrainConfig, chunks: list[Any], dtype: str) -> MegatronOptimizer:
    """Adam with gradient clipping; fp32 main parameters for bf16 and fp16, dynamic loss scaling for fp16.

    Raises ConfigError for a combination that Megatron could train but not save.
    """
    without = dense_stages(config)
    if config.distributed_optimizer and without and adam_in_use().value == "torch":
        raise ConfigError(
            f"--distributed-optimizer: with --pp {config.pp} the first {without} stage(s) have no experts, "
            "and Megatron cannot save such a stage over torch's Adam; leave it out, or use a smaller --pp"
        )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=TORCH_DTYPES[dtype],
        initial_loss_scale=2.0**16,
        loss_scale_window=200,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=config.distributed_optimizer,
    )
    return get_megatron_optimizer(settings, chunks)


def build_scheduler(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then a cosine to ``min_lr``; it counts steps."""
    decay = config.decay_steps
    warmup = min(config.warmup_steps, decay - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / max(warmup, 1),  # a first step at 0 would be lost
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )


def allocate_states(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam its states before a checkpoint is loaded into it.

    Megatron's distributed optimizer asks an Adam that has not stepped yet for its step count and fails
    (0.16.1, ``DistributedOptimizer.state_dict``, only without Transformer Engine and Apex).
    """
    for part in _over_torch_adam(optimizer):
        for parameter in _parameters(part):
            state = part.optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: MegatronOptimizer, content: Any) -> None:
    """``optimizer.load_state_dict`` that also works for the distributed optimizer over torch's Adam.

    There 0.16.1 looks for a saved ``step`` per parameter, which it does not save, and gives all parameters one
    shared step tensor, which Adam would then raise once for each of them.
    """
    held_back = []
    parts = _parts(optimizer)
    states = [content] if len(parts) == 1 else [content[index] for index in sorted(content)]
    for part, state in zip(parts, states, strict=True):
        if part in _over_torch_adam(optimizer):
            held_back.append((part, state.pop("param_state")))
    optimizer.load_state_dict(content)
    for part, parameter_states in held_back:
        steps = {parameter: part.optimizer.state[parameter].pop("step") for parameter in _parameters(part)}
        part.load_parameter_state_from_fully_reshardable(parameter_states)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = step.clone()


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _over_torch_adam(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers whose inner optimizer is torch's."""
    return [
        part
        for part in _parts(optimizer)
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)
    ]


def _parameters(part: Any) -> Iterator[torch.Tensor]:
    return (parameter for group in part.optimizer.param_groups for parameter in group["params"])


def adam_in_use() -> Choice[str]:
    """Which Adam Megatron took, and why: 'te', 'apex', 'torch', or the package that put its own in their place.

    MindSpeed plants an empty ``apex`` with an optimizer of its own as ``apex.optimizers.FusedAdam``.
    """
    from megatron.core import optimizer as megatron_optimizer

    adam = getattr(megatron_optimizer, "Adam", torch.optim.AdamW)
    package = adam.__module__.split(".")[0]
    if package == "transformer_engine":
        return Choice("te", "Transformer Engine is installed")
    if package == "apex":
        return Choice("apex", "NVIDIA Apex is installed, Transformer Engine is not")
    if package != "torch":
        return Choice(package, f"Megatron took {adam.__module__}.{adam.__qualname__} for apex.optimizers.FusedAdam")
    return Choice("torch", f"Transformer Engine is not usable, and {_APEX[detect_apex().state]}")


_APEX = {
    "absent": "NVIDIA Apex is not installed",
    "impostor": "the installed 'apex' is PyPI's unrelated package, not NVIDIA's",
    "dummy": "'apex' is MindSpeed's dummy module, planted after Megatron's optimizer was imported",
    "apex": "NVIDIA Apex is installed but its FusedAdam cannot be imported",
}
