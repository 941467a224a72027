"""Other packages that patch Megatron: how they are found, and how our patches live beside theirs.

The registry asks here, and only here: ``problems`` before it changes anything, ``upstream`` for the object that a
fingerprint is about, ``attach`` when our first row goes on and ``detach`` when our last goes off. A new provider is one
class (see ``base.Provider``) and one name in ``PROVIDERS``. With nobody else here every answer is the empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.providers.base import Foreign, Ours, Provider
from fluid_npu.adaptor.providers.megatron_adaptor import MegatronAdaptor
from fluid_npu.adaptor.providers.mindspeed import MindSpeed
from fluid_npu.adaptor.providers.none import NoProvider
from fluid_npu.adaptor.providers.rules import Meeting, announce, meetings

__all__ = [
    "Foreign",
    "Meeting",
    "Ours",
    "Provider",
    "active",
    "attach",
    "detach",
    "foreign",
    "met",
    "problems",
    "upstream",
]

PROVIDERS: tuple[Provider, ...] = (MindSpeed(), MegatronAdaptor())


def active() -> Provider:
    """The first package that is here and patches Megatron, else the provider ``none``."""
    here = (provider for provider in PROVIDERS if provider.detect().state in ("patching", "imported"))
    return next(here, NoProvider())


def foreign() -> list[Foreign]:
    """Everything that other packages have registered to patch, applied or not."""
    return [record for provider in PROVIDERS for record in provider.foreign()]


def met(rows: Sequence[Patch]) -> list[Meeting]:
    """Where these rows and what others have applied lie on one target, and what follows; for reports and doctor."""
    return meetings(rows, [record for record in foreign() if record.applied])


def problems(rows: Sequence[Patch]) -> list[str]:
    """Conflicts between these rows and what others have applied, each naming both owners.

    What they have only registered is judged when they apply it.
    """
    return [meeting.problem for meeting in met(rows) if meeting.problem]


def upstream(value: Any) -> Any:
    """Megatron's own object, where ``value`` is what another package put in its place; else ``value``."""
    return next((record.upstream for record in foreign() if record.applied and record.installed is value), value)


def attach(ours: Ours) -> None:
    """Our first row went on, or more did: others patch below ours from now on. Prints the choices made."""
    for provider in PROVIDERS:
        provider.attach(ours)
    announce(met(ours.rows()))


def detach() -> None:
    """Our last row went off: nothing of ours stays in the other packages."""
    for provider in PROVIDERS:
        provider.detach()
