"""``adapt(features)``: the one door through which fluid_npu changes another package.

    with fluid_npu.adapt(["cpu"]):      # rolled back at the end
        ...
    fluid_npu.adapt(["cpu"])            # stays until the process ends, or .rollback()

Feature ``cpu`` makes megatron-core run on a machine without CUDA, over gloo; ``no_te`` repairs what fails on any device
without Transformer Engine. What they change and why stands in ``patches/*.toml``, one row per change.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

from fluid_npu.adaptor.manifest import load_manifest, manifest_names
from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.registry import Registry
from fluid_npu.probes import installed

__all__ = ["FEATURES", "Adaptation", "Patch", "PatchError", "Registry", "adapt", "select"]

#: Each feature and what it does; ``cpu`` brings ``no_te`` along where Transformer Engine is not installed.
FEATURES = {
    "cpu": "megatron-core without CUDA, over gloo",
    "no_te": "repairs of megatron-core where it assumes Transformer Engine although it is not installed",
}

_REGISTRY = Registry()
_ACTIVE: list[str] = []


class Adaptation:
    """The features that one ``adapt`` call switched on; a context manager that rolls them back."""

    def __init__(self, features: list[str], before: int, after: int) -> None:
        self.features = features
        self._before = before
        self._after = after

    def rollback(self) -> None:
        """Restores what this call changed. Does nothing if the call found its features already on.

        Raises PatchError, changing nothing, if features were switched on later or someone patched on top.
        """
        if not self.features:
            return
        if len(_REGISTRY.applied) != self._after:
            later = ", ".join(_ACTIVE[_ACTIVE.index(self.features[-1]) + 1 :])
            raise PatchError(f"roll back {later} first: it was switched on after {', '.join(self.features)}")
        _REGISTRY.rollback(self._before)
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
        _known(feature)
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
    for feature in features:
        _known(feature)
    wanted = list(features)
    if "cpu" in wanted and "no_te" not in wanted and not installed("transformer_engine").value:
        wanted.append("no_te")
    fresh = [feature for feature in wanted if feature not in _ACTIVE]
    before = len(_REGISTRY.applied)
    _REGISTRY.apply(select(fresh))
    _ACTIVE.extend(fresh)
    return Adaptation(fresh, before, len(_REGISTRY.applied))


def _known(feature: str) -> None:
    if feature not in FEATURES:
        raise PatchError(f"adapt(features=...): {feature!r} is unknown; allowed: {', '.join(FEATURES)}")
