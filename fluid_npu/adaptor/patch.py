"""One patch: what it replaces, with what, who owns it and why. Data only; the registry applies it.

Kinds: ``replace`` (the target must exist), ``wrap`` (the replacement is called with the original and returns
the new object), ``add`` (the target must not exist), ``context`` (enters a context manager; the target only
names what it changes).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

KINDS = ("replace", "wrap", "add", "context")


class PatchError(RuntimeError):
    """A patch cannot be resolved, applied or rolled back; the message names target, owner and fix."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A row of a manifest. ``replacement`` is ``package.module:attribute``."""

    target: str
    kind: str
    replacement: str
    feature: str
    why: str
    goes_when: str
    manifest: str = "<inline>"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PatchError(f"{self.name}: kind={self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if ":" not in self.replacement:
            raise PatchError(
                f"{self.name}: replacement={self.replacement!r} must be written 'package.module:attribute'"
            )

    @property
    def name(self) -> str:
        """How errors call this patch: target, owner and manifest."""
        return f"patch of {self.target} (feature {self.feature!r}, {self.manifest})"

    def load_replacement(self) -> Any:
        """The object that ``replacement`` names. Raises PatchError when it is not there."""
        module_name, _, attribute = self.replacement.partition(":")
        try:
            return getattr(import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise PatchError(f"{self.name}: replacement {self.replacement!r} cannot be loaded: {error}") from error


def resolve(target: str) -> tuple[Any, str]:
    """The object that holds ``target`` and the attribute's name in it.

    ``a.b.C.method`` imports the longest importable module and walks the rest. Raises PatchError naming the
    part that does not exist.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            holder: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise PatchError(f"{target}: importing {module_name} failed: {error}") from error
        for part in parts[cut:-1]:
            if not hasattr(holder, part):
                raise PatchError(f"{target}: {module_name} has no {part!r}; was it renamed or removed upstream?")
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise PatchError(f"{target}: no module of that name can be imported; is the package installed?")
