"""What a package that patches Megatron beside us must answer. Data and a protocol; no provider is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.providers.detect import Finding


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One target that another package patches.

    Args:
        owner: the package, as messages call it.
        target: path as the package wrote it.
        replaces: it puts its own object there; False: it only wraps what it finds.
        by: full names of the functions or classes that it puts there.
        applied: in force now; False: registered, and applied at its next chance.
        upstream: Megatron's own object below it, None while it is not applied.
        installed: what the package put there, None while it is not applied.
    """

    owner: str
    target: str
    replaces: bool
    by: tuple[str, ...]
    applied: bool = True
    upstream: Any = field(default=None, repr=False)
    installed: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """How messages call this patch: target, owner and function."""
        return f"{self.owner}'s patch of {self.target} ({', '.join(self.by) or 'no function'})"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What a provider may ask our registry for: the rows in force, and to take them off and put them back on top."""

    rows: Callable[[], Sequence[Patch]]
    suspend: Callable[[], None]
    resume: Callable[[], None]


class Provider(Protocol):
    """A package that patches Megatron too."""

    name: str

    def detect(self) -> Finding:
        """Whether it is here, and whether it has patched."""

    def foreign(self) -> list[Foreign]:
        """Everything that it has registered, applied or not."""

    def attach(self, ours: Ours) -> None:
        """Our first patch went on: from now on, let it patch below ours. Twice is once."""

    def detach(self) -> None:
        """Our last patch went off: leave no trace in it. Without ``attach`` it does nothing."""
