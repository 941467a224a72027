"""What each patch is doing: applied or not, reached or not, and what stands in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from fluid_npu.adaptor.captures import Wanted, captures
from fluid_npu.adaptor.checks import check
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.references import sweepable
from fluid_npu.adaptor.registry import Applied, Registry
from fluid_npu.adaptor.target import MISSING


@dataclass(frozen=True, kw_only=True)
class PatchStatus:
    """One row of the installed versions.

    ``hits`` is None where the patch is not applied or cannot be counted (see ``hits.py``). ``problem`` is None where
    it is in force, or could be applied. ``unreachable`` names what still holds the original. ``checked`` is False
    where a module of the row does not import, so that nothing but that is known.
    """

    patch: Patch
    applied: bool
    hits: int | None
    problem: str | None
    unreachable: tuple[str, ...] = ()
    checked: bool = True


def statuses(registry: Registry, rows: Sequence[Patch]) -> list[PatchStatus]:
    """The status of every row, checked without applying any."""
    entries = {entry.patch: entry for entry in registry.entries}
    held = unreachable([entries[row] for row in rows if row in entries])
    outermost = {entry.patch.target: entry for entry in registry.entries}
    states = []
    for row in rows:
        if row in entries:
            on_top = outermost[row.target] is entries[row]
            states.append(_of_applied(entries[row], on_top, held[row]))
        else:
            states.append(_of_row(row, registry))
    return states


def _of_applied(entry: Applied, on_top: bool, held: tuple[str, ...]) -> PatchStatus:
    foreign = entry.foreign() if on_top else []
    problem = f"somebody else patched on top: {'; '.join(foreign)}" if foreign else None
    counter = entry.counted.counter
    hits = counter.hits if counter else None
    return PatchStatus(patch=entry.patch, applied=True, hits=hits, problem=problem, unreachable=held)


def unreachable(entries: Sequence[Applied]) -> dict[Patch, tuple[str, ...]]:
    """For each applied patch, what still holds the original or hides the patch, in words."""
    sought = [entry for entry in entries if entry.before is not MISSING and sweepable(entry.exchange.old)]
    wanted = [Wanted(entry.exchange.old, (entry.before, *_held_by(entry.exchange.new))) for entry in sought]
    found = dict.fromkeys((entry.patch for entry in entries), ())
    found.update({entry.patch: texts for entry, texts in zip(sought, captures(wanted), strict=True)})
    return {entry.patch: found[entry.patch] + _overrides(entry) for entry in entries}


def _held_by(function: Any) -> list[Any]:
    """Our function, those it wraps, and their closures: they hold the original by right."""
    held: list[Any] = []
    while function is not None and all(function is not item for item in held):
        held += [function, vars(function) if hasattr(function, "__dict__") else None, *_closure(function)]
        function = getattr(function, "__wrapped__", None)
    return held


def _closure(function: Any) -> list[Any]:
    cells = list(getattr(function, "__closure__", None) or ())
    inner = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)]
    return cells + [cell for item in inner for cell in item.__closure__ or ()]


def _overrides(entry: Applied) -> tuple[str, ...]:
    """Subclasses that have the patched attribute themselves."""
    if not isinstance(entry.slot.holder, type):
        return ()
    classes: list[type] = type.__subclasses__(entry.slot.holder)
    found = []
    while classes:
        cls = classes.pop()
        if entry.slot.attribute in vars(cls):
            found.append(f"subclass {cls.__module__}.{cls.__qualname__} has its own; reached through super() alone")
        classes += type.__subclasses__(cls)
    return tuple(sorted(set(found)))


def _of_row(row: Patch, registry: Registry) -> PatchStatus:
    found = check([row], registry.applied)
    problems = found.errors + found.changes
    problem, checked = problems[0] if problems else None, row not in found.unchecked
    return PatchStatus(patch=row, applied=False, hits=None, problem=problem, checked=checked)


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
