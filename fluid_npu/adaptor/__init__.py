"""``adapt(features)``: the one door through which fluid_npu changes another package.

    with fluid_npu.adapt(["cpu"]):      # rolled back at the end
        ...
    fluid_npu.adapt(["cpu"])            # stays until the process ends, or .rollback()

The features stand in ``features.py``; what they change and why in ``patches/*.toml``, one row per change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from fluid_npu.adaptor import providers
from fluid_npu.adaptor import settings as _settings
from fluid_npu.adaptor.features import FEATURES, Feature, expand
from fluid_npu.adaptor.manifest import Manifest, installed_manifests, manifest_names, read_manifest
from fluid_npu.adaptor.patch import Patch, PatchError, PatchWarning
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.settings import Settings
from fluid_npu.adaptor.status import PatchStatus, report_text, statuses
from fluid_npu.adaptor.versions import fits, importable, installed_version

__all__ = [
    "FEATURES",
    "Adaptation",
    "Feature",
    "Patch",
    "PatchError",
    "PatchStatus",
    "PatchWarning",
    "Registry",
    "Settings",
    "adapt",
    "resume",
    "select",
    "status",
    "suspend",
]

_REGISTRY = Registry()
_ACTIVE: list[str] = []


class Adaptation:
    """The features that one ``adapt`` call switched on; a context manager that rolls them back."""

    def __init__(self, features: list[str], before: int, after: int, settings: Settings) -> None:
        self.features = features
        self._before = before
        self._after = after
        self._settings = settings
        self._over = False

    def rollback(self) -> None:
        """Restores what this call changed, and the settings before it. A second time does nothing.

        Raises PatchError, changing nothing, if features were switched on later or someone patched on top.
        """
        if self._over:
            return
        if self.features:
            self._take_off()
        _settings.remove(self._settings)
        self._over = True

    def _take_off(self) -> None:
        if _REGISTRY.size != self._after:
            later = ", ".join(_ACTIVE[_ACTIVE.index(self.features[-1]) + 1 :])
            raise PatchError(f"roll back {later} first: it was switched on after {', '.join(self.features)}")
        _REGISTRY.rollback(self._before)
        for feature in self.features:
            _ACTIVE.remove(feature)
        self.features = []
        if not _REGISTRY.size:
            providers.detach()

    def report(self) -> str:
        """One line per patch of this call, then what was never reached and what cannot be reached."""
        return report_text(statuses(_REGISTRY, _REGISTRY.applied[self._before : self._after]))

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rollback()


def adapt(features: Sequence[str], *, fingerprints: str | None = None, **settings: Any) -> Adaptation:
    """Switches features on. Applying a feature twice is once.

    Args:
        features: names from ``FEATURES``.
        fingerprints: 'strict' refuses rows whose upstream source changed, 'warn' warns; None takes the environment
            variable FLUID_FINGERPRINTS, or 'strict'.
        settings: fields of ``Settings``, for the replacements to read.

    Returns:
        A handle whose ``rollback()``, or end as a context manager, restores the exact objects.

    Raises:
        PatchError: an unknown feature or setting, an unsupported version, a missing or changed target, a conflict;
            nothing was changed.
    """
    if isinstance(features, str):
        raise PatchError(f"adapt(features={features!r}): give a list of names: adapt([{features!r}])")
    chosen = _settings.changed(settings)
    policy = fingerprints if fingerprints is not None else os.environ.get("FLUID_FINGERPRINTS") or "strict"
    fresh = [feature for feature in expand(features) if feature not in _ACTIVE]
    before = len(_REGISTRY.applied)
    _REGISTRY.apply(select(fresh), policy)
    if fresh:
        providers.attach(providers.Ours(rows=lambda: _REGISTRY.applied, suspend=suspend, resume=resume))
    _ACTIVE.extend(fresh)
    _settings.push(chosen)
    return Adaptation(fresh, before, len(_REGISTRY.applied), chosen)


def select(features: Sequence[str]) -> list[Patch]:
    """The rows that the features own, for the installed versions, in the order of FEATURES and of the manifests.

    Raises PatchError for an unknown feature, an unsupported version, and a feature that has no rows on these versions.
    """
    for feature in features:
        if feature not in FEATURES:
            raise PatchError(f"select(features=...): {feature!r} is unknown; allowed: {', '.join(FEATURES)}")
    if not features:
        return []
    manifests = installed_manifests(features)
    return [row for feature in FEATURES if feature in features for row in _rows(feature, manifests)]


def _rows(feature: str, manifests: list[Manifest]) -> list[Patch]:
    for manifest in manifests:
        if feature in manifest.refused:
            raise PatchError(
                f"feature {feature!r} is not for {manifest.package} {installed_version(manifest.package)}: "
                f"{manifest.refused[feature]}"
            )
    rows = [row for manifest in manifests for row in manifest.rows if row.feature == feature and _is_for_installed(row)]
    if not rows and not any(feature in manifest.needless for manifest in manifests):
        lines = [name for name in manifest_names() if any(row.feature == feature for row in read_manifest(name).rows)]
        here = ", ".join(f"{manifest.package} {installed_version(manifest.package)}" for manifest in manifests)
        raise PatchError(
            f"feature {feature!r} has no rows for {here}; it has rows in: {', '.join(lines) or 'no manifest'}"
        )
    return rows


def _is_for_installed(row: Patch) -> bool:
    return fits(installed_version(row.package) or "0", row.versions)


def status(features: Sequence[str] | None = None) -> list[PatchStatus]:
    """Every row of the installed versions, of these features or of all that can be used here; nothing is applied."""
    if features is None:
        owners = {row.feature for manifest in installed_manifests([]) for row in manifest.rows}
        features = [name for name, feature in FEATURES.items() if name in owners and _usable(feature)]
    return statuses(_REGISTRY, select(features))


def _usable(feature: Feature) -> bool:
    needless = feature.unless is not None and importable(feature.unless)
    return not needless and all(importable(name) for name in feature.needs)


def suspend() -> None:
    """Takes all patches off, newest first, so that another patch system may change what lies under them.

    Raises PatchError, changing nothing, if someone patched on top.
    """
    _REGISTRY.suspend()


def resume() -> None:
    """Puts the rows that ``suspend`` took off back on top. Raises PatchError, and stays suspended, if one cannot be."""
    _REGISTRY.resume()
