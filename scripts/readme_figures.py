"""Writes the tables of figures in README.md and README.zh-CN.md from benchmarks/*.json.

    python scripts/readme_figures.py [--check]

Each file is what ``fluid-npu bench ... --json`` printed: an object with command, machine, versions and rows. With
--check nothing is written; exit code 1 when a page is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
PAGES = {
    "README.md": ("No measurement is recorded under `benchmarks/` yet, so no figure is given here.", "Recorded in"),
    "README.zh-CN.md": ("`benchmarks/` 下尚无测量记录，因此这里不给出数字。", "记录见"),
}


def results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, result) of every recorded bench, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("bench", "train-step") == "train-step":
            found.append((path.name, result))
    return found


def figures(folder: Path, nothing: str, recorded: str) -> str:
    """All tables, each with its command, machine and versions."""
    parts = [_section(name, result, recorded) for name, result in results(folder)]
    return "\n\n".join(parts) if parts else nothing


def _section(name: str, result: dict[str, Any], recorded: str) -> str:
    lines = [
        "| case | implementation | median ms | p10 to p90 | stock / this (95 %) | peak MB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [_line(row) for row in result["rows"]]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return "\n".join(
        [*lines, "", f"`{result['command']}`; {_machine(result)}; {versions}. {recorded} [{name}](benchmarks/{name})."]
    )


def _line(row: dict[str, Any]) -> str:
    ratio, low, high = (row.get(f"ratio_stock_over_this{end}") for end in ("", "_low", "_high"))
    shown = "-" if ratio is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    peak = row.get("peak_memory_mb")
    return (
        f"| {row['case']} | {row['impl']} | {row['median_ms']:.1f} | {row['p10_ms']:.1f} to {row['p90_ms']:.1f} "
        f"| {shown} | {'-' if peak is None else format(peak, '.1f')} |"
    )


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if isinstance(machine, str):
        return machine
    return f"{machine['description']}, {machine['nproc']} ranks over {machine['backend']}"


def with_figures(text: str, block: str) -> str:
    """The page with ``block`` between its markers. Raises ValueError when they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(words: list[str]) -> int:
    """Writes the pages, or checks them."""
    stale = []
    for name, (nothing, recorded) in PAGES.items():
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = with_figures(before, figures(ROOT / "benchmarks", nothing, recorded))
        if after != before:
            stale.append(name)
            if "--check" not in words:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in words:
        print(f"out of date: {', '.join(stale)}; python scripts/readme_figures.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
