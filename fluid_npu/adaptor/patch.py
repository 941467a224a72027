"""One patch: what it replaces, with what, who owns it and why. Data only; the registry applies it.

Kinds: ``replace`` (the target must exist), ``wrap`` (the replacement is called with the original and returns
the new object), ``add`` (the target must not exist), ``context`` (enters a context manager; the target names
what the manager calls or changes, and must exist).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

KINDS = ("replace", "wrap", "add", "context")
#: The fingerprint of a row of kind ``add``: there is nothing upstream yet.
ABSENT = "absent"


class PatchError(RuntimeError):
    """A patch cannot be resolved, applied or rolled back; the message names target, owner and fix."""


class ImportFailed(PatchError):
    """A module that a row needs is there and its import raised: nothing can be said about the row."""


class PatchWarning(UserWarning):
    """What ``fingerprints="warn"`` lets pass."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A row of a manifest.

    ``replacement`` is ``package.module:attribute``. ``package`` and ``versions`` (a specifier such as
    ``>=0.16.1,<0.17``) come from the manifest's header; a row may narrow ``versions``. ``fingerprint`` is what
    ``fingerprint.py`` makes of the upstream source that the row was written against. ``upstream`` is a link, or
    ``none: <reason>``.
    """

    target: str
    kind: str
    replacement: str
    feature: str
    why: str
    goes_when: str
    upstream: str
    fingerprint: str
    package: str = ""
    versions: str = ""
    manifest: str = "<inline>"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PatchError(f"{self.name}: kind={self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if ":" not in self.replacement:
            raise PatchError(
                f"{self.name}: replacement={self.replacement!r} must be written 'package.module:attribute'"
            )
        if (self.kind == "add") != (self.fingerprint == ABSENT):
            raise PatchError(
                f"{self.name}: fingerprint={self.fingerprint!r} does not go with kind={self.kind!r}; "
                f"'{ABSENT}' is for 'add' and for nothing else"
            )

    @property
    def name(self) -> str:
        """How errors call this patch: target, owner and manifest."""
        return f"patch of {self.target} (feature {self.feature!r}, {self.manifest})"

    def load_replacement(self) -> Any:
        """The object that ``replacement`` names. Raises PatchError when it is not there, or its module fails."""
        module_name, _, attribute = self.replacement.partition(":")
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            raise PatchError(f"{self.name}: replacement {self.replacement!r} cannot be loaded: {error}") from error
        except Exception as error:
            what = f"replacement {self.replacement!r} cannot be loaded: {type(error).__name__}: {error}"
            raise ImportFailed(f"{self.name}: {what}") from error
        if not hasattr(module, attribute):
            raise PatchError(f"{self.name}: replacement {self.replacement!r} cannot be loaded: no such attribute")
        return getattr(module, attribute)
