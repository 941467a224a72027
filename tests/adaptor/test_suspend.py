"""``suspend()`` and ``resume()``: another patch system may work below ours, and nothing of ours is lost or left."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from fluid_npu import adaptor
from fluid_npu.adaptor import PatchError, Registry, adapt, resume, suspend
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.status import statuses
from fluid_npu.adaptor.target import resolve
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_local_spec"


def ours(target: str, replacement: str = "instead", kind: str = "replace") -> Patch:
    return patch_row(target, kind, f"{kinds.HERE}:{replacement}")


ROWS = [ours(kinds.FUNCTION), ours(kinds.STATIC), ours(kinds.INHERITED), ours(kinds.FUNCTION, "around", "wrap")]


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Rolled back at the end, so a test may leave its patches."""
    found = Registry()
    yield found
    found.rollback()


def own() -> dict[str, Any]:
    """What is stored at each target now."""
    return {row.target: resolve(row.target).own for row in ROWS}


def test_suspended_patches_are_off_to_the_last_object_and_come_back_in_their_order(registry: Registry) -> None:
    utils, before = importlib.import_module("megatron.core.utils"), own()
    registry.apply(ROWS)
    assert utils.divide(6, 3) == ("around", "ours")
    registry.suspend()
    assert registry.suspended and registry.applied == [] and registry.size == len(ROWS)
    assert all(value is before[target] for target, value in own().items())
    registry.resume()
    assert not registry.suspended and registry.applied == ROWS
    assert utils.divide(6, 3) == ("around", "ours")
    registry.rollback()
    assert all(value is before[target] for target, value in own().items())


def test_what_somebody_put_there_meanwhile_lies_below_and_stays_after_rollback(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = importlib.import_module("megatron.core.utils")
    registry.apply([ours(kinds.FUNCTION, "around", "wrap")])
    registry.suspend()
    theirs = kinds.around(utils.divide)
    monkeypatch.setattr(utils, "divide", theirs)
    registry.resume()
    assert utils.divide(6, 3) == ("around", ("around", 2))
    registry.rollback()
    assert utils.divide is theirs


def test_nothing_can_be_switched_on_or_suspended_again_meanwhile(registry: Registry) -> None:
    registry.apply(ROWS[:1])
    registry.suspend()
    with pytest.raises(PatchError, match=r"patches are suspended: call fluid_npu\.adaptor\.resume\(\) before"):
        registry.apply(ROWS[1:2])
    with pytest.raises(PatchError, match="suspended already"):
        registry.suspend()
    registry.resume()
    assert registry.applied == ROWS[:1]


def test_somebody_on_top_is_named_and_nothing_is_taken_off(registry: Registry) -> None:
    utils = importlib.import_module("megatron.core.utils")
    registry.apply(ROWS[:2])
    mine, utils.divide = utils.divide, kinds.instead
    with pytest.raises(PatchError, match=r"someone else patched on top of .*divide"):
        registry.suspend()
    assert registry.applied == ROWS[:2] and not registry.suspended
    utils.divide = mine


def test_a_target_that_went_meanwhile_keeps_all_suspended_until_it_is_back(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.apply(ROWS[:2])
    registry.suspend()
    before = own()
    with monkeypatch.context() as gone:
        gone.delattr(kinds.FUNCTION)
        with pytest.raises(PatchError, match=r"utils\.divide.*does not exist; was it renamed or removed"):
            registry.resume()
        assert registry.suspended and registry.applied == []
        assert own()[kinds.STATIC] is before[kinds.STATIC], "nothing was put back"
    registry.resume()
    assert registry.applied == ROWS[:2]


def test_a_rollback_meanwhile_forgets_the_newer_rows_alone(registry: Registry) -> None:
    registry.apply(ROWS[:1])
    registry.apply(ROWS[1:3])
    registry.suspend()
    registry.rollback(1)
    registry.resume()
    assert registry.applied == ROWS[:1]


def test_hits_start_anew_and_the_state_says_off_meanwhile(registry: Registry) -> None:
    utils = importlib.import_module("megatron.core.utils")
    registry.apply(ROWS[:1])
    utils.divide(1, 1)
    assert statuses(registry, ROWS[:1])[0].hits == 1
    registry.suspend()
    (state,) = statuses(registry, ROWS[:1])
    assert (state.applied, state.hits, state.problem) == (False, None, None)
    registry.resume()
    assert statuses(registry, ROWS[:1])[0].hits == 0


def test_the_public_pair_takes_off_and_puts_back_what_adapt_switched_on() -> None:
    before = resolve(SPEC).own
    with adapt(["moe"], overlap="off"):
        suspend()
        assert resolve(SPEC).own is before
        assert [state.applied for state in adaptor.status(["moe"])] == [False] * 4
        with pytest.raises(PatchError, match="patches are suspended"):
            adapt(["token_dispatcher"])
        resume()
        assert resolve(SPEC).own is not before
        assert all(state.applied for state in adaptor.status(["moe"]))
    assert resolve(SPEC).own is before


def test_without_patches_both_do_nothing() -> None:
    suspend()
    resume()
    with adapt(["moe"]) as on:
        assert on.features == ["moe"]
