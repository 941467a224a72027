"""The same model with other experts: weights copied and gradients compared by one set of names.

Every parameter has a name in the layout of Megatron's SequentialMLP, one entry per expert under its global number:
``decoder.layers.0.mlp.experts.5.linear_fc1.weight [2F, H]`` and ``...linear_fc2.weight [H, F]``. Grouped experts
(FluidGroupedMLP and Megatron's legacy GroupedMLP) hold the transposes as ``[L, H, 2F]`` and ``[L, F, H]`` in one
parameter each; their entries are views of it. All other parameters and buffers keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SEQUENTIAL = re.compile(r"^(.*\.)?local_experts\.(\d+)\.(linear_fc[12]\.weight)$")


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers of ``source`` into ``target``, in either direction between layouts of experts.

    Both may be wrapped (DDP, Float16Module). Raises ValueError naming what has no counterpart or another shape;
    nothing was copied then.
    """
    theirs, ours = weights_by_name(source), weights_by_name(target)
    _check_same(theirs, ours)
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(theirs[name])


def weights_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, as detached views of the model's own storage."""
    plain = unwrap(model)
    parameters = {name: view(parameter.detach()) for name, parameter, view in named_views(plain)}
    persistent = {name for name in plain.state_dict() if not name.endswith("_extra_state")}
    buffers = {name: buffer for name, buffer in plain.named_buffers() if name in persistent}
    return {**parameters, **buffers}


def gradients_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Gradients as views: ``main_grad`` where DDP made one, else ``grad``; zeros where there is none yet."""
    return {name: view(_gradient(parameter)) for name, parameter, view in named_views(unwrap(model))}


def unwrap(model: Any) -> nn.Module:
    """The model inside DDP and Float16Module."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    plain: nn.Module = model
    return plain


def named_views(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    """(name, parameter, view): ``view`` takes a tensor of the parameter's shape to the entry of that name."""
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            if _is_grouped(module) and own in ("weight1", "weight2"):
                yield from _expert_views(prefix, module, own, parameter)
            else:
                yield _global_name(name, model), parameter, _whole


def _expert_views(
    prefix: str, experts: Any, own: str, parameter: nn.Parameter
) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    local, hidden = experts.num_local_experts, experts.config.hidden_size
    shape = (local, hidden, -1) if own == "weight1" else (local, -1, hidden)
    linear = "linear_fc1" if own == "weight1" else "linear_fc2"
    first = experts.ep_group.rank() * local
    for index in range(local):
        name = f"{prefix}.{first + index}.{linear}.weight"
        yield name.lstrip("."), parameter, lambda t, index=index: t.view(shape)[index].t()


def _is_grouped(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("weight1", "weight2", "num_local_experts", "ep_group"))


def _global_name(name: str, model: nn.Module) -> str:
    """``experts.local_experts.1.linear_fc1.weight`` on the second of two ranks with 4 experts: ``experts.5...``."""
    found = _SEQUENTIAL.match(name)
    if found is None:
        return name
    prefix, number, rest = found.group(1) or "", int(found.group(2)), found.group(3)
    experts: Any = model.get_submodule(prefix.rstrip("."))
    return f"{prefix}{experts.ep_group.rank() * experts.num_local_experts + number}.{rest}"


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _gradient(parameter: Any) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    grad = main_grad if main_grad is not None else parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach()


def _check_same(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    problems = [f"only the source has {name}" for name in source if name not in target]
    problems += [f"only the target has {name}" for name in target if name not in source]
    problems += [
        f"{name} is {tuple(source[name].shape)} in the source and {tuple(value.shape)} in the target"
        for name, value in target.items()
        if name in source and source[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"copy_weights: the models do not match: {shown}; build both from one configuration")
