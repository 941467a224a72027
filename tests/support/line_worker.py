"""What a line of megatron-core does with our modules on two ranks; ``tests/lines`` runs it with that line on the path.

    python tests/support/line_worker.py CHECKPOINT RESULT [make]

With ``make`` the weights of a stock model are written to CHECKPOINT first, by global name. RESULT is a torch file.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

STEPS = 20
EP2 = {"expert_model_parallel_size": 2}


def make_checkpoint(path: str) -> None:
    """Writes what a stock GPT with SequentialMLP was initialised with by Megatron, gathered over the ranks."""
    import torch
    import torch.distributed as dist

    from fluid_npu.mcore.convert import weights_by_name
    from tests.support.gpt import Run, make_config, make_model

    run = Run(impl="stock")
    model = make_model(run, make_config(run))
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, {name: value.clone() for name, value in weights_by_name(model).items()})
    if dist.get_rank() == 0:
        torch.save({**parts[0], **parts[1]}, path)


def identity() -> dict[str, str]:
    """Which megatron-core this process runs, by each of the three ways to ask."""
    from importlib.metadata import version

    import megatron.core

    return {
        "version": megatron.core.__version__,
        "file": megatron.core.__file__,
        "metadata": version("megatron-core"),
    }


def everything(checkpoint: str, folder: str) -> dict[str, Any]:
    """All checks of a line on this rank."""
    from megatron.core import parallel_state

    from fluid_npu.mcore.lines.moe_layer import MEGATRON_DISPATCHERS
    from tests.support.context import run_stack
    from tests.support.dispatchers import errors_by_kind, in_stock_layer
    from tests.support.doors import all_doors
    from tests.support.gpt import Run, train
    from tests.support.moe import Case, relative

    run = Run(steps=STEPS, checkpoint=checkpoint, one_batch=True)
    kinds = ["alltoall", *MEGATRON_DISPATCHERS]
    found: dict[str, Any] = {"identity": identity()}
    found["stock"] = train(replace(run, impl="stock"))
    found["ours"] = train(run)
    found["first"] = {impl: train(replace(run, impl=impl, steps=1))["grads"] for impl in ("stock", "dw")}
    found["modules"] = modules(run)
    found["dtypes"] = dtypes()
    found["drop_in"] = [relative(ours, stock) for stock, ours in in_stock_layer(Case(ep=2, fuse=False))["pairs"]]
    found["dispatchers"] = errors_by_kind(kinds, 1)
    found["exchange"] = exchange(folder)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, expert_tensor_parallel_size=1, **EP2)
    # alltoall_seq refuses experts that are not split as the dense layers are.
    found["dispatchers_tp2"] = errors_by_kind([kind for kind in kinds if kind != "alltoall_seq"], 2)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**context_cases()[0].sizes)
    found["context"] = [run_stack(case) for case in context_cases()]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**EP2)
    found["doors"] = all_doors(folder)  # last: the launch stays in force
    return found


def context_cases() -> list[Any]:
    """Layers under context parallelism: by Ulysses with carry-over, in chunks of heads, and by a ring."""
    from tests.support.context import Case

    ring = Case(config={"cp_comm_type": "ring"})
    return [Case(carry=True, layers=2, micro_batches=2), Case(chunks=2, key_heads=8, qk_norm=True), ring]


def modules(run: Any) -> dict[str, str]:
    """The classes that the Layer Spec builds on this line."""
    from tests.support.gpt import make_config, make_model

    layer = make_model(run, make_config(run)).decoder.layers[0]
    parts = {"mlp": layer.mlp, "router": layer.mlp.router, "experts": layer.mlp.experts}
    parts.update(dispatcher=layer.mlp.token_dispatcher, layer=layer)
    return {name: type(part).__name__ for name, part in parts.items()}


def dtypes() -> dict[str, float]:
    """Largest relative difference of output and gradients in half precision to those in fp32, of our layer."""
    import torch

    from tests.support.dispatchers import forward_backward
    from tests.support.moe import Case, relative

    config = {"moe_router_dtype": "fp32"}
    full = forward_backward(Case(ep=2, config=config))
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        half = forward_backward(Case(ep=2, dtype=dtype, config=config))
        found[str(dtype)] = max(relative(half[name], full[name]) for name in full)
    return found


def exchange(folder: str) -> dict[str, list[str]]:
    """Megatron's distributed checkpoints from stock experts into ours and back: names whose bits differ."""
    import os

    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from fluid_npu.mcore.convert import weights_by_name
    from tests.support.gpt import Run, fill, make_config, make_model, same_bits

    found = {}
    for source, target in (("stock", "dw"), ("dw", "stock")):
        place = f"{folder}/{source}"
        if dist.get_rank() == 0:
            os.makedirs(place)
        dist.barrier()
        written, read = (make_model(Run(impl=impl), make_config(Run(impl=impl))) for impl in (source, target))
        fill(written, Run())
        dist_checkpointing.save(written.sharded_state_dict(), place)
        read.load_state_dict(dist_checkpointing.load(read.sharded_state_dict(), place))
        found[f"{source} to {target}"] = same_bits(weights_by_name(written), weights_by_name(read))
    return found


def main(checkpoint: str, result: str, *make: str) -> None:
    """Runs the ranks and writes what they found."""
    from tests.support.ranks import run_ranks

    if make:
        run_ranks(2, make_checkpoint, checkpoint, sizes=EP2)
    with tempfile.TemporaryDirectory(prefix="line-") as folder:
        ranks = run_ranks(2, everything, checkpoint, folder, sizes=EP2, timeout=250)
    import torch

    torch.save(ranks, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
