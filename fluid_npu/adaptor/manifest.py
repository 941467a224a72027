"""Reads the patch manifests that are installed as ``fluid_npu.patches``."""

from __future__ import annotations

import sys
from importlib import resources

from fluid_npu.adaptor.patch import Patch, PatchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_manifest(name: str) -> list[Patch]:
    """The rows of ``patches/<name>.toml`` in file order. Raises PatchError for a missing or broken manifest."""
    source = resources.files("fluid_npu.patches").joinpath(f"{name}.toml")
    if not source.is_file():
        raise PatchError(f"no manifest {name}.toml in fluid_npu.patches; available: {', '.join(manifest_names())}")
    table = tomllib.loads(source.read_text(encoding="utf-8"))
    rows = []
    for row in table.get("patch", []):
        try:
            rows.append(Patch(manifest=f"{name}.toml", **row))
        except TypeError as error:
            raise PatchError(f"{name}.toml: row {row.get('target', '?')}: {error}") from error
    return rows


def manifest_names() -> list[str]:
    """Names of the manifests that ship with this version."""
    files = resources.files("fluid_npu.patches").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml"))
