"""What each row of the features ``cpu`` and ``no_te`` prevents, on every line: what fails on a CPU when it is left out.

python tests/support/prevents.py RESULT     tries it on the line that is first on the path; RESULT is a JSON file
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# A CPU build of torch, a CUDA build without a driver, and the latter in a forked process.
NO_CUDA = (
    "AssertionError: Torch not compiled with CUDA enabled|"
    "RuntimeError: (Found no NVIDIA driver|Cannot re-init|CUDA error: CUDA driver version)"
)

# Pinned memory without CUDA: with a CPU build, and with a CUDA build without a driver.
PINNED = f"RuntimeError: .*(pin_memory|pinned|accelerator)|{NO_CUDA}"

# Of every row: the part of stock Megatron that needs it (tests/support/stock.py, stock_extras.py), and what that part
# does on a CPU when the row is left out.
MOE, OPTIMIZER = "megatron.core.transformer.moe", "megatron.core.optimizer"
RANDOM, LAYERS = "megatron.core.tensor_parallel.random", "megatron.core.tensor_parallel.layers"
SAVING = "megatron.core.dist_checkpointing"
# EOFError is when the manager cannot be started.
MANAGER = "AssertionError: processes left behind: .*Manager|EOFError"
# 0.12 forks for a synchronous save, and the process that waits looks into a queue of its own.
FORKED = "RuntimeError: results_queue should not be empty"
WRITE_ITEM = r"RuntimeError: Worker failure: _write_item\(\) missing .* 'serialization_format'"
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
    "megatron.core.models.common.embeddings.rope_utils.torch": ("rotary_table_of_a_rank", PINNED),
    "megatron.core.utils.torch": ("train_once", NO_CUDA),
    f"{SAVING}.exchange_utils.torch": ("buffer_for_a_shard", NO_CUDA),
    f"{SAVING}.strategies.state_dict_saver.torch": ("save_with_known_structure", NO_CUDA),
    f"{LAYERS}.fused_weight_gradient_mlp_cuda": ("train_once", "NameError: name 'fused_weight_gradient"),
    f"{LAYERS}._grad_accum_fusion_available": ("train_once", "RuntimeError: .*custom CUDA extension"),
    f"{SAVING}.strategies.filesystem_async._get_write_results_queue": ("saving_leaves_no_process", MANAGER),
    f"{SAVING}.strategies.filesystem_async.get_write_results_queue": ("saving_leaves_no_process", MANAGER),
    f"{SAVING}.strategies.filesystem_async._write_item": ("saving_leaves_no_process", WRITE_ITEM),
    f"{SAVING}.strategies.base.AsyncSaveShardedStrategy.save": ("saving_leaves_no_process", FORKED),
    "megatron.core.transformer.multi_latent_attention.HAVE_TE": ("latent_attention", "TypeError: "),
}


def parts(package: str | None = None) -> dict[str, str]:
    """Target of each row of the installed line, or of one package's rows, to the part that needs it.

    Raises KeyError for a row of which nothing is known: a row that prevents nothing is dead.
    """
    from fluid_npu.adaptor import select

    rows = select(["cpu", "no_te"])
    return {row.target: PREVENTS[row.target][0] for row in rows if package in (None, row.package)}


def wrong(outcome: dict[str, str]) -> list[str]:
    """What did not go as ``PREVENTS`` says; ``outcome`` as ``stock.without_each`` returns it."""
    found = [] if outcome[""] == "" else [f"with all rows: {outcome['']}"]
    for target, error in outcome.items():
        if target and not re.match(PREVENTS[target][1], error):
            found.append(f"without {target}: {error or 'nothing failed'}")
    return found


def main(result: str) -> None:
    """Runs the parts of Megatron's rows on two ranks and writes what they found; torch's rows serve all lines."""
    from tests.support.ranks import run_ranks
    from tests.support.stock import without_each

    outcomes = run_ranks(2, without_each, parts("megatron-core"), timeout=580)
    Path(result).write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
