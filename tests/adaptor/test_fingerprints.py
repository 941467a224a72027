"""A renamed, removed, re-signed or rewritten upstream function is an error that says what to do; comments are free."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.adaptor import PatchError, PatchWarning, adapt, status
from fluid_npu.adaptor.fingerprint import current_fingerprint, fingerprint_of, printed
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.target import resolve
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:megatron")
TARGET = "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu"
ROW = rf"patch of {re.escape(TARGET)} \(feature 'cpu', megatron_core-[\d.]+toml\)"
VERSIONS = r"installed: megatron-core \d+\.\d+\.\d+; the row supports >=[\d.]+,<[\d.]+"


def nothing_was_applied() -> bool:
    return not any(state.applied for state in status())


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """``edit(old, new)``: from here on the source file that defines TARGET is a copy with that change."""
    function = resolve(TARGET).visible
    module = importlib.import_module(function.__module__)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")

    def change(old: str, new: str) -> None:
        assert old in source
        copy = tmp_path / "edited.py"
        copy.write_text(source.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(module, "__file__", str(copy))

    return change


HEAD = "def maybe_move_tensor_to_cpu(\n    tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False\n"


@pytest.mark.parametrize("row", [state.patch for state in status()], ids=lambda row: row.target)
def test_every_row_of_the_installed_versions_has_the_fingerprint_of_what_is_installed(row: Patch) -> None:
    assert current_fingerprint(row) == row.fingerprint, "python scripts/fingerprints.py --check"


@pytest.mark.parametrize(
    "new", [HEAD.replace("as_numpy", "to_numpy"), HEAD.replace("False", "True"), HEAD.replace("tensor:", "x, tensor:")]
)
def test_a_re_signed_function_is_an_error_that_says_what_to_do(edit: Callable[[str, str], None], new: str) -> None:
    edit(HEAD, new)
    with pytest.raises(PatchError) as caught:
        adapt(["cpu"])
    assert re.search(f"{ROW}: the upstream source is not the one.*{VERSIONS}", str(caught.value))
    assert "github.com" in str(caught.value) and "scripts/fingerprints.py --write patches/megatron" in str(caught.value)
    assert nothing_was_applied()


def test_a_function_that_was_re_signed_while_running_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def maybe_move_tensor_to_cpu(tensor: Any, stream: Any) -> Any: ...

    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    monkeypatch.setattr(dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)
    told = (
        rf"{ROW}: .*maybe_move_tensor_to_cpu \(.*\.py:\d+\) stands in its place with the parameters \(tensor, stream\)"
    )
    with pytest.raises(PatchError, match=rf"{told}; the row was written for \(tensor, as_numpy, .*{VERSIONS}"):
        adapt(["cpu"])
    assert nothing_was_applied()


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "removed"])
def test_a_renamed_or_removed_function_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if renamed:
        monkeypatch.setattr(dispatcher, "move_to_cpu", dispatcher.maybe_move_tensor_to_cpu, raising=False)
    monkeypatch.delattr(dispatcher, "maybe_move_tensor_to_cpu")
    what = "the target does not exist; was it renamed or removed upstream"
    with pytest.raises(PatchError, match=rf"{ROW}: {what}\? \({VERSIONS}\) Find its new name in the upstream history"):
        adapt(["cpu"], fingerprints="warn")
    assert nothing_was_applied()
    assert not hasattr(dispatcher, "maybe_move_tensor_to_cpu")


def test_a_module_that_is_gone_is_an_error_of_the_same_kind() -> None:
    row = patch_row("megatron.core.transformer.moe.legacy_a2a_token_dispatcher.preprocess", "replace", "a.b:c")
    registry = Registry()
    with pytest.raises(PatchError, match=r"patch of megatron.*legacy_a2a.*preprocess \(feature 'tests', test\.toml\)"):
        registry.apply([row])


def test_all_problems_are_told_at_once() -> None:
    gone = [f"megatron.core.utils.gone_{number}" for number in range(3)]
    with pytest.raises(PatchError) as caught:
        Registry().apply([patch_row(target, "replace", f"{kinds.HERE}:instead") for target in gone])
    assert all(target in str(caught.value) for target in gone)


def test_under_warn_a_changed_function_warns_and_is_patched(edit: Callable[[str, str], None]) -> None:
    edit(HEAD, HEAD.replace("False", "True"))
    with pytest.warns(PatchWarning, match=ROW), adapt(["cpu"], fingerprints="warn"):
        assert not nothing_was_applied()
    assert nothing_was_applied()


def test_the_policy_may_come_from_the_environment(
    edit: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(HEAD, HEAD.replace("False", "True"))
    monkeypatch.setenv("FLUID_FINGERPRINTS", "warn")
    with pytest.warns(PatchWarning, match=ROW):
        adapt(["cpu"]).rollback()
    with pytest.raises(PatchError, match=ROW):
        adapt(["cpu"], fingerprints="strict")
    monkeypatch.setenv("FLUID_FINGERPRINTS", "lenient")
    with pytest.raises(PatchError, match=r"fingerprints='lenient': allowed are strict, warn"):
        adapt(["cpu"])


def test_status_tells_of_a_changed_function_without_applying_anything(edit: Callable[[str, str], None]) -> None:
    edit(HEAD, HEAD.replace("False", "True"))
    (state,) = [state for state in status(["cpu"]) if state.patch.target == TARGET]
    assert not state.applied and state.problem and re.search(f"{ROW}.*{VERSIONS}", state.problem)


@pytest.mark.parametrize(
    "other, same",
    [
        ("def f(a, b=1):\n    # why\n    return (a +\n            b)", True),
        ('def f(a, b=1):\n    """Said."""\n    return a + b', True),
        ("def f(a, b=2): return a + b", False),
        ("def f(a, *, b=1): return a + b", False),
        ("def f(a: int, b=1): return a + b", False),
        ("@wrapped\ndef f(a, b=1): return a + b", False),
        ("async def f(a, b=1): return a + b", False),
        ("def f(a, b=1): return b + a", False),
    ],
)
def test_layout_does_not_count_and_code_does(other: str, same: bool) -> None:
    first, second = (ast.parse(text).body[0] for text in ("def f(a, b=1): return a + b", other))
    assert (printed(first) == printed(second)) is same


def test_a_device_literal_more_changes_the_fingerprint_of_a_module_under_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = importlib.import_module("megatron.core.optimizer.clip_grads")
    before = fingerprint_of("megatron.core.optimizer.clip_grads.torch")
    text = Path(inspect.getfile(module)).read_text(encoding="utf-8")
    for more, same in (("x = torch.ones(1)", True), ("x = torch.ones(1, device='cuda')", False)):
        copy = tmp_path / f"{same}.py"
        copy.write_text(f"{text}\n{more}\n", encoding="utf-8")
        monkeypatch.setattr(module, "__file__", str(copy))
        assert (fingerprint_of("megatron.core.optimizer.clip_grads.torch") == before) is same


def test_the_same_source_has_the_same_fingerprint_wherever_it_is_re_exported() -> None:
    home = resolve(TARGET).visible.__module__
    assert fingerprint_of(TARGET) == fingerprint_of(f"{home}.maybe_move_tensor_to_cpu")
