"""Writes patches/README.md from the manifests: python scripts/generate_patch_docs.py [--check].

With --check nothing is written; exit code 1 when the file is out of date.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.adaptor.manifest import load_manifest, manifest_names  # noqa: E402
from fluid_npu.adaptor.patch import Patch  # noqa: E402

PAGE = ROOT / "patches" / "README.md"
HEAD = """# Patches

What `fluid_npu.adapt(features)` changes in other packages, and nothing else does. Generated from the manifests in
this folder by `python scripts/generate_patch_docs.py`; a test keeps it up to date. Kinds: *replace* (the target must
exist), *wrap* (ours is called with the original), *add* (the target must not exist), *context* (a context manager is
entered; the target names what it changes). All rows of a feature are applied or none; `rollback()` restores the exact
objects.
"""


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for name in manifest_names():
        parts.append(f"\n## {name}.toml\n")
        for feature, rows in groupby(load_manifest(name), key=lambda row: row.feature):
            parts.append(f"\nFeature `{feature}`:\n\n{table(list(rows))}\n")
    return "".join(parts)


def table(rows: list[Patch]) -> str:
    """One line per row."""
    lines = ["| target | kind | with | why | goes when |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| `{row.target}` | {row.kind} | `{row.replacement}` | {row.why} | {row.goes_when} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Writes the page, or checks it."""
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if current == page():
        return 0
    if "--check" in words:
        print(f"patches/{PAGE.name} is out of date: python scripts/generate_patch_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
