"""Which version of a package is really the one that an import gives.

Megatron-Core is asked by the file ``package_info.py`` that an import would find: with two copies on the path the
metadata may speak of the other one, and other patch systems replace ``importlib.metadata.version`` itself.
"""

from __future__ import annotations

import ast
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fluid_npu.adaptor.patch import PatchError
from fluid_npu.probes import installed


def installed_version(package: str) -> str | None:
    """The version of ``package``, or None when it is not installed.

    ``megatron-core`` and ``megatron.training`` (Megatron-LM, which is not on PyPI) have Megatron-Core's version.
    """
    return _found(package, tuple(sys.path))


@lru_cache(maxsize=64)
def _found(package: str, _path: tuple[str, ...]) -> str | None:
    if package == "megatron-core":
        return _megatron_core()
    if package == "megatron.training":
        return _megatron_core() if importable("megatron.training") else None
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fits(installed: str, versions: str) -> bool:
    """Whether a version lies in a range; an empty range holds all. Pre-releases count as their version."""
    from packaging.specifiers import SpecifierSet  # here, so that the command line needs no package to show its help

    return SpecifierSet(versions).contains(installed, prereleases=True)


def check_range(versions: str, where: str) -> None:
    """Raises PatchError for something that is not a version specifier."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        SpecifierSet(versions)
    except InvalidSpecifier as error:
        raise PatchError(f"{where}: versions={versions!r} is no version range such as '>=0.16.1,<0.17'") from error


def importable(module: str) -> bool:
    """Whether an import would find a real module. Its parents are imported, the module itself is not."""
    try:
        return installed(module).value
    except ModuleNotFoundError:
        return False


def _megatron_core() -> str | None:
    if not importable("megatron.core"):
        return None
    spec = find_spec("megatron.core")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        source = Path(folder) / "package_info.py"
        if source.is_file():
            return _declared(source)
    return None


def _declared(source: Path) -> str:
    values: dict[str, Any] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values.update({name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)})
    try:
        return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"
    except KeyError as error:
        raise PatchError(f"{source}: no {error} there; is this Megatron-Core?") from error
