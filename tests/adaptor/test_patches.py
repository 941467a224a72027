"""The rows of patches/*.toml: each resolves, says why it is there, and goes away without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.adaptor import FEATURES, adapt, select
from fluid_npu.adaptor.manifest import installed_manifests
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.target import MISSING, resolve
from tests.support.stock import without_each

ROWS = [row for manifest in installed_manifests([]) for row in manifest.rows]
# A CPU build of torch, a CUDA build without a driver, and the latter in a forked process.
NO_CUDA = "AssertionError: Torch not compiled with CUDA enabled|RuntimeError: (Found no NVIDIA driver|Cannot re-init)"

# What stock Megatron does on a CPU when one row is left out.
PREVENTS = {
    "torch.cuda.current_device": NO_CUDA,
    "torch.cuda.synchronize": NO_CUDA,
    "torch.Tensor.type": "AssertionError: $",
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker": NO_CUDA,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": NO_CUDA,
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "TypeError: all_?to_?all",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": "NameError: name 'te_general_gemm'",
    "megatron.core.optimizer.clip_grads.torch": NO_CUDA,
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda": "NameError: name 'fused_weight_gradient",
    "megatron.core.tensor_parallel.layers._grad_accum_fusion_available": "RuntimeError: .*custom CUDA extension",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.target)
def test_row_resolves_and_gives_its_reasons(row: Patch) -> None:
    assert row.feature in FEATURES
    assert row.why.endswith(".") and len(row.why) > 15
    assert row.goes_when and row.goes_when != "as above", "each row is readable on its own"
    assert row.upstream.startswith(("https://", "none: "))
    row.load_replacement()
    if row.kind != "context":
        assert (resolve(row.target).visible is MISSING) == (row.kind == "add")


def targets() -> dict[str, Any]:
    """The raw objects behind the targets, as they are stored."""
    found = {}
    for row in ROWS:
        if row.kind != "context" and row.feature in ("cpu", "no_te"):
            found[row.target] = resolve(row.target).own
    return found


def once_and_back() -> None:
    before = targets()
    with adapt(["cpu"]) as outer:
        during = targets()
        assert all(during[name] is not before[name] for name in before if not name.endswith("_available"))
        with adapt(["cpu"]) as inner:
            assert inner.features == [], "twice is once"
        assert targets() == during, "the inner call has nothing to take back"
        assert outer.features == ["cpu", "no_te"], "without Transformer Engine the repairs come along"
    after = targets()
    assert all(after[name] is before[name] for name in before)


def test_adapting_twice_is_once_and_its_end_restores_every_object(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(1, once_and_back)


def test_the_cpu_rows_prevent_what_they_say(run_ranks: Callable[..., list[Any]]) -> None:
    import re

    assert set(PREVENTS) <= {row.target for row in select(["cpu", "no_te"])}
    for outcome in run_ranks(2, without_each, list(PREVENTS), timeout=200):
        assert outcome.pop("") == "", "with all rows stock Megatron trains"
        for target, error in outcome.items():
            assert re.match(PREVENTS[target], error), f"without {target}: {error or 'nothing failed'}"
