"""What the stand-in patches, chosen by the same flags as in MindSpeed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from mindspeed.patch_utils import MindSpeedPatchesManager

MOE = "megatron.core.transformer.moe"
SPECS = "megatron.core.models.gpt.gpt_layer_specs"


class GmmExperts:
    """In the place of MindSpeed's grouped experts."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


class OverlapMoELayer:
    """In the place of MindSpeed's MoE layer with AllToAll overlap."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...


class FusedAdam:
    """In the place of MindSpeed's AdamW."""


def spec_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves a mark in the spec, by which a test sees that it was called."""

    @wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        spec = original(*args, **kwargs)
        spec.metainfo = {**spec.metainfo, "mindspeed": True}
        return spec

    return make


def routing_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def routing(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return routing


def version_wrapper(original: Callable[..., str]) -> Callable[..., str]:
    @wraps(original)
    def version(name: str, *args: Any) -> str:
        return "2.2.0" if name == "transformer-engine" else original(name, *args)

    return version


def register_pre_patches() -> None:
    """Before Megatron is imported: modules for what is not installed."""
    register = MindSpeedPatchesManager.register_patch
    register("importlib.metadata.version", version_wrapper)
    register("transformer_engine.pytorch.Linear", object, create_dummy=True)
    register("apex.optimizers.FusedAdam", FusedAdam, create_dummy=True)
    register("apex.optimizers.FusedSGD", torch.optim.SGD, create_dummy=True)


def register_patches(args: Namespace) -> None:
    register = MindSpeedPatchesManager.register_patch
    register(f"{SPECS}.get_gpt_layer_local_spec", spec_wrapper)
    register(f"{MOE}.router.TopKRouter.routing", routing_wrapper)
    if args.moe_grouped_gemm:
        register(f"{MOE}.experts.GroupedMLP", GmmExperts)
    if args.moe_alltoall_overlap_comm:
        register(f"{MOE}.moe_layer.MoELayer", OverlapMoELayer)
