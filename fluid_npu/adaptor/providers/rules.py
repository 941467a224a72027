"""Where our rows and another package's patches meet: who lies on top, who wins, and what cannot be had together.

A wrap of ours lies on top of anything. Where both put an object of their own on one target, that is a conflict, unless
a rule here says who wins; then the choice is printed, the other's object stays below ours and is back after rollback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.providers.base import Foreign
from fluid_npu.adaptor.target import resolve

_MOE = "megatron.core.transformer.moe"


@dataclass(frozen=True, kw_only=True)
class Wins:
    """Our row may replace ``target`` although the other package does so too, or patches what the target holds."""

    target: str
    feature: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Excludes:
    """Our feature and the other package's patch of ``target`` must not be on together, whatever our rows target."""

    target: str
    feature: str
    reason: str
    fix: str


WINS = (
    Wins(
        target=f"{_MOE}.experts.GroupedMLP",
        feature="grouped_mlp",
        reason="both run grouped experts; ours hands its weight gradients to the scheduler",
    ),
    Wins(
        target=f"{_MOE}.token_dispatcher.MoEAlltoAllTokenDispatcher",
        feature="token_dispatcher",
        reason="ours permutes and sends tokens itself",
    ),
)
EXCLUDES = (
    Excludes(
        target=f"{_MOE}.moe_layer.MoELayer",
        feature="moe",
        reason="both replace the MoE layer to overlap the same AllToAll",
        fix="drop --moe-alltoall-overlap-comm, --moe-allgather-overlap-comm, --moe-alltoall-mc2 and "
        "--moe-tp-extend-ep, or leave the feature 'moe' off",
    ),
    Excludes(
        target="megatron.core.models.gpt.moe_module_specs.get_moe_module_spec",
        feature="moe",
        reason="both change what the spec builds as MoE layer (fb-overlap, balanced experts)",
        fix="drop --moe-fb-overlap and --balanced-moe-experts, or leave the feature 'moe' off",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """One row of ours and one patch of theirs on the same target. ``problem`` is None where both can be."""

    row: Patch
    foreign: Foreign
    how: str
    problem: str | None = None
    won: bool = False


def meetings(rows: Sequence[Patch], foreign: Iterable[Foreign]) -> list[Meeting]:
    """Every place where the rows and the patches meet, with what follows."""
    theirs = list(foreign)
    found = [meeting for row in rows for other in theirs if (meeting := _meeting(row, other)) is not None]
    return found + [*_excluded(rows, theirs)]


def announce(found: Iterable[Meeting]) -> None:
    """Prints each target that ours won, once per process."""
    from fluid_npu.device.choice import Choice  # imports torch, which asking for problems must not

    for meeting in found:
        if meeting.won:
            reason = f"{meeting.how}; {', '.join(meeting.foreign.by)} stays below and is back after rollback"
            Choice(f"fluid_npu, not {meeting.foreign.owner}", reason).announce(f"patch of {meeting.foreign.target}")


def _meeting(row: Patch, other: Foreign) -> Meeting | None:
    if row.kind == "context":
        return None
    if _same(row, other):
        if row.kind == "wrap":
            return Meeting(row=row, foreign=other, how="ours wraps theirs")
        both = "both replace it" if other.replaces else "ours replaces what theirs wraps"
        return _contested(row, other, both)
    if other.target.startswith(row.target + ".") and row.kind == "replace":
        return _contested(row, other, f"ours replaces {row.target}, which holds the target of theirs")
    if other.replaces and row.target.startswith(other.target + "."):
        return _contested(row, other, f"theirs replaces {other.target}, which holds the target of ours")
    return None


def _contested(row: Patch, other: Foreign, how: str) -> Meeting:
    for rule in WINS:
        if rule.feature == row.feature and (other.target + ".").startswith(rule.target + "."):
            return Meeting(row=row, foreign=other, how=f"{how}: {rule.reason}", won=True)
    problem = (
        f"conflict: {row.name} and {other.name}: {how}. Leave feature {row.feature!r} out, or switch off what makes "
        f"{other.owner} patch it"
    )
    return Meeting(row=row, foreign=other, how=how, problem=problem)


def _excluded(rows: Sequence[Patch], theirs: Sequence[Foreign]) -> Iterator[Meeting]:
    for rule in EXCLUDES:
        row = next((row for row in rows if row.feature == rule.feature), None)
        for other in theirs if row is not None else ():
            if row is not None and other.target == rule.target:
                problem = f"conflict: feature {rule.feature!r} and {other.name}: {rule.reason}. Fix: {rule.fix}"
                yield Meeting(row=row, foreign=other, how=rule.reason, problem=problem)


def _same(row: Patch, other: Foreign) -> bool:
    """The same path, or two paths under which Megatron keeps one function or class."""
    if row.target == other.target:
        return True
    if row.target.rpartition(".")[2] != other.target.rpartition(".")[2]:
        return False
    try:
        mine, theirs = resolve(row.target).visible, resolve(other.target).visible
    except (PatchError, ImportError):
        return False
    # Constants such as True are one object wherever they stand.
    return mine is theirs and hasattr(mine, "__qualname__")
