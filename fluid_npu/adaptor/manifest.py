"""Reads the patch manifests that are installed as ``fluid_npu.patches``.

A manifest is ``<package>-<line>.toml``: a header ``[manifest]`` with ``package`` and ``versions``, then one
``[[patch]]`` per row. ``[needless]`` and ``[refused]`` name features that have no rows on this line, with the
reason: upstream needs no repair any more, or there is nothing left to patch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.versions import check_range, fits, installed_version


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One file: the rows for one line of one package."""

    name: str
    package: str
    versions: str
    rows: tuple[Patch, ...]
    needless: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # here, so that the command line needs no package to show its help
    return tomllib.loads(text)


def read_manifest(name: str) -> Manifest:
    """The manifest ``patches/<name>.toml``. Raises PatchError for a missing or broken one."""
    source = resources.files("fluid_npu.patches").joinpath(f"{name}.toml")
    if not source.is_file():
        raise PatchError(f"no manifest {name}.toml in fluid_npu.patches; available: {', '.join(manifest_names())}")
    table = _parse(source.read_text(encoding="utf-8"))
    header = table.get("manifest", {})
    if set(header) != {"package", "versions"}:
        raise PatchError(
            f"{name}.toml: [manifest] needs package and versions and nothing else; it has {sorted(header)}"
        )
    check_range(header["versions"], f"{name}.toml")
    return Manifest(
        name=name,
        package=header["package"],
        versions=header["versions"],
        rows=tuple(_row(row, header, name) for row in table.get("patch", [])),
        needless=table.get("needless", {}),
        refused=table.get("refused", {}),
    )


def _row(row: dict[str, Any], header: dict[str, str], name: str) -> Patch:
    # A new row gets its fingerprint from scripts/fingerprints.py; until then it has none and is refused when applied.
    empty = {"fingerprint": "absent" if row.get("kind") == "add" else ""}
    try:
        patch = Patch(**{**empty, **header, "manifest": f"{name}.toml", **row})
    except TypeError as error:
        raise PatchError(f"{name}.toml: row {row.get('target', '?')}: {error}") from error
    check_range(patch.versions, patch.name)
    return patch


def load_manifest(name: str) -> list[Patch]:
    """The rows of ``patches/<name>.toml`` in file order. Raises PatchError for a missing or broken manifest."""
    return list(read_manifest(name).rows)


def manifest_names() -> list[str]:
    """Names of the manifests that ship with this version."""
    files = resources.files("fluid_npu.patches").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))


def installed_manifests(features: Sequence[str]) -> list[Manifest]:
    """The manifest of every installed package at its installed version, torch first.

    Raises PatchError when a package that these features patch is installed in a version without a manifest, or when
    nothing that they patch is installed.
    """
    by_package: dict[str, list[Manifest]] = {}
    for name in manifest_names():
        manifest = read_manifest(name)
        by_package.setdefault(manifest.package, []).append(manifest)
    # Rows of torch go first: importing Megatron already asks torch.cuda.
    packages = sorted(by_package, key=lambda package: (package != "torch", package))
    chosen = [_for_version(package, by_package[package], features) for package in packages]
    return [manifest for manifest in chosen if manifest is not None]


def _for_version(package: str, manifests: list[Manifest], features: Sequence[str]) -> Manifest | None:
    concerned = any(row.feature in features for manifest in manifests for row in manifest.rows)
    installed = installed_version(package)
    ranges = "; ".join(f"{manifest.versions} ({manifest.name}.toml)" for manifest in manifests)
    if installed is None:
        # Megatron-LM is a checkout, not a package: without it there is nothing to patch, and a feature says so itself.
        if concerned and package == "megatron-core":
            raise PatchError(f"megatron-core is not installed; supported: {ranges}. pip install megatron-core")
        return None
    for manifest in manifests:
        if fits(installed, manifest.versions):
            return manifest
    if concerned:
        raise PatchError(
            f"{package} {installed} has no manifest, so {', '.join(features)} cannot be switched on; supported: "
            f"{ranges}. Install one of these, or add a line as docs/MAINTENANCE_GUIDE.md says"
        )
    return None
