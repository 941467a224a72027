"""What must be true before a row is applied. Everything is looked at, nothing is changed, all problems are told.

A target that is gone, a version outside the row's range, a conflict with another owner and a replacement that cannot be
loaded are errors. Upstream source that differs from the row's fingerprint is an error or, by policy, a warning.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluid_npu.adaptor import providers
from fluid_npu.adaptor.fingerprint import current_fingerprint, definition, signature_text, unwrapped
from fluid_npu.adaptor.patch import ImportFailed, Patch, PatchError
from fluid_npu.adaptor.target import MISSING, Slot, resolve
from fluid_npu.adaptor.versions import fits, installed_version

POLICIES = ("strict", "warn")


@dataclass
class Findings:
    """``errors`` stop an apply; ``changes`` of upstream source stop it under 'strict' and warn under 'warn'.

    ``unchecked``: the rows among the errors about which nothing is known, because a module of theirs does not import.
    """

    errors: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    unchecked: list[Patch] = field(default_factory=list)


def check(rows: Sequence[Patch], applied: Sequence[Patch]) -> Findings:
    """Looks at every row as if the rows before it, and those already applied, were in force."""
    found = Findings()
    earlier = list(applied)
    for patch in rows:
        try:
            problem = _error(patch, earlier)
        except ImportFailed as error:
            problem = _explained(patch, error)
            found.unchecked.append(patch)
        if problem is not None:
            found.errors.append(problem)
        elif not any(other.target == patch.target for other in applied):
            change = _change(patch)
            if change is not None:
                found.changes.append(change)
        earlier.append(patch)
    found.errors += providers.problems(rows)
    return found


def in_order(rows: Iterable[Patch]) -> list[Patch]:
    """Rows as they are applied: in the order given, wraps last, so that a wrap lies over a replacement."""
    return sorted(rows, key=lambda row: row.kind == "wrap")


def versions_text(patch: Patch) -> str:
    """'installed megatron-core 0.16.1, the row supports >=0.16.1,<0.17'."""
    if not patch.package:
        return "the row names no package"
    installed = installed_version(patch.package) or "not at all"
    return f"installed: {patch.package} {installed}; the row supports {patch.versions or 'every version'}"


def _error(patch: Patch, earlier: Sequence[Patch]) -> str | None:
    """The first thing that makes the row impossible, or None. Raises ImportFailed."""
    wrong_version = _version_error(patch)
    if wrong_version is not None:
        return wrong_version
    try:
        patch.load_replacement()
        slot = resolve(patch.target)
    except ImportFailed:
        raise
    except PatchError as error:
        return _explained(patch, error)
    conflict = conflict_of(patch, earlier)
    if conflict is not None:
        return conflict
    exists = slot.visible is not MISSING or any(other.target == patch.target for other in earlier)
    if patch.kind == "add" and exists:
        return (
            f"{patch.name}: kind 'add' but the target already exists; upstream grew its own ({versions_text(patch)}). "
            f"See whether the row is still needed, or make it 'replace'"
        )
    if patch.kind != "add" and not exists:
        return (
            f"{patch.name}: the target does not exist; was it renamed or removed upstream? ({versions_text(patch)}) "
            f"{_advice(patch)}"
        )
    return None


def _explained(patch: Patch, error: PatchError) -> str:
    text = str(error)
    if text.startswith(patch.name):
        return text
    fix = "Repair what the import names" if isinstance(error, ImportFailed) else _advice(patch)
    return f"{patch.name}: {text} ({versions_text(patch)}). {fix}"


def _advice(patch: Patch) -> str:
    return (
        f"Find its new name in the upstream history ({patch.upstream}), then change or drop the row in "
        f"{patch.manifest}; docs/MAINTENANCE_GUIDE.md says how. Until then install a supported version"
    )


def _version_error(patch: Patch) -> str | None:
    if not patch.package:
        return None
    installed = installed_version(patch.package)
    if installed is not None and fits(installed, patch.versions):
        return None
    return (
        f"{patch.name}: {versions_text(patch)}. Install a version in this range, or take the manifest of the installed "
        "line (docs/MAINTENANCE_GUIDE.md says how to add one)"
    )


def conflict_of(patch: Patch, earlier: Sequence[Patch]) -> str | None:
    """How the row and one before it would undo each other, naming both owners; or None.

    Only wraps may share a target: the later lies outside. A replaced class and a patch of its attribute exclude each
    other, because the second would change either our class or one that nobody uses any more.
    """
    for other in earlier:
        same = other.target == patch.target
        if same and "context" not in (patch.kind, other.kind) and patch.kind != "wrap":
            verb = "replace" if other.kind == patch.kind == "replace" else "set"
            if other.kind == "wrap":
                return (
                    f"conflict: {patch.name} would drop {other.name}, which wraps the same target; switch "
                    f"{patch.feature!r} on before {other.feature!r}, or both in one call"
                )
            return f"conflict: {patch.name} and {other.name} both {verb} the same target; leave one feature out"
        for outer, inner in ((patch, other), (other, patch)):
            if outer.kind == "replace" and inner.target.startswith(outer.target + "."):
                return (
                    f"conflict: {outer.name} replaces what holds the target of {inner.name}; leave one feature out, or "
                    "bring the inner change into the replacement"
                )
    return None


def _change(patch: Patch) -> str | None:
    """How the upstream source differs from what the row was written against, or None."""
    if patch.kind == "add":
        return None
    if not patch.fingerprint:
        return (
            f"{patch.name}: it has no fingerprint yet; python scripts/fingerprints.py --write patches/{patch.manifest}"
        )
    try:
        now = current_fingerprint(patch)
    except PatchError as error:
        return f"{patch.name}: no fingerprint can be made: {error}"
    if now != patch.fingerprint:
        return (
            f"{patch.name}: the upstream source is not the one that the row was written against: recorded "
            f"{patch.fingerprint}, found {now} ({versions_text(patch)}). Compare it with {patch.upstream}, adapt "
            f"{patch.replacement}, then {_refresh(patch)}. To go on at your own risk: "
            "adapt(..., fingerprints='warn') or FLUID_FINGERPRINTS=warn"
        )
    return _resigned(patch, resolve(patch.target))


def _refresh(patch: Patch) -> str:
    return f"python scripts/fingerprints.py --write patches/{patch.manifest}"


def _resigned(patch: Patch, slot: Slot) -> str | None:
    """A function that somebody put in upstream's place while running, with other parameters."""
    node, function = definition(slot), unwrapped(slot.visible)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not inspect.isfunction(
        inspect.unwrap(function)
    ):
        return None
    if node.decorator_list:
        return None  # Upstream's own decorators may show other parameters (typed_torch.copy_signature, from 0.17).
    declared = _declared(node)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = {item.kind for item in parameters}
    takes_all = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    if takes_all or [item.name for item in parameters] == declared:
        return None
    return (
        f"{patch.name}: {whereabouts(function)} stands in its place with the parameters "
        f"{signature_text(function)}; the row was written for ({', '.join(declared)}) ({versions_text(patch)}). Apply "
        "that change after fluid_npu.adapt, or make it keep the signature; to go on at your risk: fingerprints='warn'"
    )


def _declared(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    args = node.args
    names = [item.arg for item in [*args.posonlyargs, *args.args]]
    if args.vararg:
        names.append(args.vararg.arg)
    names += [item.arg for item in args.kwonlyargs]
    if args.kwarg:
        names.append(args.kwarg.arg)
    return names


def whereabouts(thing: Any) -> str:
    """'module.name (file:line)' of a function, for messages."""
    function = inspect.unwrap(thing)
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}{place}"
