"""Hit counters: what was applied and never reached is named; what is counted stays what it was for every reader."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.status import report_text, statuses
from fluid_npu.adaptor.target import resolve
from tests.support import upstream_kinds as kinds
from tests.support.patch_rows import patch_row
from tests.support.stock import train_once

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def registry() -> Any:
    found = Registry()
    yield found
    found.rollback()


def ours(target: str, replacement: str = "instead", kind: str = "replace") -> Patch:
    return patch_row(target, kind, f"{kinds.HERE}:{replacement}")


def hits(registry: Registry) -> list[int | None]:
    """As ``statuses`` gives them, without its search for what holds the originals."""
    counters = [entry.counted.counter for entry in registry.entries]
    return [counter.hits if counter else None for counter in counters]


@pytest.mark.parametrize(
    "target, reach",
    [
        (kinds.FUNCTION, lambda _cls: importlib.import_module("megatron.core.utils").divide(4, 2)),
        (
            kinds.FUNCTION,
            lambda _cls: importlib.import_module("megatron.core.inference.contexts.dynamic_context").core_divide(4, 2),
        ),
        (kinds.METHOD, lambda cls: cls.is_aux_loss_enabled(None)),
        (kinds.INHERITED, lambda cls: cls.set_layer_number(None, 1)),
        (kinds.STATIC, lambda cls: cls._get_layer_offset(None)),
        (kinds.CLASSMETHOD, lambda cls: cls.record_bwd_graph(None)),
        (kinds.PROPERTY, lambda cls: object.__new__(cls).param_groups),
    ],
    ids=["function", "other name", "method", "inherited", "static", "class", "property"],
)
def test_every_call_counts(registry: Registry, target: str, reach: Callable[[Any], Any]) -> None:
    registry.apply([ours(target)])
    assert hits(registry) == [0]
    for _ in range(2):
        assert reach(resolve(target).holder) == "ours"
    assert hits(registry) == [2]


def test_constructions_of_a_class_count_and_it_stays_the_same_class(registry: Registry) -> None:
    before = inspect.signature(kinds.OurNorm)
    init = vars(kinds.OurNorm)["__init__"]
    registry.apply([ours(kinds.RENAMED_CLASS, "OurNorm")])
    norm = resolve(kinds.RENAMED_CLASS).visible(3)
    assert hits(registry) == [1]
    assert norm.size == 3 and type(norm) is kinds.OurNorm and isinstance(norm, kinds.OurNorm)
    assert inspect.signature(kinds.OurNorm) == before
    assert pickle.loads(pickle.dumps(norm)).size == 3
    registry.rollback()
    assert vars(kinds.OurNorm)["__init__"] is init


def test_an_inherited_constructor_counts_and_leaves_no_entry(registry: Registry) -> None:
    registry.apply([ours(kinds.RENAMED_CLASS, "DerivedNorm")])
    assert resolve(kinds.RENAMED_CLASS).visible(4).size == 4
    assert hits(registry) == [1]
    registry.rollback()
    assert "__init__" not in vars(kinds.DerivedNorm)


def test_what_is_counted_has_our_signature_and_is_pickled_by_the_target_s_name(registry: Registry) -> None:
    registry.apply([ours(kinds.FUNCTION, "sum_wrapper"), ours(kinds.METHOD)])
    divide, method = resolve(kinds.FUNCTION).visible, resolve(kinds.METHOD).visible
    assert list(inspect.signature(divide).parameters) == ["numerator", "denominator"]
    assert inspect.unwrap(divide) is kinds.sum_wrapper
    assert pickle.loads(pickle.dumps(divide)) is divide
    assert pickle.loads(pickle.dumps(method)) is method
    name = pickle.dumps(divide)
    registry.rollback()
    assert pickle.loads(name) is resolve(kinds.FUNCTION).own, "without the patch the name means upstream's function"


def test_counting_is_no_reason_for_torch_compile_to_compile_again(registry: Registry) -> None:
    import torch

    registry.apply([ours(kinds.FUNCTION, "around", "wrap")])
    utils = importlib.import_module("megatron.core.utils")
    compilations = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(x: Any) -> Any:
        return x * utils.divide(6, 3)[1]

    for _ in range(4):
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(compilations) == 1
    assert hits(registry) == [1], "once, when it was traced"
    torch._dynamo.reset()


def test_what_cannot_be_counted_says_so(registry: Registry) -> None:
    registry.apply([ours(kinds.CONSTANT, "value"), ours(kinds.NONE, "value")])
    assert hits(registry) == [None, None]
    registry.apply([ours(kinds.FUNCTION)])
    resolve(kinds.FUNCTION).visible(4, 2)
    states = statuses(registry, registry.applied)
    assert [state.hits for state in states] == hits(registry) == [None, None, 1]
    assert "hits not counted" in report_text(states)


def counted_run(reached: list[str]) -> tuple[dict[str, int | None], str]:
    """Hits of a stock training run on a CPU, with a row that nothing reaches."""
    from megatron.core import parallel_state

    from fluid_npu.adaptor import adapt, status

    with adapt(["cpu"]) as adaptation:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
        train_once()
        counts = {state.patch.target: state.hits for state in status(["cpu", "no_te"])}
        report = adaptation.report()
    assert all(target in counts for target in reached)
    return counts, report


REACHED = [
    "torch.cuda.current_device",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.optimizer.clip_grads.torch",
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
    "torch.Tensor.type",
]


def test_after_a_real_run_the_report_names_what_was_never_reached(run_ranks: Callable[..., list[Any]]) -> None:
    for counts, report in run_ranks(2, counted_run, REACHED):
        assert all(counts[target] for target in REACHED), counts
        never = report.partition("Applied and never reached:\n")[2].partition("Not reachable")[0].split()
        assert never == [target for target, count in counts.items() if count == 0]
