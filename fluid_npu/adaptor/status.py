"""What each patch is doing: applied or not, reached or not, and what stands in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluid_npu.adaptor.checks import check
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.registry import Applied, Registry


@dataclass(frozen=True, kw_only=True)
class PatchStatus:
    """One row of the installed versions.

    ``hits`` is None where the patch is not applied or cannot be counted (see ``hits.py``). ``problem`` is None where
    it is in force, or could be applied. ``unreachable`` names what still holds the original.
    """

    patch: Patch
    applied: bool
    hits: int | None
    problem: str | None
    unreachable: tuple[str, ...] = ()


def statuses(registry: Registry, rows: Sequence[Patch]) -> list[PatchStatus]:
    """The status of every row, checked without applying any."""
    entries = {entry.patch: entry for entry in registry.entries}
    return [_of_applied(entries[row]) if row in entries else _of_row(row, registry) for row in rows]


def _of_applied(entry: Applied) -> PatchStatus:
    problem = None if entry.in_place else f"{entry.patch.name}: somebody else patched on top of it"
    return PatchStatus(patch=entry.patch, applied=True, hits=None, problem=problem)


def _of_row(row: Patch, registry: Registry) -> PatchStatus:
    found = check([row], registry.applied)
    problems = found.errors + found.changes
    return PatchStatus(patch=row, applied=False, hits=None, problem=problems[0] if problems else None)


def report_text(states: Sequence[PatchStatus]) -> str:
    """The rows as a person reads them: what is applied, what was never reached, what cannot be reached."""
    lines = [_line(state) for state in states]
    never = [state.patch.target for state in states if state.applied and state.hits == 0]
    if never:
        lines += ["", "Applied and never reached:", *(f"  {target}" for target in never)]
    for state in states:
        lines += [f"Not reachable for {state.patch.target}: {what}" for what in state.unreachable]
    return "\n".join(lines)


def _line(state: PatchStatus) -> str:
    if not state.applied:
        return f"off       {state.patch.target} ({state.patch.feature})" + (
            f": {state.problem}" if state.problem else ""
        )
    hits = "hits not counted" if state.hits is None else f"{state.hits} hits"
    return f"applied   {state.patch.target} ({state.patch.feature}): {state.problem or hits}"
