"""A table as text cells, its markdown, and figures as text. HTML is made by the page's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """``name`` identifies it within a result. The first ``words`` columns are words, the others figures."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""


def markdown(table: Table) -> str:
    """The table without its title."""
    rule = ["---"] * table.words + ["--:"] * (len(table.head) - table.words)
    lines = [table.head, rule, *table.rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def figure(value: float | None, digits: int = 2, *, unit: str = "") -> str:
    """'-' for what was not measured or cannot be told from noise."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as per cent."""
    return figure(None if value is None else 100 * value, digits, unit=" %")


def signed_percent(value: float | None) -> str:
    """A gain."""
    return "-" if value is None else f"{100 * value:+.1f} %"


def plus_minus(value: float | None, spread: float | None) -> str:
    """A figure with its spread, where there is one."""
    return figure(value) if spread is None else f"{figure(value)} ±{spread:.2f}"


def between(low: float | None, high: float | None, digits: int = 1) -> str:
    """'1.0 to 2.0'."""
    return "-" if low is None or high is None else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def cells(*values: str) -> tuple[str, ...]:
    """One row."""
    return values


def noisy(row: dict[str, Any]) -> str:
    """What stands behind the name of a row that could not be judged."""
    return "" if row.get("judged", True) else " (NOISY)"


def all_judged(rows: Sequence[dict[str, bool]]) -> str:
    """The note of a table with rows that were too noisy, otherwise nothing."""
    noisy = sum(not row.get("judged", True) for row in rows)
    if not noisy:
        return ""
    return (
        f"NOISY: {noisy} of {len(rows)} rows were too noisy to judge: the medians of two halves of their rounds differ "
        "by 10 % or more."
    )
