"""Versions that are tested, in the range, outside it, and that do not fit each other."""

from __future__ import annotations

import pytest

from fluid_npu.doctor.packages import installed_version, minor_of, package_items

LINES = ["0.12", "0.16", "0.18", "0.19"]
GOOD = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    **dict.fromkeys(("numpy", "tokenizers", "tqdm", "tensorboard", "einops", "psutil"), "1.0"),
}


def items(python: tuple[int, int] = (3, 11), problem: str = "", **changes: str | None):
    versions = {**GOOD, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return {item.name: item for item in package_items(python, versions.get, LINES, problem)}


def test_a_tested_combination_is_ok_throughout() -> None:
    assert {item.level for item in items().values()} == {"ok"}


@pytest.mark.parametrize(
    "name, level, text, case",
    [
        ("Python", "wrong", "3.13: 3.10, 3.11 and 3.12", {"python": (3, 13)}),
        ("torch", "wrong", "not installed", {"torch": None}),
        ("torch", "wrong", "2.14.1 is outside 2.6 to 2.13", {"torch": "2.14.1"}),
        ("torch", "wrong", "2.1.0 is outside", {"torch": "2.1.0"}),
        ("torch", "note", "in the range and not tested; tested are 2.7, 2.11, 2.13", {"torch": "2.9.0"}),
        ("torch", "ok", "tested: 2 x H200", {"torch": "2.11.0"}),
        ("torch", "ok", "tested: every test", {"torch": "2.7.1"}),
        ("torch", "wrong", "cannot be imported: ImportError: libgomp", {"problem": "ImportError: libgomp"}),
        ("megatron-core", "wrong", "not installed", {"megatron_core": None}),
        ("megatron-core", "wrong", "supported lines are 0.12, 0.16, 0.18, 0.19", {"megatron_core": "0.14.0"}),
        ("megatron-core", "note", "Python 3.12 on PyPI", {"megatron_core": "0.18.2"}),
        ("megatron-core", "ok", "0.18.2", {"megatron_core": "0.18.2", "python": (3, 12)}),
        ("torch-npu", "ok", "built for this torch", {"torch": "2.7.1", "torch_npu": "2.7.1.post2"}),
        ("torch-npu", "wrong", "is built for torch 2.7.1; torch is 2.13.0+cpu", {"torch_npu": "2.7.1"}),
        ("triton", "wrong", "imports it on every device", {"megatron_core": "0.19.2"}),
        ("triton", "wrong", "imports it on every device", {"megatron_core": "0.18.2"}),
        ("others", "wrong", "missing: einops", {"einops": None}),
    ],
)
def test_what_does_not_fit_is_named(name: str, level: str, text: str, case) -> None:
    item = items(**case)[name]
    assert item.level == level and text in item.text and bool(item.fix) == (level == "wrong")


def test_triton_is_not_asked_for_where_nobody_imports_it() -> None:
    assert "triton" not in items() and "triton" not in items(megatron_core="0.19.2", triton="3.5.0")
    assert "triton" not in items(megatron_core="0.18.2", pytorch_triton="3.5.0")


def test_versions_are_read_of_what_is_installed() -> None:
    assert minor_of(installed_version("torch") or "") >= (2, 6)
    assert installed_version("no-such-distribution") is None
