"""The registry: all or nothing, exact restore, and errors that name target and owner."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from fluid_npu.adaptor import adapt, select
from fluid_npu.adaptor.manifest import load_manifest
from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.target import resolve
from tests.support.patch_rows import patch_row

EVENTS: list[str] = []


def ours(*_args: Any) -> str:
    return "ours"


def wrapper(original: Any) -> Any:
    return lambda *args: f"wrapped {original(*args)}"


def failing_wrapper(_original: Any) -> Any:
    raise ValueError("planted failure")


@contextmanager
def entered() -> Iterator[None]:
    EVENTS.append("enter")
    yield
    EVENTS.append("exit")


class Base:
    def inherited(self) -> str:
        return "base"


class Upstream(Base):
    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def bound(cls) -> str:
        return cls.__name__

    def method(self) -> str:
        return "method"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module ``upstream_pkg`` to patch; replacements are found in ``upstream_ours``."""
    module, helpers = ModuleType("upstream_pkg"), ModuleType("upstream_ours")
    module.function = lambda: "original"  # type: ignore[attr-defined]
    module.Upstream = Upstream  # type: ignore[attr-defined]
    for item in (ours, wrapper, failing_wrapper, entered):
        setattr(helpers, item.__name__, item)
    monkeypatch.setitem(sys.modules, "upstream_pkg", module)
    monkeypatch.setitem(sys.modules, "upstream_ours", helpers)
    return module


def row(target: str, kind: str = "replace", replacement: str = "ours", feature: str = "tests") -> Patch:
    return patch_row(f"upstream_pkg.{target}", kind, f"upstream_ours:{replacement}", feature)


def test_every_kind_is_applied_and_undone_in_reverse(upstream: ModuleType) -> None:
    EVENTS.clear()
    before = upstream.function
    registry = Registry()
    rows = [row("added", "add"), row("function", "context", "entered"), row("function", "wrap", "wrapper")]
    registry.apply(rows)
    assert upstream.function() == "wrapped original"
    assert upstream.added() == "ours"
    assert registry.applied == rows
    registry.rollback()
    assert upstream.function is before
    assert not hasattr(upstream, "added")
    assert EVENTS == ["enter", "exit"]
    assert registry.applied == []


@pytest.mark.parametrize("name", ["static", "bound", "method", "inherited"])
def test_restoring_puts_back_the_exact_descriptor(upstream: ModuleType, name: str) -> None:
    before = dict(vars(Upstream))
    registry = Registry()
    registry.apply([row(f"Upstream.{name}")])
    assert getattr(Upstream(), name)() == "ours"
    registry.rollback()
    after = dict(vars(Upstream))
    assert after.keys() == before.keys(), "an inherited attribute must not become the class's own"
    assert all(after[key] is before[key] for key in before)


def test_wrapping_twice_nests_and_unwinds(upstream: ModuleType) -> None:
    before = upstream.function
    registry = Registry()
    registry.apply([row("function", "wrap", "wrapper"), row("function", "wrap", "wrapper")])
    assert upstream.function() == "wrapped wrapped original"
    registry.rollback()
    assert upstream.function is before


@pytest.mark.parametrize(
    "bad, message",
    [
        (("gone",), r"upstream_pkg\.gone.*does not exist; was it renamed"),
        (("Absent.method",), r"upstream_pkg has no 'Absent'"),
        (("function", "add"), r"kind 'add' but the target already exists"),
        (("Upstream.method", "replace", "nowhere"), r"replacement 'upstream_ours:nowhere' cannot be loaded"),
        (("Upstream.method", "wrap", "failing_wrapper"), r"undone: ValueError: planted failure"),
    ],
    ids=["missing", "missing holder", "existing add", "no replacement", "fails while applying"],
)
def test_one_bad_row_and_nothing_is_changed(upstream: ModuleType, bad: tuple[str, ...], message: str) -> None:
    before, method = upstream.function, vars(Upstream)["method"]
    registry = Registry()
    with pytest.raises(PatchError, match=message):
        registry.apply([row("function", "wrap", "wrapper"), row(*bad)])
    assert upstream.function is before
    assert vars(Upstream)["method"] is method
    assert registry.applied == []


def test_a_later_failure_keeps_earlier_calls(upstream: ModuleType) -> None:
    registry = Registry()
    registry.apply([row("function")])
    with pytest.raises(PatchError):
        registry.apply([row("Upstream.method"), row("gone")])
    assert upstream.function() == "ours"
    assert Upstream().method() == "method"
    registry.rollback()


def test_two_owners_of_one_target_are_both_named(upstream: ModuleType) -> None:
    registry = Registry()
    registry.apply([row("function", feature="first")])
    with pytest.raises(PatchError, match=r"conflict: .*feature 'second'.*feature 'first'"):
        registry.apply([row("function", feature="second")])
    registry.rollback()


def test_rollback_refuses_when_somebody_patched_on_top(upstream: ModuleType) -> None:
    registry = Registry()
    registry.apply([row("function"), row("Upstream.method")])
    installed = upstream.function
    upstream.function = lambda: "theirs"  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match=r"patched on top of patch of upstream_pkg\.function"):
        registry.rollback()
    assert Upstream().method() == "ours", "a refused rollback changes nothing"
    upstream.function = installed  # type: ignore[attr-defined]
    registry.rollback()


def test_a_row_that_cannot_be_is_refused_where_it_is_written() -> None:
    with pytest.raises(PatchError, match=r"kind='swap' is unknown; allowed: replace, wrap, add, context"):
        row("function", "swap")
    with pytest.raises(PatchError, match=r"must be written 'package.module:attribute'"):
        patch_row("a.b", "replace", "a.b")
    with pytest.raises(PatchError, match=r"fingerprint='absent' does not go with kind='replace'"):
        patch_row("a.b", "replace", "a:b", fingerprint="absent")


def test_a_target_outside_any_package_is_named() -> None:
    with pytest.raises(PatchError, match=r"no_such_package\.thing: no module of that name"):
        resolve("no_such_package.thing")


def test_an_unknown_feature_or_manifest_is_refused_with_what_exists() -> None:
    with pytest.raises(PatchError, match=r"adapt\(features=\.\.\.\): 'gpu' is unknown; allowed: cpu"):
        adapt(["gpu"])
    with pytest.raises(PatchError, match=r"no manifest torch_xla\.toml.*available: .*torch"):
        load_manifest("torch_xla")


def test_an_unsupported_megatron_is_refused_with_the_supported_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluid_npu.adaptor.manifest.installed_version", {"megatron-core": "0.99.1"}.get)
    with pytest.raises(PatchError, match=r"megatron-core 0\.99\.1 has no manifest.*supported: .*>=0\.16\.1,<0\.17"):
        select(["cpu"])


def test_a_broken_manifest_row_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    header = '[manifest]\npackage = "a"\nversions = ">=1"\n'
    (tmp_path / "broken.toml").write_text(header + '[[patch]]\ntarget = "a.b"\nkind = "replace"\n')
    monkeypatch.setattr("fluid_npu.adaptor.manifest.resources.files", lambda _package: tmp_path)
    with pytest.raises(PatchError, match=r"broken\.toml: row a\.b: .*missing"):
        load_manifest("broken")
