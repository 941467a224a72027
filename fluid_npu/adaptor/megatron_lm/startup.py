"""Between parsing and building the model: device, checks, and the features that the flags ask for.

    parse_args          the parser has our flags (flags.py)
    initialize_megatron up to 0.16 it asks for CUDA before it parses, so the device is entered first
    validate_args       our checks, Megatron's own with --moe-grouped-gemm hidden, then the features

Nothing here reads sys.argv; what is parsed is what Megatron parsed.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from fluid_npu.adaptor import FEATURES, adapt
from fluid_npu.adaptor.dtypes import launch_line
from fluid_npu.adaptor.megatron_lm import checks, devices
from fluid_npu.adaptor.versions import installed_version
from fluid_npu.device import Choice
from fluid_npu.probes import installed


def initialised(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``initialize_megatron`` of the lines that assert CUDA before they parse."""

    @wraps(original)
    def initialize_megatron(
        extra_args_provider: Any = None,
        args_defaults: Any = None,
        ignore_unknown_args: bool = False,
        *args: Any,
        parsed_args: Namespace | None = None,
        **kwargs: Any,
    ) -> Any:
        from megatron.training import arguments

        if parsed_args is None:
            parsed_args = arguments.parse_args(extra_args_provider, ignore_unknown_args)
        devices.enter(parsed_args)
        defaults = {} if args_defaults is None else args_defaults
        return original(extra_args_provider, defaults, ignore_unknown_args, *args, parsed_args=parsed_args, **kwargs)

    return initialize_megatron


def validated(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``validate_args``: our checks before it, our features after it."""

    @wraps(original)
    def validate_args(args: Namespace, defaults: Any = None) -> Any:
        line = megatron_line()
        checks.check(args, line)
        device = devices.enter(args).value
        with _hidden(args):
            result = original(args, {} if defaults is None else defaults)
        switch_on(args, device)
        return result

    return validate_args


@contextmanager
def _hidden(args: Namespace) -> Iterator[None]:
    """``--moe-grouped-gemm`` out of sight: all that Megatron's validation does with it is to refuse other dtypes and
    devices than stock's kernels have; ours are checked by ``checks`` and the operator table."""
    asked, args.moe_grouped_gemm = args.moe_grouped_gemm, False
    try:
        yield
    finally:
        args.moe_grouped_gemm = asked


def switch_on(args: Namespace, device: str) -> None:
    """The features that validated arguments ask for, and the lines that say so."""
    if not args.moe_grouped_gemm:
        if args.num_experts is not None:
            Choice("stock", "no --moe-grouped-gemm; add it for grouped experts and overlap").announce("MoE layers")
        return
    overlap = choose_overlap(args, device).announce("overlap")
    if getattr(args, "overlap_grad_reduce", False):
        choose_reduction(args, overlap.value).announce("last reduction of gradients")
    adapt(
        wanted(args),
        fingerprints=args.fluid_fingerprints,
        overlap=overlap.value,
        carry_over=args.fluid_carry_over,
        gemm_fusion=args.gemm_gradient_accumulation_fusion,
        dispatch=args.fluid_dispatch,
        chunks=args.fluid_moe_chunks,
        chunks_of=args.fluid_moe_chunks_of,
        local_first=args.fluid_local_first,
        attention_chunks=args.fluid_attention_chunks,
        interleave_batches=args.fluid_interleave_batches,
        payload_dtype=args.fluid_a2a_payload_dtype,
        cuda_graph={"on": True, "off": False}.get(args.fluid_moe_cuda_graph, args.fluid_moe_cuda_graph),
        a2a_transport=args.fluid_a2a_transport,
        a2a_node_size=args.fluid_a2a_node_size,
        a2a_ctas=args.fluid_a2a_ctas,
        a2a_bytes=exchanged_bytes(args),
        device=device,
    )
    if os.environ.get("RANK", "0") == "0":
        te = args.transformer_impl == "transformer_engine" and installed("transformer_engine").value
        print(
            launch_line(str(installed_version("megatron-core")), dtype_of(args), device, transformer_engine=te),
            flush=True,
        )


def exchanged_bytes(args: Namespace) -> int:
    """What a rank sends to others in a balanced dispatch; 0 where the sizes are not known yet."""
    sizes = [getattr(args, name, None) for name in ("micro_batch_size", "seq_length", "moe_router_topk", "hidden_size")]
    if None in sizes:
        return 0
    experts, shards = args.expert_model_parallel_size, args.tensor_model_parallel_size
    rows = math.prod(sizes) // (shards * getattr(args, "context_parallel_size", 1))  # type: ignore[arg-type]
    return rows * (2 if dtype_of(args) != "fp32" else 4) * (experts - 1) // experts


def wanted(args: Namespace) -> list[str]:
    """The features of a launch with grouped experts on the installed line."""
    names = ["moe"]
    if megatron_line() in ("0.12", "0.16"):
        names.append("grouped_mlp")
    if args.fluid_carry_over:
        names.append("late_gradients")
    return [name for name in names if name in FEATURES]


def choose_overlap(args: Namespace, device: str) -> Choice[str]:
    """'full', 'dw' or 'off' with the reason; a function of the flags and of the launch alone, so equal on all ranks."""
    if args.fluid_overlap != "auto":
        return Choice(args.fluid_overlap, "as asked")
    if args.expert_model_parallel_size == 1:
        return Choice("off", "with --expert-model-parallel-size 1 there is no AllToAll")
    if args.moe_token_dispatcher_type != "alltoall":
        return Choice("off", f"the {args.moe_token_dispatcher_type} dispatcher overlaps nothing; alltoall does")
    if device == "cpu" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == int(os.environ.get("WORLD_SIZE", "1")):
        return Choice("off", "on one machine's loopback the copy itself is CPU work, so nothing can hide")
    return Choice("dw", f"the {device} computes weight gradients while the AllToAll flies")


def choose_reduction(args: Namespace, overlap: str) -> Choice[str]:
    """What runs beside the last reduction of a step with ``--overlap-grad-reduce``, and why; equal on all ranks.

    What ``mcore.reduction`` will find in Megatron's DDP, from the flags: 'FC2 of the lowest layer' or 'nothing'.
    """
    shards = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    copies = args.world_size // (args.pipeline_model_parallel_size * args.expert_model_parallel_size * shards)
    obstacles = (
        (overlap == "off", "with overlap off no weight gradient is kept"),
        (not args.fluid_carry_over, "weight gradients are kept with --fluid-carry-over alone; add it"),
        (args.fluid_interleave_batches, "--fluid-interleave-batches keeps no weight gradient"),
        (
            any(getattr(args, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2")),
            "FSDP takes no late gradients; Megatron's DDP does",
        ),
        (
            args.pipeline_model_parallel_size > 1,
            f"with --pipeline-model-parallel-size {args.pipeline_model_parallel_size} the stage below waits for the "
            "end of the backward",
        ),
        (copies > 1, f"{copies} ranks hold the same experts, and the reduction of FC2 would come last"),
    )
    for there, reason in obstacles:
        if there:
            return Choice("nothing", reason)
    return Choice("FC2 of the lowest layer", "no other rank holds the same experts, so nothing is reduced of it")


def dtype_of(args: Namespace) -> str:
    """'bf16', 'fp16' or 'fp32'."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def megatron_line() -> str:
    """'0.16' for 0.16.1, of the Megatron that an import gives."""
    return ".".join(str(installed_version("megatron-core")).split(".")[:2])
