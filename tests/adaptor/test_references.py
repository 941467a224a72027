"""Every way to hold a Megatron function or class: patched with it and restored, or reported as not reachable."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.status import statuses
from fluid_npu.adaptor.target import resolve
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def ours(target: str, replacement: str = "instead", kind: str = "replace") -> Patch:
    return patch_row(target, kind, f"{kinds.HERE}:{replacement}")


@contextmanager
def applied(*rows: Patch) -> Iterator[Registry]:
    registry = Registry()
    registry.apply(rows)
    try:
        yield registry
    finally:
        registry.rollback()


def unreachable(registry: Registry) -> str:
    (state,) = statuses(registry, registry.applied)
    return "\n".join(state.unreachable)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty module of a user's program."""
    module = ModuleType("user_program")
    monkeypatch.setitem(sys.modules, "user_program", module)
    return module


def test_a_function_imported_elsewhere_under_another_name_follows_and_comes_back() -> None:
    contexts = importlib.import_module("megatron.core.inference.contexts.dynamic_context")
    utils = importlib.import_module("megatron.core.utils")
    before = utils.divide
    assert contexts.core_divide is before
    with applied(ours(kinds.FUNCTION)):
        assert contexts.core_divide is utils.divide is not before
        assert contexts.core_divide(6, 3) == "ours"
    assert contexts.core_divide is utils.divide is before


def test_a_class_imported_elsewhere_under_another_name_follows_and_comes_back() -> None:
    head = importlib.import_module("megatron.core.models.bert.bert_lm_head")
    before = head.LNImpl
    with applied(ours(kinds.RENAMED_CLASS, "OurNorm")):
        assert head.LNImpl is kinds.OurNorm
    assert head.LNImpl is before is resolve(kinds.RENAMED_CLASS).own


@pytest.mark.parametrize(
    "target, call",
    [
        (kinds.STATIC, lambda cls: (cls._get_layer_offset(1), object.__new__(cls)._get_layer_offset(1))),
        (kinds.CLASSMETHOD, lambda cls: (cls.record_bwd_graph(1), cls().record_bwd_graph(1))),
        (kinds.METHOD, lambda cls: (cls.is_aux_loss_enabled(None), cls.is_aux_loss_enabled(object()))),
    ],
    ids=["staticmethod", "classmethod", "method"],
)
def test_a_method_stays_the_kind_that_it_is(target: str, call: Any) -> None:
    slot = resolve(target)
    before = slot.own
    with applied(ours(target)):
        assert type(slot.own) is type(before)
        assert call(slot.holder) == ("ours", "ours")
    assert slot.own is before


def test_wrapping_a_static_method_and_a_class_method_hands_over_the_function_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slot = resolve(kinds.CLASSMETHOD)
    monkeypatch.setattr(slot.holder, "cudagraph_record", [])
    with applied(ours(kinds.CLASSMETHOD, "around", "wrap")):
        assert slot.holder.record_bwd_graph("runner") == ("around", None)
    assert slot.holder.cudagraph_record == [("runner", "bwd")], "upstream's own ran, on the right class"


def test_a_property_gets_our_getter_and_keeps_the_rest() -> None:
    slot = resolve(kinds.PROPERTY)
    before, chained = slot.own, object.__new__(slot.holder)
    with applied(ours(kinds.PROPERTY)):
        assert chained.param_groups == "ours"
        assert (slot.own.fset, slot.own.fdel) == (before.fset, before.fdel)
    assert slot.own is before


def test_an_inherited_method_is_patched_on_the_subclass_alone() -> None:
    slot = resolve(kinds.INHERITED)
    base = slot.holder.__mro__[1]
    inherited = vars(base)["set_layer_number"]
    assert "set_layer_number" not in vars(slot.holder)
    with applied(ours(kinds.INHERITED)):
        assert slot.holder.set_layer_number(None, 1) == "ours"
        assert vars(base)["set_layer_number"] is inherited
    assert "set_layer_number" not in vars(slot.holder)


def test_a_subclass_defined_before_inherits_the_patch_and_one_with_its_own_is_reported() -> None:
    router = resolve(kinds.METHOD).holder
    inheriting = type("Inheriting", (router,), {"__module__": "user_program"})
    overriding = type("Overriding", (router,), {"__module__": "user_program", "is_aux_loss_enabled": lambda self: 1})
    with applied(ours(kinds.METHOD)) as registry:
        assert inheriting.is_aux_loss_enabled(None) == "ours"
        assert overriding.is_aux_loss_enabled(None) == 1
        assert "subclass user_program.Overriding has its own; reached through super() alone" in unreachable(registry)
        assert "Inheriting" not in unreachable(registry)


def test_a_subclass_of_a_replaced_class_is_reported() -> None:
    with applied(ours(kinds.CLASS, "OurRouter")) as registry:
        assert "subclass megatron.core.transformer.moe.router.TopKRouter" in unreachable(registry)


def test_captures_that_cannot_be_re_bound_are_reported(user: ModuleType) -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec

    divide = resolve(kinds.FUNCTION).own

    def with_default(numerator: int, division: Any = divide) -> Any:
        return division(numerator, 1)

    def closing() -> Any:
        return divide(2, 1)

    with_default.__module__ = closing.__module__ = "user_program"
    user.partial = functools.partial(divide, 6)  # type: ignore[attr-defined]
    user.registry = {"divide": divide}  # type: ignore[attr-defined]
    user.Holder = type("Holder", (), {"__module__": "user_program", "how": divide})  # type: ignore[attr-defined]
    user.spec = ModuleSpec(module=divide)  # type: ignore[attr-defined]
    with applied(ours(kinds.FUNCTION)) as registry:
        told = unreachable(registry)
    path = "user_program.test_captures_that_cannot_be_re_bound_are_reported.<locals>"
    assert "a functools.partial" in told
    assert "a dict, user_program.registry" in told
    assert "class attribute user_program.Holder.how" in told
    assert "attribute module of an instance of megatron.core.transformer.spec_utils.ModuleSpec" in told
    assert "default argument of " in told and path.split(".")[1] in told
    assert "closure of " in told
    assert with_default(3) == 3 and closing() == 2


def test_a_name_bound_while_the_patch_is_in_force_gets_the_original_back(user: ModuleType) -> None:
    utils, before = importlib.import_module("megatron.core.utils"), resolve(kinds.FUNCTION).own
    norms, norm = importlib.import_module("megatron.core.transformer.torch_norm"), resolve(kinds.RENAMED_CLASS).own
    with applied(ours(kinds.FUNCTION), ours(kinds.FUNCTION, "around", "wrap"), ours(kinds.RENAMED_CLASS, "OurNorm")):
        user.split = utils.divide  # type: ignore[attr-defined]
        user.WrappedTorchNorm = norms.WrappedTorchNorm  # type: ignore[attr-defined]
        user.own_choice = kinds.OurNorm  # type: ignore[attr-defined]
    assert user.split is before
    assert user.WrappedTorchNorm is norm
    assert user.own_choice is kinds.OurNorm, "a name that the user gave to our class is the user's"


def test_nothing_unrelated_is_touched(user: ModuleType) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    lazy = Lazy("lazy_program")
    sys.modules["lazy_program"] = lazy
    user._ASYNC_IO_LOOP, user._grad_accum_fusion_available = None, False  # type: ignore[attr-defined]
    try:
        with applied(ours(kinds.NONE), ours(kinds.CONSTANT, "value"), ours(kinds.FUNCTION)):
            assert vars(user)["_ASYNC_IO_LOOP"] is None
            assert vars(user)["_grad_accum_fusion_available"] is False
    finally:
        del sys.modules["lazy_program"]


def test_modules_of_ours_keep_what_they_import_from_upstream() -> None:
    spec = importlib.import_module("fluid_npu.mcore.layer_spec")
    name, place = "get_gpt_layer_local_spec", "megatron.core.models.gpt.gpt_layer_specs"
    before = vars(spec)[name]
    with applied(ours(f"{place}.{name}", "around", "wrap")):
        assert vars(spec)[name] is before


def test_rollback_refuses_when_another_name_was_patched_on_top() -> None:
    contexts = importlib.import_module("megatron.core.inference.contexts.dynamic_context")
    registry = Registry()
    registry.apply([ours(kinds.FUNCTION)])
    mine = contexts.core_divide
    contexts.core_divide = test_nothing_unrelated_is_touched
    where = r"megatron\.core\.inference\.contexts\.dynamic_context\.core_divide: there is now .*test_nothing_unrelated"
    with pytest.raises(PatchError, match=f"someone else patched on top of {where}"):
        registry.rollback()
    assert registry.applied
    contexts.core_divide = mine
    registry.rollback()


def test_a_replacement_of_another_kind_of_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "static", staticmethod(kinds.instead), raising=False)
    registry = Registry()
    with pytest.raises(PatchError, match=r"is_aux_loss_enabled.*upstream's is a function, the replacement .* a static"):
        registry.apply([ours(kinds.METHOD, "static")])
    assert inspect.isfunction(resolve(kinds.METHOD).own)
