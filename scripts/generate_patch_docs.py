"""Writes patches/README.md and docs/MAINTENANCE_GUIDE.md: python scripts/generate_patch_docs.py [--check].

The tables come from the manifests, the guide's prose from scripts/maintenance_guide.md. With --check nothing is
written; exit code 1 when a page is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.adaptor.features import FEATURES  # noqa: E402
from fluid_npu.adaptor.manifest import Manifest, manifest_names, read_manifest  # noqa: E402
from fluid_npu.adaptor.patch import Patch  # noqa: E402

PROSE = ROOT / "scripts" / "maintenance_guide.md"
HEAD = """# Patches

What `fluid_npu.adapt(features)` changes in other packages, and nothing else does. Generated from the manifests in
this folder by `python scripts/generate_patch_docs.py`; a test keeps it up to date. Kinds: *replace* (the target must
exist), *wrap* (ours is called with the original), *add* (the target must not exist), *context* (a context manager is
entered; the target names what it calls). All rows of a feature are applied or none; `rollback()` restores the exact
objects. What to do when upstream changes: [docs/MAINTENANCE_GUIDE.md](../docs/MAINTENANCE_GUIDE.md).
"""


def patches_page(manifests: list[Manifest]) -> str:
    """patches/README.md."""
    parts = [HEAD, "\n", table(["feature", "what it does"], [[f"`{f.name}`", f.what] for f in FEATURES.values()]), "\n"]
    for manifest in manifests:
        parts.append(f"\n## {manifest.name}.toml\n\nFor {manifest.package} {manifest.versions}.\n")
        for feature in FEATURES:
            rows = [row for row in manifest.rows if row.feature == feature]
            reason = manifest.needless.get(feature) or manifest.refused.get(feature)
            if rows:
                parts.append(f"\nFeature `{feature}`:\n\n{row_table(rows)}\n")
            elif reason:
                word = "not needed" if feature in manifest.needless else "refused"
                parts.append(f"\nFeature `{feature}` is {word}: {reason}.\n")
    return "".join(parts)


def row_table(rows: list[Patch]) -> str:
    """One line per row: what it changes and why."""
    head = ["target", "kind", "with", "why", "goes when"]
    return table(head, [[f"`{r.target}`", r.kind, f"`{r.replacement}`", r.why, r.goes_when] for r in rows])


def guide_page(manifests: list[Manifest]) -> str:
    """docs/MAINTENANCE_GUIDE.md."""
    prose = PROSE.read_text(encoding="utf-8")
    lines = table(["manifest", "package", "versions", "rows"], [line_of(manifest) for manifest in manifests])
    parts = [prose, "\n## Supported lines\n\n", lines, "\n\n## What each row was written against\n"]
    for manifest in manifests:
        parts.append(f"\n### {manifest.name}.toml\n\n{source_table(manifest)}\n")
    return "".join(parts)


def line_of(manifest: Manifest) -> list[str]:
    """Manifest, package, range, and the number of rows of each feature."""
    counts = {name: sum(row.feature == name for row in manifest.rows) for name in FEATURES}
    told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return [f"[{manifest.name}.toml](../patches/{manifest.name}.toml)", manifest.package, manifest.versions, told]


def source_table(manifest: Manifest) -> str:
    """Target, fingerprint and link of each row."""
    cells = [[f"`{row.target}`", f"`{row.fingerprint}`", upstream_cell(row.upstream)] for row in manifest.rows]
    return table(["target", "fingerprint", "upstream"], cells)


def upstream_cell(upstream: str) -> str:
    """A link with the file's or number's name for its text, or the reason why there is none."""
    if not upstream.startswith("https://"):
        return upstream
    return f"[{upstream.rstrip('/').rpartition('/')[2]}]({upstream})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def main(words: list[str]) -> int:
    """Writes the pages, or checks them."""
    manifests = [read_manifest(name) for name in manifest_names()]
    pages = {
        ROOT / "patches" / "README.md": patches_page(manifests),
        ROOT / "docs" / "MAINTENANCE_GUIDE.md": guide_page(manifests),
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in words:
            print(f"{path.relative_to(ROOT)} is out of date: python scripts/generate_patch_docs.py", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
    return 1 if stale and "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
