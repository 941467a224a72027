"""Specs of modules: ModuleSpec in every line, and functools.partial of a class from 0.17 on."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer


def module_of(spec: Any) -> Any:
    """The class that a spec builds; None for something that is no spec."""
    if isinstance(spec, functools.partial):
        return spec.func
    return getattr(spec, "module", None)


def submodules_of(spec: Any) -> Any:
    """The submodules that a spec passes on; None without any."""
    return spec.keywords.get("submodules") if isinstance(spec, functools.partial) else spec.submodules


def rebuilt(spec: Any, module: type, submodules: Any, **params: Any) -> Any:
    """A spec of the same kind with another class, other submodules and further parameters; the rest is kept."""
    if isinstance(spec, functools.partial):
        return functools.partial(module, *spec.args, **{**spec.keywords, "submodules": submodules, **params})
    # metainfo, where the line has it, is the caller's: a copy must not share it.
    copied = {"metainfo": dict(spec.metainfo)} if hasattr(spec, "metainfo") else {}
    return replace(spec, module=module, submodules=submodules, params={**spec.params, **params}, **copied)


def hides_groups(mlp: Any) -> bool:
    """Whether the installed TransformerLayer keeps its process groups from an MLP of this spec that is not Megatron's.

    0.16 passes them to classes that it knows by name. From 0.17 on every MLP gets them together with ``is_mtp_layer``,
    which the layer itself takes too. 0.12 has none.
    """
    parameters = inspect.signature(TransformerLayer.__init__).parameters
    return isinstance(mlp, ModuleSpec) and "pg_collection" in parameters and "is_mtp_layer" not in parameters
