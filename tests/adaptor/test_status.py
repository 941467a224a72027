"""What ``status``, ``select`` and ``adapt`` say of features without rows, and of rows whose modules do not import."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluid_npu import adaptor
from fluid_npu.adaptor import PatchError, adapt, select, status
from fluid_npu.adaptor.manifest import Manifest, installed_manifests, read_manifest
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the feature 'token_dispatcher' whose target, and whose replacement, lie in modules that raise."""
    package = tmp_path / "broken_upstream"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loop.py").write_text("from typing import no_such_name\n")
    (package / "syntax.py").write_text("def (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = (
        patch_row("broken_upstream.loop.train", "wrap", f"{kinds.HERE}:around", "token_dispatcher", package="torch"),
        patch_row(kinds.STATIC, "wrap", "broken_upstream.syntax:around", "token_dispatcher", package="torch"),
    )
    extra = Manifest(name="broken", package="torch", versions="", rows=rows)
    monkeypatch.setattr(adaptor, "installed_manifests", lambda features: [*installed_manifests(features), extra])


@pytest.mark.usefixtures("broken")
def test_a_module_that_does_not_import_is_its_rows_problem_and_hides_no_other() -> None:
    states = status()
    loop, syntax = (state for state in states if not state.checked)
    assert loop.problem is not None and syntax.problem is not None
    assert "broken_upstream.loop.train" in loop.problem and "feature 'token_dispatcher'" in loop.problem
    assert "importing broken_upstream.loop failed: ImportError: cannot import name 'no_such_name'" in loop.problem
    assert "replacement 'broken_upstream.syntax:around' cannot be loaded: SyntaxError" in syntax.problem
    others = [state for state in states if state.checked]
    assert {state.patch.feature for state in others} >= {"cpu", "moe", "grouped_mlp", "token_dispatcher"}
    assert all(state.problem is None for state in others)


@pytest.mark.usefixtures("broken")
def test_switching_it_on_is_an_error_that_names_the_row_and_changes_nothing() -> None:
    with pytest.raises(PatchError, match=r"broken_upstream\.loop failed: ImportError(.|\n)*syntax:around.*SyntaxError"):
        adapt(["token_dispatcher"])
    assert not any(state.applied for state in status())
    with adapt(["moe"]) as on:
        assert on.features == ["moe"], "other features are not concerned"


@pytest.mark.usefixtures("broken")
def test_the_doctor_shows_the_rest_and_names_the_feature() -> None:
    from fluid_npu.doctor.child import patch_facts

    facts = patch_facts()
    assert list(facts["failed"]) == ["token_dispatcher"] and "ImportError" in facts["failed"]["token_dispatcher"]
    assert {"cpu", "moe"} <= {row["feature"] for row in facts["rows"]}
    assert "token_dispatcher" not in {row["feature"] for row in facts["rows"]}


def as_if_installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    for place in ("fluid_npu.adaptor", "fluid_npu.adaptor.manifest"):
        monkeypatch.setattr(f"{place}.installed_version", {"megatron-core": version}.get)


def test_a_needless_feature_is_switched_on_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(["no_te"]), "this line has rows of it"
    as_if_installed(monkeypatch, "0.18.2")
    assert select(["no_te"]) == []
    with adapt(["no_te"]) as on:
        assert on.features == ["no_te"] and on.report() == ""
    assert status(["no_te"]) == []


def test_a_refused_feature_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_installed(monkeypatch, "0.18.2")
    reason = r"'grouped_mlp' is not for megatron-core 0\.18\.2: GroupedMLP was deleted upstream in 0\.17; use the feat"
    with pytest.raises(PatchError, match=reason):
        adapt(["grouped_mlp"])
    assert "grouped_mlp" not in {state.patch.feature for state in status()}
    as_if_installed(monkeypatch, "0.12.1")
    with pytest.raises(PatchError, match=r"'late_gradients' is not for megatron-core 0\.12\.1: its DDP has no delay"):
        select(["late_gradients"])


def test_a_feature_with_neither_rows_nor_a_reason_is_an_error_that_says_where_it_has_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_reasons(name: str) -> Manifest:
        manifest = read_manifest(name)
        return Manifest(name=name, package=manifest.package, versions=manifest.versions, rows=manifest.rows)

    monkeypatch.setattr("fluid_npu.adaptor.manifest.read_manifest", without_reasons)
    as_if_installed(monkeypatch, "0.18.2")
    message = r"'grouped_mlp' has no rows for megatron-core 0\.18\.2; it has rows in: megatron_core-0\.12, "
    with pytest.raises(PatchError, match=message):
        select(["grouped_mlp"])


def test_every_feature_has_rows_or_a_reason_on_every_line() -> None:
    for line in ("0.12", "0.16", "0.18", "0.19"):
        manifest = read_manifest(f"megatron_core-{line}")
        told = {*manifest.needless, *manifest.refused, *(row.feature for row in manifest.rows)}
        assert {"cpu", "no_te", "moe", "grouped_mlp", "token_dispatcher", "late_gradients"} <= told, line
