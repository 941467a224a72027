"""The doctor's findings as one screen of plain text, and as JSON with keys that stay.

Marks: ``ok`` as it should be, ``--`` worth knowing, `` ?`` may hurt, ``!!`` training does not work like this.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fluid_npu.doctor.finding import Item, Section, worst
from fluid_npu.doctor.readiness import Readiness
from fluid_npu.version import __version__

SCHEMA = 1
MARKS = {"ok": "ok", "note": "--", "warn": " ?", "wrong": "!!"}
_WIDTH, _NAME = 120, 28


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that ``fluid-npu doctor`` says."""

    sections: tuple[Section, ...]
    overlap: Readiness
    next: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The gravest level."""
        return worst(self.sections)


def as_json(report: Report) -> dict[str, Any]:
    """Keys as documented in docs/DOCTOR.md."""
    return {
        "schema": SCHEMA,
        "fluid_npu": __version__,
        "verdict": report.verdict,
        "sections": {section.name: [asdict(item) for item in section.items] for section in report.sections},
        "overlap": asdict(report.overlap),
        "next": list(report.next),
    }


def as_text(report: Report) -> str:
    """One screen; long texts go on in the column where they began."""
    lines = [f"fluid-npu {__version__} doctor: {_verdict(report)}"]
    for section in report.sections:
        lines += ["", section.title, *_items(section.items)]
    lines += ["", "What to do next"]
    lines += [f"  {number}. {step}" for number, step in enumerate(report.next, 1)]
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    items = [item for section in report.sections for item in section.items]
    wrong, warn = (sum(item.level == level for item in items) for level in ("wrong", "warn"))
    if wrong:
        return f"{wrong} wrong (!!), {warn} that may hurt (?); training does not work like this"
    return f"nothing wrong; {warn} that may hurt (?)" if warn else "nothing wrong"


def _items(items: Sequence[Item]) -> list[str]:
    lines = []
    for item in items:
        text = f"{item.text}  [fix: {item.fix}]" if item.fix else item.text
        lines += _wrapped(f"  {MARKS[item.level]} {item.name:<{_NAME}}", text)
        for detail in item.details:
            lines += _wrapped("", detail)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * (_NAME + 6)
    whole = f"{head:<{len(indent)}}{text}"
    return textwrap.wrap(whole, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
