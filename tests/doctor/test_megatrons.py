"""Checkouts and wheels on one path: which part of megatron comes from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluid_npu.doctor.megatrons import find_portions, here_item, imported_core, megatron_items


def plant(root: Path, version: str | None = None, training: bool = False) -> str:
    """A folder with a ``megatron`` in it; returns its path."""
    parts = (["core"] if version is not None else []) + (["training"] if training else [])
    for part in parts:
        (root / "megatron" / part).mkdir(parents=True)
        (root / "megatron" / part / "__init__.py").write_text("raise SystemExit('the doctor imports nothing')")
    if version:
        major, minor, patch = version.split(".")
        text = f'MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ""\n'
        (root / "megatron" / "core" / "package_info.py").write_text(text)
    return str(root)


@pytest.fixture
def checkout(tmp_path: Path) -> str:
    return plant(tmp_path / "Megatron-LM", "0.12.1", training=True)


@pytest.fixture
def wheel(tmp_path: Path) -> str:
    return plant(tmp_path / "site-packages", "0.16.1")


def examine(path: list[str], metadata: str | None = "0.16.1", given: tuple[str, ...] = ()):
    items = megatron_items(find_portions(path), metadata, given.__contains__)
    return {item.name: item for item in items}


def test_one_wheel_is_ok(wheel: str) -> None:
    (item,) = examine(["", "/nowhere", wheel, wheel]).values()
    assert item.level == "ok" and item.text == f"0.16.1 from {wheel} (site-packages)"


def test_a_checkout_on_pythonpath_wins_and_the_wheel_is_named(checkout: str, wheel: str) -> None:
    items = examine([checkout, wheel], given=(checkout,))
    assert items["megatron.core"].text == f"0.12.1 from {checkout} (PYTHONPATH)"
    shadowed = items["second megatron"]
    assert shadowed.level == "warn" and f"0.16.1 in {wheel} (site-packages) is shadowed" in shadowed.text
    assert f"take {checkout} off PYTHONPATH" in shadowed.fix


def test_metadata_of_another_version_than_the_imported_one_is_said(checkout: str, wheel: str) -> None:
    item = examine([checkout, wheel])["metadata"]
    assert item.level == "warn" and "say 0.16.1, imported is 0.12.1" in item.text
    assert imported_core(find_portions([checkout, wheel])) == "0.12.1" and imported_core([]) is None


def test_core_and_training_of_two_versions_are_wrong(checkout: str, wheel: str) -> None:
    item = examine([wheel, checkout])["megatron.training"]
    assert item.level == "wrong" and "two versions would be mixed" in item.text
    assert item.fix == f"put {checkout} before {wheel} on PYTHONPATH"


def test_two_of_the_same_version_are_a_note(tmp_path: Path, wheel: str) -> None:
    other = plant(tmp_path / "Megatron-LM", "0.16.1", training=True)
    assert [item.level for item in examine([wheel, other]).values()] == ["ok", "note", "ok"]


def test_no_megatron_is_wrong(tmp_path: Path) -> None:
    (item,) = examine([str(tmp_path)]).values()
    assert item.level == "wrong" and item.fix == "pip install megatron-core"


def test_a_version_that_cannot_be_read_is_said_and_compared_with_nothing(tmp_path: Path) -> None:
    items = examine([plant(tmp_path / "odd", "")])
    assert items["megatron.core"].text.startswith("unknown version") and "metadata" not in items


def test_a_checkout_in_the_current_folder_is_told_apart(checkout: str, wheel: str) -> None:
    (here,) = find_portions([checkout])
    (item,) = here_item(here, find_portions([wheel]))
    assert item.level == "note" and "0.12.1 in the current folder" in item.text
    assert here_item(here, find_portions([checkout, wheel])) == here_item(None, []) == []
