"""``adapt(features)``: the one door through which fluid_npu changes another package.

    with fluid_npu.adapt(["cpu"]):      # rolled back at the end
        ...
    fluid_npu.adapt(["cpu"])            # stays until the process ends, or .rollback()

Feature ``cpu`` makes megatron-core run on a machine without CUDA, over gloo. What it changes and why stands in
``patches/*.toml``, one row per change. Layer Specs need no feature on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

from fluid_npu.adaptor.manifest import load_manifest, manifest_names
from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.registry import Registry

__all__ = ["FEATURES", "Adaptation", "Patch", "PatchError", "Registry", "adapt", "select"]

FEATURES = ("cpu",)

_REGISTRY = Registry()
_ACTIVE: list[str] = []


class Adaptation:
    """The features that one ``adapt`` call switched on; a context manager that rolls them back."""

    def __init__(self, features: list[str]) -> None:
        self.features = features

    def rollback(self) -> None:
        """Restores what this call changed. Does nothing if the call found its features already on."""
        if not self.features:
            return
        _REGISTRY.rollback()
        for feature in self.features:
            _ACTIVE.remove(feature)
        self.features = []

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rollback()


def megatron_line() -> str:
    """The installed megatron-core line, '0.16' for 0.16.1. Raises PatchError when it is not installed."""
    try:
        installed = version("megatron-core")
    except PackageNotFoundError as error:
        raise PatchError("megatron-core is not installed; pip install 'megatron-core>=0.16.1,<0.17'") from error
    return ".".join(installed.split(".")[:2])


def select(features: Sequence[str]) -> list[Patch]:
    """The rows that the features own, for the installed versions. Raises PatchError for an unknown feature."""
    for feature in features:
        if feature not in FEATURES:
            raise PatchError(f"adapt(features=...): {feature!r} is unknown; allowed: {', '.join(FEATURES)}")
    name = f"megatron_core-{megatron_line()}"
    if name not in manifest_names():
        lines = ", ".join(n.removeprefix("megatron_core-") for n in manifest_names() if n.startswith("megatron_core"))
        raise PatchError(f"megatron-core {megatron_line()} has no manifest; supported lines: {lines}")
    rows = load_manifest("torch") + load_manifest(name)
    return [row for row in rows if row.feature in features]


def adapt(features: Sequence[str]) -> Adaptation:
    """Switches features on. Applying a feature twice is once.

    Args:
        features: names from ``FEATURES``.

    Returns:
        A handle whose ``rollback()``, or end as a context manager, restores the exact objects.

    Raises:
        PatchError: unknown feature, unsupported Megatron line, missing target or conflict; nothing was changed.
    """
    fresh = [feature for feature in features if feature not in _ACTIVE]
    _REGISTRY.apply(select(fresh))
    _ACTIVE.extend(fresh)
    return Adaptation(fresh)
