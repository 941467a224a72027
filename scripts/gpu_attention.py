#!/usr/bin/env python3
"""Forward and backward of one FluidSelfAttention over context-parallel ranks: whole, in chunks of heads, their twins.

    python3 scripts/gpu_attention.py OUT_DIR [--nproc 2] [--rows 4096] [--rounds 20] [--device cpu --dtype fp32 --tiny]

Sizes of Mixtral 8x7B (hidden 4096, 32 heads, 8 key heads of 128), ``--rows`` of the sequence on each rank. Variants are
measured in turn, round by round, and printed with their median, the 10th and 90th percentile, and the largest relative
difference of output and input gradient to the whole form. NCCL_P2P_DISABLE=1 stands for a network. Leaves
OUT_DIR/attention.txt. About 40 s on two GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: Name: chunks, overlap, and whether it runs as its serialised twin.
VARIANTS = {
    "overlap off": (1, "off", False),
    "whole": (1, "dw", False),
    "2 chunks": (2, "dw", False),
    "2 chunks, twin": (2, "dw", True),
    "4 chunks": (4, "dw", False),
    "4 chunks, twin": (4, "dw", True),
}


def main() -> int:
    """Starts the ranks; 1 when one failed."""
    import torch.multiprocessing as mp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--tiny", action="store_true", help="hidden 256, 16 heads, for a trial on CPUs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    mp.spawn(_rank, (arguments,), nprocs=arguments.nproc)
    print((arguments.out / "attention.txt").read_text(), end="")
    return 0


def _rank(rank: int, a: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    import fluid_npu
    from fluid_npu.device import get_device

    device = get_device(a.device).value
    device.set_current(rank)
    if a.device == "cpu":
        torch.set_num_threads(1)
        fluid_npu.adapt(["cpu"])
    dist.init_process_group(device.backend, rank=rank, world_size=a.nproc)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(context_parallel_size=a.nproc)
    model_parallel_cuda_manual_seed(1)
    place = device.torch_device(rank)
    made = {name: _attention(a, place, *variant) for name, variant in VARIANTS.items()}
    text = _measure(a, device, place, made)
    if rank == 0:
        (a.out / "attention.txt").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


def _attention(a: argparse.Namespace, place: Any, chunks: int, overlap: str, twin: bool) -> Any:
    import torch
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
    hidden, heads = (256, 16) if a.tiny else (4096, 32)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads // 4,
        num_moe_experts=8,
        context_parallel_size=a.nproc,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    layer = get_fluid_moe_layer_spec(config, overlap=overlap, backend="local", attention_chunks=chunks)
    extra = {"config": config, "layer_number": 1}
    module = build_module(layer.submodules.self_attention, **extra).to(place)
    generator = torch.Generator(device=place).manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    module.is_twin = twin
    return module


def _measure(a: argparse.Namespace, device: Any, place: Any, made: dict[str, Any]) -> str:
    import contextlib

    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    one = next(iter(made.values()))
    rotary = RotaryEmbedding(one.hidden_size_per_attention_head, 1.0)(a.rows * a.nproc)
    generator = torch.Generator(device=place).manual_seed(10 + dist.get_rank())
    shape = (a.rows, 1, one.config.hidden_size)
    x = torch.randn(shape, device=place, dtype=one.config.params_dtype, generator=generator).requires_grad_()
    g = torch.randn(shape, device=place, dtype=x.dtype, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in made}
    results: dict[str, Any] = {}
    for number in range(a.rounds + 2):
        for name, module in made.items():
            x.grad = None
            module.zero_grad()
            device.synchronize()
            dist.barrier()
            start = time.perf_counter()
            with module.backward_scheduler.serialise() if module.is_twin else contextlib.nullcontext():
                out, _ = module(x, None, rotary_pos_emb=rotary)
                out.backward(g)
            device.synchronize()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
            results[name] = (out.detach().double(), x.grad.double())
    lines = [
        f"attention alone, {a.nproc} ranks over {device.backend}, {a.dtype}, {a.rows} rows a rank, hidden {shape[2]}, "
        f"{one.config.num_attention_heads} heads, {one.config.num_query_groups} key heads; {a.rounds} rounds; NCCL_P2P_"
        f"DISABLE={os.environ.get('NCCL_P2P_DISABLE', 'unset')}; torch {torch.__version__}, {_name(device)}"
    ]
    for name, ms in times.items():
        low, mid, high = np.percentile(ms, (10, 50, 90))
        pairs = zip(results[name], results["whole"], strict=True)
        differs = max(float((mine - whole).norm() / whole.norm()) for mine, whole in pairs)
        lines.append(f"{name:16} {mid:9.3f} ms  ({low:.3f} to {high:.3f})  differs from whole by {differs:.1e}")
    return "\n".join(lines) + "\n"


def _name(device: Any) -> str:
    import platform

    import torch

    return str(torch.cuda.get_device_name()) if device.name == "cuda" else f"{platform.machine()} CPU"


if __name__ == "__main__":
    sys.exit(main())
