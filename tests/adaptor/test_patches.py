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

# Of every row: the part of stock Megatron that needs it (tests/support/stock.py, stock_extras.py), and what that part
# does on a CPU when the row is left out.
MOE, OPTIMIZER = "megatron.core.transformer.moe", "megatron.core.optimizer"
RANDOM, LAYERS = "megatron.core.tensor_parallel.random", "megatron.core.tensor_parallel.layers"
SAVING = "megatron.core.dist_checkpointing"
PREVENTS = {
    "torch.compiler.set_stance": ("compiles_nothing", "AssertionError: torch.compile has compiled"),
    "torch.cuda.current_device": ("train_once", NO_CUDA),
    "torch.cuda.manual_seed": ("seeds_repeat", "AssertionError: the default generator was not seeded"),
    "torch.cuda.synchronize": ("train_once", NO_CUDA),
    "torch.cuda.Stream": ("train_once", f"RuntimeError: torch.cuda.Stream requires|{NO_CUDA}"),
    "torch.cuda.current_stream": ("train_once", NO_CUDA),
    "torch.Tensor.cuda": ("broadcast_batch", NO_CUDA),
    "torch.Tensor.type": ("train_once", "AssertionError: $"),
    f"{RANDOM}.CudaRNGStatesTracker": ("train_once", NO_CUDA),
    f"{RANDOM}._get_cuda_rng_state": ("train_once", NO_CUDA),
    f"{RANDOM}._set_cuda_rng_state": ("recompute_repeats_the_dropout", "AssertionError: calls pile up in torch"),
    f"{MOE}.token_dispatcher.maybe_move_tensor_to_cpu": ("train_once", "TypeError: all_?to_?all"),
    f"{MOE}.moe_utils.te_general_gemm": ("train_once", "NameError: name 'te_general_gemm'"),
    f"{MOE}.moe_utils.torch": ("log_losses_of_a_stage_without_experts", NO_CUDA),
    f"{OPTIMIZER}.optimizer.torch": ("train_once", NO_CUDA),
    f"{OPTIMIZER}.clip_grads.torch": ("train_once", NO_CUDA),
    f"{OPTIMIZER}.grad_scaler.torch": ("train_once", NO_CUDA),
    "megatron.core.transformer.utils.torch": ("causal_mask", NO_CUDA),
    "megatron.core.pipeline_parallel.schedules.torch": ("train_once", NO_CUDA),
    "megatron.core.tensor_parallel.data.torch": ("broadcast_batch", NO_CUDA),
    "megatron.core.utils.torch": ("train_once", NO_CUDA),
    f"{SAVING}.exchange_utils.torch": ("buffer_for_a_shard", NO_CUDA),
    f"{SAVING}.strategies.state_dict_saver.torch": ("save_with_known_structure", NO_CUDA),
    f"{LAYERS}.fused_weight_gradient_mlp_cuda": ("train_once", "NameError: name 'fused_weight_gradient"),
    f"{LAYERS}._grad_accum_fusion_available": ("train_once", "RuntimeError: .*custom CUDA extension"),
    f"{SAVING}.strategies.filesystem_async._get_write_results_queue": (
        "saving_leaves_no_process",
        "AssertionError: processes left behind: .*Manager|EOFError",  # which is when the manager cannot be started
    ),
    "megatron.core.transformer.multi_latent_attention.HAVE_TE": ("latent_attention", "TypeError: "),
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


def test_every_cpu_row_prevents_what_it_says(run_ranks: Callable[..., list[Any]]) -> None:
    import re

    assert set(PREVENTS) == {row.target for row in select(["cpu", "no_te"])}, "a row that prevents nothing is dead"
    parts = {target: part for target, (part, _error) in PREVENTS.items()}
    for outcome in run_ranks(2, without_each, parts, timeout=280):
        assert outcome.pop("") == "", "with all rows stock Megatron runs"
        for target, error in outcome.items():
            assert re.match(PREVENTS[target][1], error), f"without {target}: {error or 'nothing failed'}"
