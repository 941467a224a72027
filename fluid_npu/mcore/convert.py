"""The same model with other experts: weights copied and gradients compared by one set of names.

Every parameter has a name in the layout of Megatron's SequentialMLP, one entry per expert under its global number:
``decoder.layers.0.mlp.experts.5.linear_fc1.weight [2F, H]`` and ``...linear_fc2.weight [H, F]``. Grouped experts
(FluidGroupedMLP and Megatron's legacy GroupedMLP) hold the transposes as ``[L, H, 2F]`` and ``[L, F, H]`` in one
parameter each; their entries are views of it. Layers are counted over all pipeline stages: a stage's local layer 0 with
``layer_number`` 5 is ``decoder.layers.4``. Where embedding and output share their weight, the last stage's copy has the
embedding's name. All other parameters and buffers keep their names. So the names, and a checkpoint by name, do not
depend on how a model is split over expert-parallel ranks and pipeline stages.

``model`` is everywhere a module or the list of a rank's chunks of an interleaved pipeline, wrapped (DDP, Float16Module)
or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluid_npu.mcore.lines.groups import expert_rank

Model = nn.Module | Sequence[nn.Module]

_SEQUENTIAL = re.compile(r"^(.*\.)?local_experts\.(\d+)\.(linear_fc[12]\.weight)$")


def copy_weights(source: Model, target: Model) -> None:
    """Copies parameters and buffers of ``source`` into ``target``, in either direction between layouts of experts.

    Raises ValueError naming what has no counterpart or another shape; nothing was copied then.
    """
    theirs, ours = weights_by_name(source), weights_by_name(target)
    missing = [f"only the source has {name}" for name in theirs if name not in ours]
    _copy(theirs, ours, missing, "copy_weights: the models do not match", "build both from one configuration")


def load_weights(weights: Mapping[str, Tensor], model: Model) -> None:
    """Copies into ``model`` what it holds of a whole model's ``weights`` by global name; the others are left alone.

    Raises ValueError naming what ``weights`` lacks or has in another shape; nothing was copied then.
    """
    _copy(weights, weights_by_name(model), [], "load_weights: the weights do not fit", "save them from the same model")


def weights_by_name(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers, as detached views of the model's own storage."""
    found: dict[str, Tensor] = {}
    for plain in _chunks(model):
        found.update({name: view(parameter.detach()) for name, parameter, view in named_views(plain)})
        persistent = {name for name in plain.state_dict() if not name.endswith("_extra_state")}
        names = _GlobalNames(plain)
        found.update({names(name): buffer for name, buffer in plain.named_buffers() if name in persistent})
    return found


def gradients_by_name(model: Model) -> dict[str, Tensor]:
    """Gradients as views: ``main_grad`` where DDP made one, else ``grad``; zeros where there is none yet."""
    return {
        name: view(_gradient(parameter)) for plain in _chunks(model) for name, parameter, view in named_views(plain)
    }


def unwrap(model: Any) -> nn.Module:
    """The model inside DDP and Float16Module."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    plain: nn.Module = model
    return plain


def named_views(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    """(name, parameter, view): ``view`` takes a tensor of the parameter's shape to the entry of that name."""
    names = _GlobalNames(model)
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            if _is_grouped(module) and own in ("weight1", "weight2"):
                yield from _expert_views(names(prefix), module, own, parameter)
            else:
                yield names(_with_global_expert(name, model)), parameter, _whole


class _GlobalNames:
    """Renames what a pipeline stage counts by itself: its layers, and the output weight that is the embedding's."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, str] = {}
        for prefix, module in model.named_modules():
            for index, layer in enumerate(module) if isinstance(module, nn.ModuleList) else ():
                number = getattr(layer, "layer_number", None)
                if isinstance(number, int):
                    self._layers[f"{prefix}.{index}".lstrip(".")] = f"{prefix}.{number - 1}".lstrip(".")
        self._tied = bool(getattr(model, "share_embeddings_and_output_weights", False))

    def __call__(self, name: str) -> str:
        if self._tied and name == "output_layer.weight":
            return "embedding.word_embeddings.weight"
        for end in (found.end() for found in re.finditer(r"(?<![^.])\d+(?![^.])", name)):
            if name[:end] in self._layers:
                return self._layers[name[:end]] + name[end:]
        return name


def _chunks(model: Model) -> list[nn.Module]:
    return [unwrap(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]


def _expert_views(
    prefix: str, experts: Any, own: str, parameter: nn.Parameter
) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    local, hidden = experts.num_local_experts, experts.config.hidden_size
    shape = (local, hidden, -1) if own == "weight1" else (local, -1, hidden)
    linear = "linear_fc1" if own == "weight1" else "linear_fc2"
    first = expert_rank(experts) * local
    for index in range(local):
        name = f"{prefix}.{first + index}.{linear}.weight"
        yield name.lstrip("."), parameter, lambda t, index=index: t.view(shape)[index].t()


def _is_grouped(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("weight1", "weight2", "num_local_experts"))


def _with_global_expert(name: str, model: nn.Module) -> str:
    """``experts.local_experts.1.linear_fc1.weight`` on the second of two ranks with 4 experts: ``experts.5...``."""
    found = _SEQUENTIAL.match(name)
    if found is None:
        return name
    prefix, number, rest = found.group(1) or "", int(found.group(2)), found.group(3)
    experts: Any = model.get_submodule(prefix.rstrip("."))
    return f"{prefix}{expert_rank(experts) * experts.num_local_experts + number}.{rest}"


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _gradient(parameter: Any) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    grad = main_grad if main_grad is not None else parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach()


def _copy(source: Mapping[str, Tensor], target: dict[str, Tensor], problems: list[str], what: str, fix: str) -> None:
    problems = problems + [f"only the target has {name}" for name in target if name not in source]
    problems += [
        f"{name} is {tuple(source[name].shape)} in the source and {tuple(value.shape)} in the target"
        for name, value in target.items()
        if name in source and source[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{what}: {shown}; {fix}")
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])
