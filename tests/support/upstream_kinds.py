"""One target of every kind in the real Megatron-Core, and replacements for them; for the registry's tests.

The replacements do nothing but mark their result, so that a test sees whose code ran.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.router import Router

HERE = "tests.support.upstream_kinds"
CORE = "megatron.core"

#: kind of thing -> target
FUNCTION = f"{CORE}.utils.divide"  # inference.contexts.dynamic_context knows it as core_divide
METHOD = f"{CORE}.transformer.moe.router.TopKRouter.is_aux_loss_enabled"
INHERITED = f"{CORE}.transformer.moe.router.TopKRouter.set_layer_number"  # defined by Router
STATIC = f"{CORE}.transformer.transformer_layer.TransformerLayer._get_layer_offset"
CLASSMETHOD = f"{CORE}.transformer.cuda_graphs._CudagraphGlobalRecord.record_bwd_graph"
PROPERTY = f"{CORE}.optimizer.optimizer.ChainedOptimizer.param_groups"
CLASS = f"{CORE}.transformer.moe.router.Router"  # TopKRouter is derived from it
RENAMED_CLASS = f"{CORE}.transformer.torch_norm.WrappedTorchNorm"  # models.bert.bert_lm_head knows it as LNImpl
CONSTANT = f"{CORE}.tensor_parallel.layers._grad_accum_fusion_available"
NONE = f"{CORE}.utils._ASYNC_IO_LOOP"  # None, like many other names
NEW = f"{CORE}.utils.fluid_npu_was_here"


def instead(*_args: Any, **_kwargs: Any) -> str:
    """A function, method or getter of ours."""
    return "ours"


def around(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that tells what it wraps."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ("around", original(*args, **kwargs))

    return call


def decorate(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper whose name says nothing of it."""
    return around(original)


def sum_wrapper(numerator: int, denominator: int) -> str:
    """A replacement whose name ends in 'wrapper'."""
    return f"ours: {numerator} and {denominator}"


class OurRouter(Router):
    """Takes Router's place."""

    def routing(self, logits: Any) -> Any:
        """Never called."""


class OurNorm:
    """Takes a class's place that is made with ``__new__``."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """An instance of ours."""
        return super().__new__(cls)

    def __init__(self, size: int = 0, **_kwargs: Any) -> None:
        self.size = size


class DerivedNorm(OurNorm):
    """Inherits its constructor."""


value = True
BY_KIND = {
    FUNCTION: ("instead", "around"),
    METHOD: ("instead", "around"),
    INHERITED: ("instead", "around"),
    STATIC: ("instead", "around"),
    CLASSMETHOD: ("instead", "around"),
    PROPERTY: ("instead", "around"),
    CLASS: ("OurRouter",),
    RENAMED_CLASS: ("OurNorm",),
    CONSTANT: ("value",),
    NONE: ("instead",),
}
