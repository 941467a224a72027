"""The rows of patches/*.toml: each resolves, says why it is there, and goes away without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.adaptor import FEATURES, adapt
from fluid_npu.adaptor.manifest import installed_manifests
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.target import MISSING, resolve
from tests.support.prevents import parts, wrong
from tests.support.stock import without_each

ROWS = [row for manifest in installed_manifests([]) for row in manifest.rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.target)
def test_row_resolves_and_gives_its_reasons(row: Patch) -> None:
    assert row.feature in FEATURES
    assert row.why.endswith(".") and len(row.why) > 15
    assert row.goes_when and row.goes_when != "as above", "each row is readable on its own"
    assert row.upstream.startswith(("https://", "none: "))
    row.load_replacement()
    if row.kind != "context":
        assert (resolve(row.target).visible is MISSING) == (row.kind == "add")


def targets() -> dict[str, Any]:
    """The raw objects behind the targets, as they are stored."""
    found = {}
    for row in ROWS:
        if row.kind != "context" and row.feature in ("cpu", "no_te"):
            found[row.target] = resolve(row.target).own
    return found


def once_and_back() -> None:
    before = targets()
    with adapt(["cpu"]) as outer:
        during = targets()
        assert all(during[name] is not before[name] for name in before if not name.endswith("_available"))
        with adapt(["cpu"]) as inner:
            assert inner.features == [], "twice is once"
        assert targets() == during, "the inner call has nothing to take back"
        assert outer.features == ["cpu", "no_te"], "without Transformer Engine the repairs come along"
    after = targets()
    assert all(after[name] is before[name] for name in before)


def test_adapting_twice_is_once_and_its_end_restores_every_object(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(1, once_and_back)


def test_every_cpu_row_prevents_what_it_says(run_ranks: Callable[..., list[Any]]) -> None:
    """On this line; the others: tests/lines/test_rows.py."""
    for outcome in run_ranks(2, without_each, parts(), timeout=280):
        assert wrong(outcome) == []
