"""W1 to W16: what MindSpeed's patch system gets wrong, on real Megatron modules, and what ours does instead.

MindSpeed's part was read in its source (mindspeed/patch_utils.py and what calls it, master 028de58c) and is told in
each docstring; the test shows ours.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from fluid_npu.adaptor import FEATURES, PatchError, Registry, adapt, select, status
from fluid_npu.adaptor.features import expand
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.status import statuses
from fluid_npu.adaptor.target import MISSING, resolve
from fluid_npu.adaptor.versions import installed_version
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GONE = "megatron.core.transformer.moe.experts.GroupedExpertsOfLater"


def ours(target: str, replacement: str = "instead", kind: str = "replace", feature: str = "tests") -> Patch:
    return patch_row(target, kind, f"{kinds.HERE}:{replacement}", feature)


@pytest.fixture
def registry() -> Iterator[Registry]:
    """Rolled back at the end, so a test may leave its patches."""
    found = Registry()
    yield found
    found.rollback()


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a user's program."""
    module = ModuleType("user_program")
    monkeypatch.setitem(sys.modules, "user_program", module)
    return module


def test_w01_a_missing_target_is_an_error_and_nothing_is_created(registry: Registry) -> None:
    """MindSpeed sets the missing attribute to None and patches that: a renamed target passes in silence."""
    experts = importlib.import_module("megatron.core.transformer.moe.experts")
    with pytest.raises(PatchError, match=r"GroupedExpertsOfLater.*does not exist; was it renamed or removed upstream"):
        registry.apply([ours(GONE)])
    assert not hasattr(experts, "GroupedExpertsOfLater")


def test_w02_a_bystander_of_the_same_name_that_is_none_stays_none(registry: Registry, user: ModuleType) -> None:
    """MindSpeed then overwrites every module's attribute of that name whose value is None."""
    user._ASYNC_IO_LOOP = user.GroupedExpertsOfLater = None  # type: ignore[attr-defined]
    registry.apply([ours(kinds.NONE)])
    with pytest.raises(PatchError):
        registry.apply([ours(GONE)])
    assert user._ASYNC_IO_LOOP is None and user.GroupedExpertsOfLater is None


def test_w03_every_other_name_follows_and_what_cannot_is_reported(registry: Registry, user: ModuleType) -> None:
    """MindSpeed misses ``import f as g``, partials, default arguments and dicts, and says nothing."""
    contexts = importlib.import_module("megatron.core.inference.contexts.dynamic_context")
    divide = resolve(kinds.FUNCTION).own
    user.half = functools.partial(divide, 2)  # type: ignore[attr-defined]
    user.table = {"divide": divide}  # type: ignore[attr-defined]
    registry.apply([ours(kinds.FUNCTION)])
    assert contexts.core_divide(4, 2) == "ours"
    (state,) = statuses(registry, registry.applied)
    assert {"a functools.partial", "a dict, user_program.table"} <= set(state.unreachable)


def test_w04_no_lazy_module_is_asked_for_anything(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpeed calls hasattr on every loaded module, which runs lazy imports; torch.classes needed an exception."""

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name!r}")

    monkeypatch.setitem(sys.modules, "lazy_program", Lazy("lazy_program"))
    registry.apply([ours(kinds.FUNCTION), ours(kinds.RENAMED_CLASS, "OurNorm")])
    registry.rollback()


def test_w05_a_static_method_stays_one_during_and_after(registry: Registry) -> None:
    """MindSpeed stores a plain function; called on an instance it fails, after removal too."""
    slot = resolve(kinds.STATIC)
    before, layer = slot.own, object.__new__(slot.holder)
    registry.apply([ours(kinds.STATIC)])
    assert layer._get_layer_offset(None) == slot.holder._get_layer_offset(None) == "ours"
    registry.rollback()
    assert slot.own is before and isinstance(before, staticmethod)


def test_w06_rollback_is_the_inverse_of_apply(registry: Registry, user: ModuleType) -> None:
    """MindSpeed leaves created attributes, own entries of inherited methods and names in modules called *mindspeed*."""
    inherited, new = resolve(kinds.INHERITED), resolve(kinds.NEW)
    assert inherited.own is MISSING and new.visible is MISSING
    user.__name__ = "mindspeed_fake"
    user.divide = divide = resolve(kinds.FUNCTION).own  # type: ignore[attr-defined]
    registry.apply([ours(kinds.INHERITED), ours(kinds.NEW, kind="add"), ours(kinds.FUNCTION)])
    assert user.divide(1, 1) == "ours"
    registry.rollback()
    assert inherited.own is MISSING and new.visible is MISSING
    assert user.divide is divide is resolve(kinds.FUNCTION).own


def test_w07_a_foreign_wrapper_is_kept_under_ours_and_never_dropped(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindSpeed rebuilds from the original it stored and so drops what others have put there."""
    utils = importlib.import_module("megatron.core.utils")
    third = kinds.around(utils.divide)
    monkeypatch.setattr(utils, "divide", third)
    registry.apply([ours(kinds.FUNCTION, "around", "wrap")])
    assert utils.divide(6, 3) == ("around", ("around", 2))
    on_top = kinds.around(utils.divide)
    mine, utils.divide = utils.divide, on_top
    with pytest.raises(PatchError, match=r"someone else patched on top of .*divide"):
        registry.rollback()
    assert utils.divide is on_top
    utils.divide = mine
    registry.rollback()
    assert utils.divide is third


def test_w08_the_kind_is_what_the_row_says_whatever_the_name(registry: Registry) -> None:
    """To MindSpeed a function is a wrapper when its name ends in 'wrapper' or 'decorator', else a replacement."""
    utils = importlib.import_module("megatron.core.utils")
    registry.apply([ours(kinds.FUNCTION, "decorate", "wrap")])
    assert utils.divide(6, 3) == ("around", 2)
    registry.rollback()
    registry.apply([ours(kinds.FUNCTION, "sum_wrapper")])
    assert utils.divide(6, 3) == "ours: 6 and 3"


def test_w09_versions_are_checked_and_nobody_s_lie_is_believed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindSpeed checks no version, and replaces importlib.metadata.version so that it says what Megatron likes."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.12.1")
    assert installed_version("megatron-core") == importlib.import_module("megatron.core").__version__
    row = patch_row(
        kinds.FUNCTION, "replace", f"{kinds.HERE}:instead", package="megatron-core", versions=">=0.12,<0.13"
    )
    with pytest.raises(
        PatchError, match=r"divide.*installed: megatron-core 0\.\d+\.\d; the row supports >=0\.12,<0\.13"
    ):
        registry.apply([row])
    before = resolve("torch.cuda.get_device_capability").own
    with adapt(["cpu"]):
        assert resolve("torch.cuda.get_device_capability").own is before, "no capability is invented"


def test_w10_a_conflict_names_target_and_both_owners(registry: Registry) -> None:
    """MindSpeed keeps one global table and says 'the patch of forward exist !': neither class nor owners."""
    forward = "megatron.core.transformer.dot_product_attention.DotProductAttention.forward"
    registry.apply([ours(forward, feature="batch_invariant")])
    both = (
        r"conflict: .*DotProductAttention\.forward \(feature 'flash'.*DotProductAttention\.forward \(feature 'batch_in"
    )
    with pytest.raises(PatchError, match=both):
        registry.apply([ours(forward, feature="flash")])
    other = Registry()
    with pytest.raises(PatchError, match=r"both replace the same target"):
        other.apply([ours(forward, feature="a"), ours(forward, feature="b")])


def test_w11_the_order_of_rows_does_not_decide_what_comes_out(registry: Registry) -> None:
    """In MindSpeed the place in a list decides which wrapper lies outside, and a replacement may drop wrappers."""
    utils = importlib.import_module("megatron.core.utils")
    rows = [ours(kinds.FUNCTION, "around", "wrap"), ours(kinds.FUNCTION)]
    for order in (rows, rows[::-1]):
        registry.apply(order)
        assert utils.divide(6, 3) == ("around", "ours")
        registry.rollback()
    registry.apply(rows[:1])
    with pytest.raises(PatchError, match=r"would drop .*which wraps the same target; switch 'tests' on before 'tests'"):
        registry.apply(rows[1:])


def test_w11_features_are_applied_in_one_order_however_they_are_written() -> None:
    """See above: ours is the order of FEATURES."""
    assert expand(["no_te", "cpu"]) == expand(["cpu", "no_te"]) == expand(["cpu"])
    assert select(["no_te", "cpu"]) == select(["cpu", "no_te"])


def test_w12_no_code_of_ours_sets_an_attribute_of_megatron_past_the_registry() -> None:
    """Some features of MindSpeed assign to Megatron's classes themselves; such changes cannot be removed."""
    import ast
    from pathlib import Path

    import fluid_npu

    found = []
    for path in Path(fluid_npu.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        upstream = {alias for node in ast.walk(tree) for alias in _names_from_upstream(node)}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                root: ast.expr = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in upstream:
                    found.append(f"{path.name}:{node.lineno} {ast.unparse(target)}")
    assert not found


def _names_from_upstream(node: Any) -> Iterator[str]:
    import ast

    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "megatron"):
        yield from (alias.asname or alias.name for alias in node.names)
    if isinstance(node, ast.Import):
        yield from (
            alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.startswith("megatron")
        )


def test_w13_neither_import_order_nor_the_command_line_changes_what_is_patched() -> None:
    """MindSpeed parses sys.argv while it is imported and must be imported before Megatron."""
    code = (
        "import fluid_npu\n"
        "with fluid_npu.adapt(['cpu']) as on:\n"
        "    import megatron.core.transformer.cuda_graphs as user, megatron.core.tensor_parallel.random as home\n"
        "    told = (on.features, user.CudaRNGStatesTracker is home.CudaRNGStatesTracker, home.CudaRNGStatesTracker)"
    )
    words = [sys.executable, "-W", "ignore", "-c", f"{code}\nprint(told)", "--moe-grouped-gemm", "--nonsense", "7"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    importlib.import_module("megatron.core.transformer.cuda_graphs")
    after: dict[str, Any] = {}
    exec(code, after)
    assert done.stdout.strip() == str(after["told"])
    assert "True, <class 'fluid_npu.adaptor.cpu.rng.HostRNGStatesTracker'>" in done.stdout


def test_w14_a_dummy_module_does_not_pass_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpeed plants empty modules, so that ``import transformer_engine`` works and probes lie."""
    dummy = ModuleType("transformer_engine")
    dummy.__file__ = "mindspeed.dummy_module.py"
    dummy.__spec__ = importlib.util.spec_from_loader("transformer_engine", loader=None)
    monkeypatch.setitem(sys.modules, "transformer_engine", dummy)
    assert expand(["cpu"]) == ["cpu", "no_te"], "the repairs are needed as before"
    planted = set(sys.modules)
    with adapt(["cpu"]):
        assert not {name for name in set(sys.modules) - planted if getattr(sys.modules[name], "__file__", "") == ""}


def test_w15_whether_a_feature_applies_is_a_bool_and_a_bad_setting_raises() -> None:
    """A misplaced bracket makes one gate of MindSpeed a tuple, always true; some validations only print."""
    from fluid_npu.adaptor.versions import importable

    for feature in FEATURES.values():
        gates = [importable(name) for name in (*feature.needs, *filter(None, [feature.unless]))]
        assert all(type(gate) is bool for gate in gates)
    with pytest.raises(PatchError, match=r"overlap='sideways'\): allowed are off, dw, full"):
        adapt(["cpu"], overlap="sideways")
    with pytest.raises(PatchError, match=r"adapt\(overlapp='dw'\): unknown setting; allowed: overlap, carry_over"):
        adapt(["cpu"], overlapp="dw")
    assert not any(state.applied for state in status())


def test_w16_a_test_needs_no_code_to_take_patches_back() -> None:
    """MindSpeed's own tests restore ``orig_func`` by hand and pop the global table."""
    rows = select(["cpu", "no_te"])
    before = {row.target: resolve(row.target).own for row in rows}
    with pytest.raises(ZeroDivisionError), adapt(["cpu"]):
        raise ZeroDivisionError
    assert all(resolve(target).own is value for target, value in before.items())
