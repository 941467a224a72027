"""Patch rows for tests, with the fingerprint that their target really has."""

from __future__ import annotations

from typing import Any

from fluid_npu.adaptor.fingerprint import fingerprint_of
from fluid_npu.adaptor.patch import ABSENT, Patch, PatchError


def patch_row(target: str, kind: str, replacement: str, feature: str = "tests", **fields: Any) -> Patch:
    """A row of a manifest 'test.toml'. A target that is not there gets a fingerprint that fits nothing."""
    return Patch(
        **{
            "target": target,
            "kind": kind,
            "replacement": replacement,
            "feature": feature,
            "why": "A test needs it.",
            "goes_when": "the test ends",
            "upstream": "none: a test",
            "fingerprint": ABSENT if kind == "add" else _found(target),
            "manifest": "test.toml",
            **fields,
        }
    )


def _found(target: str) -> str:
    for form in ("source", "signature"):
        try:
            return fingerprint_of(target, form)
        except PatchError:
            continue
    return "source:none"
