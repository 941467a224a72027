"""The patches for the installed versions: resolved and compared with their fingerprints, nothing applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fluid_npu.doctor.ask import Reply
from fluid_npu.doctor.finding import Item


def patch_items(reply: Reply) -> list[Item]:
    """A line for each feature, one for each row that does not fit. ``reply``: of the question 'patches'."""
    if reply.problem:
        fix = "repair what the message names first"
        return [Item(name="patches", level="wrong", text=f"not checked: {reply.problem}", fix=fix)]
    rows: Sequence[Mapping[str, Any]] = reply.facts["rows"]
    if not rows and not reply.facts["failed"]:
        return [Item(name="patches", level="warn", text="no row for the installed versions", fix="fluid-npu doctor")]
    return [*_by_feature(rows), *_problems(rows), *_unreachable(rows), *_failed(reply.facts["failed"])]


def _by_feature(rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    counts = Counter(row["feature"] for row in rows)
    applied = Counter(row["feature"] for row in rows if row["applied"])
    items = []
    for feature, count in counts.items():
        bad = sum(1 for row in rows if row["feature"] == feature and row["problem"])
        state = f"{count - bad} of {count} rows fit" if bad else "1 row fits" if count == 1 else f"{count} rows fit"
        on = f"{applied[feature]} applied" if applied[feature] else "not applied here"
        files = sorted({row["manifest"] for row in rows if row["feature"] == feature})
        text = f"{state}; {on} ({', '.join(files)})"
        items.append(Item(name=feature, level="wrong" if bad else "ok", text=text, fix=_FIX if bad else ""))
    return items


_FIX = "install a version that the manifest was written for; FLUID_FINGERPRINTS=warn applies changed ones at your risk"


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    return [
        Item(name=f"{row['feature']}: row", level="wrong", text=_named(row["target"], row["problem"]))
        for row in rows
        if row["problem"]
    ]


def _named(target: str, problem: str) -> str:
    return problem if target in problem else f"{target}: {problem}"


def _failed(failed: Mapping[str, str]) -> list[Item]:
    fix = "leave this feature off, or repair what the message names"
    return [
        Item(name=feature, level="warn", text=f"could not be checked: {error}", fix=fix)
        for feature, error in failed.items()
    ]


def _unreachable(rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    return [
        Item(
            name=f"{row['feature']}: row",
            level="warn",
            text=f"{row['target']} is held elsewhere already: {', '.join(row['unreachable'])}",
            fix="import fluid_npu before the code that takes it",
        )
        for row in rows
        if row["unreachable"]
    ]
