"""The features that ``adapt`` knows. Adding one is one line here, plus its rows in the manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluid_npu.adaptor.patch import PatchError
from fluid_npu.adaptor.versions import importable


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A group of patches that is switched on as a whole.

    Args:
        name: what users write.
        what: one line for help and documents.
        brings: features that come along.
        needs: packages or modules that must be importable.
        unless: a module that makes the feature needless: where it is importable, the feature does not come along
            and is refused when asked for.
    """

    name: str
    what: str
    brings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unless: str | None = None


_ALL = (
    Feature(name="cpu", what="megatron-core without CUDA, over gloo", brings=("no_te",)),
    Feature(
        name="no_te",
        what="repairs of megatron-core where it assumes Transformer Engine although it is not installed",
        unless="transformer_engine",
    ),
    Feature(
        name="npu",
        what="megatron-core on an Ascend NPU without MindSpeed: its CUDA names mean the NPU",
        brings=("no_te",),
        needs=("torch_npu",),
    ),
    Feature(name="moe", what="Megatron's own spec functions give our MoE layer where grouped experts are asked for"),
    Feature(name="grouped_mlp", what="Megatron's legacy GroupedMLP is FluidGroupedMLP (up to 0.16)"),
    Feature(name="token_dispatcher", what="Megatron's AllToAll dispatcher is FluidTokenDispatcher"),
    Feature(
        name="late_gradients", what="Megatron's DDP takes weight gradients late, which carry_over needs (from 0.16)"
    ),
    Feature(
        name="megatron_lm",
        what="our flags, checks and report in Megatron-LM's pretrain_gpt.py",
        needs=("megatron.training",),
    ),
    Feature(
        name="cpu_pretrain",
        what="Megatron-LM's training loop without CUDA",
        brings=("cpu",),
        needs=("megatron.training",),
    ),
)

#: By name, in the order in which their rows are applied.
FEATURES: dict[str, Feature] = {feature.name: feature for feature in _ALL}


def expand(wanted: Sequence[str]) -> list[str]:
    """The features asked for and those that they bring, each once, in the order of ``FEATURES``.

    Raises PatchError for an unknown feature, one that is needless here, and one whose needs are not installed.
    """
    for name in wanted:
        _known(name)
    names: list[str] = []
    for name in wanted:
        _collect(name, names)
    for name in wanted:
        _needed(FEATURES[name])
    chosen = [name for name in FEATURES if name in names and not (name not in wanted and _needless(name))]
    for name in chosen:
        _satisfied(FEATURES[name])
    return chosen


def _collect(name: str, names: list[str]) -> None:
    if name not in names:
        names.append(name)
        for brought in FEATURES[name].brings:
            _collect(brought, names)


def _known(name: str) -> None:
    if name not in FEATURES:
        raise PatchError(f"adapt(features=...): {name!r} is unknown; allowed: {', '.join(FEATURES)}")


def _needless(name: str) -> bool:
    module = FEATURES[name].unless
    return module is not None and importable(module)


def _needed(feature: Feature) -> None:
    if _needless(feature.name):
        raise PatchError(
            f"adapt(features=...): {feature.name!r} is for machines without {feature.unless}, which is installed here; "
            "leave the feature out"
        )


def _satisfied(feature: Feature) -> None:
    missing = [name for name in feature.needs if not importable(name)]
    if missing:
        raise PatchError(
            f"feature {feature.name!r} needs {', '.join(missing)}, which cannot be imported here; "
            "install it or put it on PYTHONPATH, or leave the feature out"
        )
