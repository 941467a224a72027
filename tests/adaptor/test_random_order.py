"""Random subsets and orders of rows, real and synthetic: after apply and rollback Megatron is what it was, by identity.

Compared are all entries of the dictionaries of all Megatron modules, of torch.cuda and of the classes in them.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluid_npu.adaptor import PatchError, Registry, status
from fluid_npu.adaptor.patch import Patch
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row
from tests.support.snapshot import State, differences, entries

pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = ("megatron", "torch.cuda", "torch.compiler", "torch._tensor")
EXAMPLES = 15
NIGHTLY_EXAMPLES = 1000


@pytest.fixture(scope="module")
def pool() -> list[Patch]:
    """The rows of every feature that can be used here, and one of every kind over Megatron's own modules."""
    real = [state.patch for state in status()]
    synthetic = [
        patch_row(target, kind, f"{kinds.HERE}:{name}", feature=f"{kind} of a test")
        for target, names in kinds.BY_KIND.items()
        for name, kind in zip(names, ("replace", "wrap"), strict=False)
    ]
    importlib.import_module("megatron.core.inference.contexts.dynamic_context")
    importlib.import_module("megatron.core.models.bert.bert_lm_head")
    return [*real, *synthetic, patch_row(kinds.NEW, "add", f"{kinds.HERE}:instead")]


@pytest.fixture(scope="module")
def start(pool: list[Patch]) -> State:
    """The state after everything was applied once and taken off, so that all modules are loaded."""
    registry = Registry()
    for row in pool:
        apply_some(registry, [row])
    registry.rollback()
    return dict(entries(PLACES))


def apply_some(registry: Registry, rows: list[Patch]) -> None:
    """Applies the rows if they can be; a conflict must change nothing."""
    before = registry.applied
    try:
        registry.apply(rows)
    except PatchError as error:
        assert registry.applied == before, error


def run(pool: list[Patch], start: State, choice: list[int], steps: list[str]) -> None:
    """Applies the chosen rows in as many calls as there are steps, with rollbacks and suspensions between them."""
    registry = Registry()
    rows = [pool[index] for index in choice]
    size = max(1, len(rows) // len(steps))
    for number, step in enumerate(steps):
        before = dict(entries(PLACES)) if step == "back" else {}
        count = len(registry.applied)
        apply_some(registry, rows[number * size : (number + 1) * size])
        if step == "back":
            registry.rollback(count)
            assert not differences(before, PLACES), "a partial rollback restores the state before its call"
        if step == "suspend" and registry.applied:
            registry.suspend()
            assert not differences(start, PLACES)
            registry.resume()
    registry.rollback()
    assert not differences(start, PLACES)


def orders(size: int) -> tuple[Any, Any]:
    """A subset of ``size`` rows in any order; what happens after each call."""
    choice = st.lists(st.integers(0, size - 1), unique=True, max_size=15)
    return choice, st.lists(st.sampled_from(["keep", "back", "suspend"]), min_size=1, max_size=3)


def search(pool: list[Patch], start: State, examples: int) -> None:
    choice, steps = orders(len(pool))

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(choice=choice, steps=steps)
    def example(choice: list[int], steps: list[str]) -> None:
        run(pool, start, choice, steps)

    example()


def test_some_random_orders_leave_megatron_identical(pool: list[Patch], start: State) -> None:
    assert len(pool) > 30 and len(start) > 10_000
    search(pool, start, EXAMPLES)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_thousand_random_orders_leave_megatron_identical(pool: list[Patch], start: State) -> None:
    search(pool, start, NIGHTLY_EXAMPLES)


def test_the_comparison_sees_one_changed_entry(start: State, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("megatron.core.utils")
    assert not differences(start, PLACES)
    monkeypatch.setattr(utils, "divide", kinds.instead)
    assert ("megatron.core.utils", "divide") in differences(start, PLACES)
