"""Fills the tables and figures of README and docs from benchmarks/*.json.

    python scripts/generate_tables.py [--check]

The markers that a page has for them are described in fluid_npu/report/blocks.py. With --check nothing is written; exit
code 1 when a page is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.report.blocks import BlockError, fill  # noqa: E402


def pages(root: Path) -> list[Path]:
    """Every page that people read."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/*.md")])


def main(words: list[str], root: Path = ROOT) -> int:
    """Writes the pages, or checks them."""
    unknown = [word for word in words if word != "--check"]
    if unknown:
        print(f"generate_tables.py: unknown argument {unknown[0]}; allowed: --check", file=sys.stderr)
        return 2
    stale = []
    for page in pages(root):
        before = page.read_text(encoding="utf-8")
        try:
            after = fill(before, page, root)
        except BlockError as error:
            print(f"generate_tables.py: {error}", file=sys.stderr)
            return 1
        if after != before:
            stale.append(page.relative_to(root).as_posix())
            if "--check" not in words:
                page.write_text(after, encoding="utf-8")
    if stale and "--check" in words:
        print(f"out of date: {', '.join(stale)}; python scripts/generate_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
