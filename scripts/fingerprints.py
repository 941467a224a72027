"""Fingerprints of the upstream source behind the rows of a manifest, from the installed package.

    python scripts/fingerprints.py --check                                  # every manifest of an installed version
    python scripts/fingerprints.py --write patches/megatron_core-0.16.toml  # after looking at what changed upstream

For a package that is not installed, unpack its wheel and put it first on PYTHONPATH. A row keeps its form (source or
signature); a new row gets 'signature' for torch, whose one manifest serves many versions, else 'source'. Exit code 1
when --check finds a difference, 2 when the package's version does not belong to the manifest.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.adaptor.fingerprint import current_fingerprint, fingerprint_of  # noqa: E402
from fluid_npu.adaptor.manifest import Manifest, manifest_names, read_manifest  # noqa: E402
from fluid_npu.adaptor.patch import Patch, PatchError  # noqa: E402
from fluid_npu.adaptor.versions import fits, installed_version  # noqa: E402

SIGNATURE_PACKAGES = ("torch",)


def found(patch: Patch) -> str:
    """What the row's fingerprint is with the installed package."""
    if patch.fingerprint == "" and patch.package in SIGNATURE_PACKAGES:
        return fingerprint_of(patch.target, "signature")
    return current_fingerprint(patch)


def installed(manifest: Manifest) -> bool:
    """Whether the manifest is for the installed version."""
    version = installed_version(manifest.package)
    return version is not None and fits(version, manifest.versions)


def check(names: list[str]) -> int:
    """Prints every row whose fingerprint differs; 1 if there is one."""
    differs = 0
    for name in names:
        for patch in read_manifest(name).rows:
            now = found(patch)
            if now != patch.fingerprint:
                print(f"{patch.name}: recorded {patch.fingerprint or 'nothing'}, found {now}")
                differs = 1
    return differs


def write(name: str) -> None:
    """Puts the fingerprints into the file; everything else in it stays as it is."""
    path = ROOT / "patches" / f"{name}.toml"
    rows = list(read_manifest(name).rows)
    head, *blocks = re.split(r"(?m)^(?=\[\[patch\]\]$)", path.read_text(encoding="utf-8"))
    texts = [with_fingerprint(block, found(row)) for block, row in zip(blocks, rows, strict=True)]
    path.write_text(head + "".join(texts), encoding="utf-8")


def with_fingerprint(block: str, value: str) -> str:
    """The text of one row with this fingerprint."""
    line = "fingerprint = " + ("'" + value + "'" if '"' in value else '"' + value + '"')
    if re.search(r"(?m)^fingerprint = ", block):
        return re.sub(r"(?m)^fingerprint = .*$", lambda _match: line, block)
    body = block.rstrip("\n")
    return f"{body}\n{line}{block[len(body) :]}"


def main(words: list[str]) -> int:
    """Parses the arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compare; exit code 1 when a row differs")
    mode.add_argument("--write", action="store_true", help="write the fingerprints into the manifests named")
    parser.add_argument("manifests", nargs="*", type=Path, help="patches/X.toml; --check without names takes all")
    args = parser.parse_args(words)
    names = [path.name.removesuffix(".toml") for path in args.manifests]
    if args.check and not names:
        names = [name for name in manifest_names() if installed(read_manifest(name))]
    if not names:
        parser.error("--write needs the manifests to write, for example patches/megatron_core-0.16.toml")
    for name in names:
        manifest = read_manifest(name)
        if not installed(manifest):
            version = installed_version(manifest.package) or "not installed"
            print(f"{name}.toml is for {manifest.package} {manifest.versions}; here it is {version}", file=sys.stderr)
            return 2
    if args.check:
        return check(names)
    for name in names:
        write(name)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PatchError as problem:
        sys.exit(f"error: {problem}")
