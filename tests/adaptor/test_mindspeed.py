"""Ours beside MindSpeed: in either import order ours lie on top, and rollback leaves exactly what MindSpeed left.

MindSpeed is a stand-in that patches as it does (tests/support/mindspeed_standin); Megatron is the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

import fluid_npu.adaptor.moe
from fluid_npu import adaptor
from fluid_npu.adaptor import Adaptation, PatchError, adapt, providers, resume, suspend
from fluid_npu.adaptor.fingerprint import fingerprint_of
from fluid_npu.adaptor.providers.import_hook import after_import
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.moe_layer import FluidMoELayer
from tests.support.mindspeed_case import Case, State, changed, mindspeed_case, state

SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_local_spec"
EXPERTS = "megatron.core.transformer.moe.experts.GroupedMLP"
FEATURES = ["moe", "grouped_mlp"]
GROUPED = "--moe-grouped-gemm"
OVERLAP = "--moe-alltoall-overlap-comm"


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    # Typing gives a class an __init__ when it is first made.
    import_module("megatron.core.models.gpt.gpt_layer_specs").get_gpt_layer_local_spec()
    before, finders = state(), list(sys.meta_path)
    with mindspeed_case(monkeypatch) as found:
        yield found
    assert not changed(before, state()), "the test left something behind"
    assert sys.meta_path == finders


def at(target: str) -> Any:
    """What Megatron's code finds there now."""
    module, _, attribute = target.rpartition(".")
    return getattr(sys.modules[module], attribute)


def check_that_ours_are_on_top(mindspeed: bool) -> None:
    """The modules are ours; a mark in the spec says whether MindSpeed's wrapper was called below."""
    spec = at(SPEC)(num_experts=4, moe_grouped_gemm=True)
    assert spec.submodules.mlp.module is FluidMoELayer
    assert spec.submodules.mlp.submodules.experts.module is FluidGroupedMLP
    assert spec.metainfo.get("mindspeed", False) == mindspeed
    assert at(EXPERTS) is FluidGroupedMLP
    assert [entry.foreign() for entry in adaptor._REGISTRY.entries if entry.foreign()] == []


def mindspeed_first(case: Case) -> tuple[ModuleType, Adaptation]:
    theirs = case.adaptor(GROUPED)
    return theirs, adapt(FEATURES)


def ours_first(case: Case) -> tuple[ModuleType, Adaptation]:
    adaptation = adapt(FEATURES)
    return case.adaptor(GROUPED), adaptation


def known_but_not_patching(case: Case) -> tuple[ModuleType, Adaptation]:
    """Its functions are imported before adapt, its patches come after."""
    assert case.manager.patches_info == {}
    return ours_first(case)


in_each_order = pytest.mark.parametrize("start", [mindspeed_first, ours_first, known_but_not_patching])
Start = Callable[[Case], tuple[ModuleType, Adaptation]]


#: MindSpeed's targets, and the imports of the same name that its sweep reaches.
MINDSPEEDS = {
    "importlib.metadata.version",
    SPEC,
    "fluid_npu.mcore.layer_spec.get_gpt_layer_local_spec",
    EXPERTS,
    "megatron.core.models.backends.GroupedMLP",
    "megatron.core.extensions.transformer_engine_spec_provider.GroupedMLP",
    "megatron.core.transformer.moe.router.TopKRouter.routing",
}


def check_that_only_mindspeeds_is_left(case: Case, before: State) -> None:
    left = {name for name in changed(before, state()) if not name.startswith("megatron") or "version" not in name}
    assert left == MINDSPEEDS
    for target in (EXPERTS, SPEC):
        assert at(target) is case.installed(target), target
    assert at(EXPERTS).__module__ == "mindspeed.features"


def check_that_nobody_hooks(case: Case) -> None:
    """MindSpeed's own functions are back, as the static methods that they were."""
    module = sys.modules["mindspeed.patch_utils"]
    for name in ("apply_patches", "remove_patches"):
        raw = vars(case.manager)[name]
        assert isinstance(raw, staticmethod) and not hasattr(raw.__func__, "__wrapped__")
    for name in ("apply_patch", "remove_patch"):
        assert not hasattr(vars(module.Patch)[name], "__wrapped__")


@in_each_order
def test_ours_lie_on_top_and_rollback_leaves_mindspeeds(case: Case, start: Start) -> None:
    before = state()
    _, adaptation = start(case)
    check_that_ours_are_on_top(mindspeed=True)
    adaptation.rollback()
    check_that_only_mindspeeds_is_left(case, before)
    check_that_nobody_hooks(case)


@in_each_order
def test_a_repatch_in_the_middle_goes_below_ours(case: Case, start: Start) -> None:
    before = state()
    theirs, adaptation = start(case)
    first = case.installed(SPEC)
    theirs.repatch({"moe_grouped_gemm": True})
    assert case.installed(SPEC) is not first, "MindSpeed built a new wrapper"
    check_that_ours_are_on_top(mindspeed=True)
    adaptation.rollback()
    check_that_only_mindspeeds_is_left(case, before)
    theirs.repatch({})
    check_that_only_mindspeeds_is_left(case, before)


@in_each_order
def test_a_remove_in_the_middle_leaves_ours_on_megatrons_own(case: Case, start: Start) -> None:
    before = state()
    _, adaptation = start(case)
    case.manager.remove_patches()
    check_that_ours_are_on_top(mindspeed=False)
    adaptation.rollback()
    assert changed(before, state()) == set()
    check_that_nobody_hooks(case)


@in_each_order
def test_mindspeed_can_be_removed_after_ours(case: Case, start: Start) -> None:
    before = state()
    _, adaptation = start(case)
    adaptation.rollback()
    case.manager.remove_patches()
    assert changed(before, state()) == set()


def test_what_mindspeed_defines_stays_its_own(case: Case) -> None:
    """Or it would register our class as its own when it patches again."""
    _, adaptation = mindspeed_first(case)
    theirs = import_module("mindspeed.features").GmmExperts
    assert theirs is case.installed(EXPERTS) and theirs.__module__ == "mindspeed.features"
    case.manager.register_patch(EXPERTS, theirs, force_patch=True)
    case.manager.apply_patches()
    adaptation.rollback()
    assert at(EXPERTS) is theirs


def test_features_switched_on_before_and_after_it_come_off_in_order(case: Case) -> None:
    before = state()
    experts = adapt(["grouped_mlp"])
    case.adaptor(GROUPED)
    moe = adapt(["moe"])
    check_that_ours_are_on_top(mindspeed=True)
    moe.rollback()
    assert at(EXPERTS) is FluidGroupedMLP and at(SPEC) is case.installed(SPEC)
    sys.modules["mindspeed.megatron_adaptor"].repatch({})
    assert at(EXPERTS) is FluidGroupedMLP
    experts.rollback()
    check_that_only_mindspeeds_is_left(case, before)


def test_whose_grouped_experts_win_is_said_once(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    from fluid_npu.device import choice

    choice._announced.clear()
    theirs, adaptation = ours_first(case)
    theirs.repatch({})
    lines = [line for line in capsys.readouterr().out.splitlines() if "not MindSpeed" in line]
    assert len(lines) == 1
    assert EXPERTS in lines[0] and "mindspeed.features.GmmExperts stays below" in lines[0]
    adaptation.rollback()


def test_two_moe_layers_are_refused_before_anything_changes(case: Case) -> None:
    case.adaptor(OVERLAP)
    before = state()
    with pytest.raises(PatchError, match="feature 'moe' and MindSpeed's patch of .*MoELayer") as caught:
        adapt(["moe"])
    assert "mindspeed.features.OverlapMoELayer" in str(caught.value) and OVERLAP in str(caught.value)
    assert changed(before, state()) == set()
    check_that_nobody_hooks(case)


def test_a_mindspeed_that_comes_later_with_its_moe_layer_is_refused(case: Case) -> None:
    before = state()
    adaptation = adapt(FEATURES)
    with pytest.raises(PatchError, match="feature 'moe' and MindSpeed's patch of .*MoELayer"):
        case.adaptor(OVERLAP)
    check_that_ours_are_on_top(mindspeed=False)
    case.manager.remove_patches()  # it may always remove
    adaptation.rollback()
    assert {name for name in changed(before, state()) if "version" not in name} == set()


def test_one_target_replaced_by_both_without_a_rule_is_a_conflict(case: Case) -> None:
    target = "megatron.core.tensor_parallel.random._set_cuda_rng_state"
    case.manager.register_patch(target, case.adaptor)
    case.manager.apply_patches()
    with pytest.raises(
        PatchError, match=rf"conflict: patch of {target} \(feature 'cpu'.*MindSpeed's patch of {target}"
    ):
        adapt(["cpu"])


def test_a_wrapper_of_theirs_is_not_hidden_by_a_replacement_of_ours(case: Case) -> None:
    def state_wrapper(original: Any) -> Any:
        return original

    case.manager.register_patch("megatron.core.tensor_parallel.random._set_cuda_rng_state", state_wrapper)
    case.manager.apply_patches()
    with pytest.raises(PatchError, match="ours replaces what theirs wraps"):
        adapt(["cpu"])


def test_a_class_that_they_replace_under_another_of_its_names_is_found(case: Case) -> None:
    case.manager.register_patch("megatron.core.models.backends.GroupedMLP", Case)
    case.manager.apply_patches()
    with pytest.raises(
        PatchError, match=r"MindSpeed's patch of megatron.core.models.backends.GroupedMLP .*both replace"
    ):
        adapt(["grouped_mlp"])


def test_a_method_of_a_class_that_ours_replaces_is_said_to_be_passed_over(case: Case) -> None:
    target = "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
    case.manager.register_patch(f"{target}.token_dispatch", lambda *args: None)
    case.manager.apply_patches()
    with adapt(["token_dispatcher"]):
        (meeting,) = providers.met(fluid_npu.adaptor.select(["token_dispatcher"]))
        assert meeting.won and "which holds the target of theirs" in meeting.how


def test_fingerprints_are_of_megatrons_source_below_mindspeed(case: Case) -> None:
    imported = "megatron.core.models.backends.GroupedMLP"  # an import of a class that another file defines
    before = [fingerprint_of(imported, form) for form in ("source", "signature")]
    case.adaptor(GROUPED)
    assert at(imported).__module__ == "mindspeed.features"
    assert [fingerprint_of(imported, form) for form in ("source", "signature")] == before


def test_source_fingerprints_look_through_mindspeed_where_megatron_binds_a_name_by_choice(case: Case) -> None:
    """LNImpl is one of two classes; which one, only the object says, and MindSpeed's lies over it."""
    target = "megatron.core.models.gpt.gpt_layer_specs.LNImpl"
    before = fingerprint_of(target)
    assert before == fingerprint_of("megatron.core.transformer.torch_norm.WrappedTorchNorm")
    case.manager.register_patch(target, Case)
    case.manager.apply_patches()
    assert at(target) is Case
    assert fingerprint_of(target) == before


def test_a_single_patch_applied_past_the_manager_goes_below_ours(case: Case) -> None:
    patch_class = import_module("mindspeed.patch_utils").Patch if case.manager else None
    adaptation = adapt(FEATURES)
    features = import_module("mindspeed.features")
    patch = patch_class(SPEC, features.spec_wrapper, create_dummy=False)
    patch.apply_patch()
    check_that_ours_are_on_top(mindspeed=True)
    patch.remove_patch()
    check_that_ours_are_on_top(mindspeed=False)
    adaptation.rollback()


def test_ours_come_back_when_theirs_fail_half_way(case: Case) -> None:
    adaptation = adapt(FEATURES)
    case.adaptor(GROUPED)
    case.manager.register_patch("megatron.core.no_such_module.function", at)
    with pytest.raises(ModuleNotFoundError):
        case.manager.apply_patches()
    check_that_ours_are_on_top(mindspeed=True)
    adaptation.rollback()
    check_that_nobody_hooks(case)


def test_somebody_on_top_of_ours_is_named_and_nothing_changes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, adaptation = mindspeed_first(case)
    with monkeypatch.context() as third:
        third.setattr(sys.modules[SPEC.rpartition(".")[0]], "get_gpt_layer_local_spec", lambda: None)
        before = state()
        with pytest.raises(PatchError, match=f"someone else patched on top of patch of {SPEC}"):
            theirs.repatch({})
        assert changed(before, state()) == set()
    adaptation.rollback()


def test_ours_can_be_given_up_while_they_are_off(case: Case) -> None:
    before = state()
    _, adaptation = mindspeed_first(case)
    suspend()
    adaptation.rollback()
    check_that_only_mindspeeds_is_left(case, before)
    check_that_nobody_hooks(case)
    resume()  # nothing is left to put back
    check_that_only_mindspeeds_is_left(case, before)


def test_branches_that_cannot_remove_are_hooked_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpeed 2.1.0 has no remove_patches."""
    monkeypatch.delattr(case.manager, "remove_patches")
    _, adaptation = ours_first(case)
    check_that_ours_are_on_top(mindspeed=True)
    adaptation.rollback()


def test_a_wrapper_that_somebody_put_around_ours_stays_and_works(case: Case) -> None:
    adaptation = adapt(FEATURES)
    apply = case.manager.apply_patches
    case.manager.apply_patches = staticmethod(lambda: apply())
    adaptation.rollback()
    case.adaptor(GROUPED)
    assert at(EXPERTS) is case.installed(EXPERTS)


def test_the_import_hook_leaves_no_trace(case: Case) -> None:
    seen: list[ModuleType] = []
    finders = list(sys.meta_path)
    cancel = after_import("mindspeed.patch_utils", seen.append)
    module = import_module("mindspeed.patch_utils")
    assert seen == [module] and sys.meta_path == finders
    assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
    cancel()
    after_import("mindspeed.patch_utils", seen.append)
    assert seen == [module, module] and sys.meta_path == finders
    after_import("mindspeed.features", seen.append)()
    import_module("mindspeed.features")
    assert len(seen) == 2


def test_the_provider_in_charge_is_told(case: Case) -> None:
    assert providers.active().name == "none"
    case.adaptor()
    assert providers.active().name == "mindspeed"
    assert {record.target for record in providers.foreign()} >= {SPEC, "importlib.metadata.version"}
    case.manager.remove_patches()
    assert providers.active().name == "none" and providers.foreign() == []
