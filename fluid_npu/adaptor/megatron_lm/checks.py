"""Contradictions among the flags, refused with the fix before Megatron's own validation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from fluid_npu.adaptor.settings import RECORDABLE_TRANSPORTS, RECORDED_DISPATCHES
from fluid_npu.comm.ctas import ctas_obstacle

#: Flags of others that also overlap the AllToAlls, or keep weight gradients back: two such engines exclude each other.
_OTHER_OVERLAPS = {
    "overlap_moe_expert_parallel_comm": "Megatron's 1F1B overlap",
    "delay_wgrad_compute": "Megatron's delayed weight gradients",
    "overlap_dispatch_backward_with_experts_wgrad": "Megatron's overlap of the dispatch's backward",
    "moe_alltoall_overlap_comm": "MindSpeed's overlap of one layer",
    "moe_allgather_overlap_comm": "MindSpeed's overlap of the allgather dispatcher",
    "moe_fb_overlap": "MindSpeed's overlap of forward and backward",
    "moe_alltoall_mc2": "MindSpeed's fused AllToAll and GEMM",
}


class FlagError(ValueError):
    """Flags that contradict each other or the machine; the message names them, their values and the fix."""


def check(args: Namespace, line: str) -> None:
    """Raises FlagError with every contradiction found. ``line`` is Megatron's, such as '0.16'."""
    if not hasattr(args, "fluid_overlap"):
        raise FlagError(
            "the arguments lack fluid_npu's (--yaml-cfg replaces the parsed ones): pass flags instead of a YAML file"
        )
    ours = (*_overlap(args), *_chunks(args), *_dispatch(args), *_transport(args), *_payload(args))
    ours += (*_interleave(args, line), *_local_first(args), *_recorded(args))
    problems = [*ours, *_grouped(args, line), *_others(args)]
    if problems:
        raise FlagError("fluid_npu: " + "\nfluid_npu: ".join(problems))


def _overlap(args: Namespace) -> Iterator[str]:
    asked, chosen = args.fluid_overlap in ("dw", "full"), f"--fluid-overlap {args.fluid_overlap}"
    if asked and not args.moe_grouped_gemm:
        yield f"{chosen} without --moe-grouped-gemm: stock MoE layers overlap nothing; add --moe-grouped-gemm"
    elif asked and args.expert_model_parallel_size == 1:
        yield (
            f"{chosen} with --expert-model-parallel-size 1: there is no AllToAll to hide; raise it, or use "
            "--fluid-overlap off or auto"
        )
    if asked and args.moe_token_dispatcher_type not in ("alltoall", "flex"):
        yield (
            f"{chosen} with --moe-token-dispatcher-type {args.moe_token_dispatcher_type}: only the AllToAll "
            "dispatcher overlaps; use alltoall, or --fluid-overlap off"
        )
    if args.fluid_carry_over and args.fluid_overlap == "off":
        yield "--fluid-carry-over with --fluid-overlap off: nothing is left to carry; use --fluid-overlap dw"
    if args.fluid_twin_every < 0:
        yield f"--fluid-twin-every {args.fluid_twin_every}: must be 0 (never) or a number of steps"


def _chunks(args: Namespace) -> Iterator[str]:
    number, ranks = args.fluid_moe_chunks, args.expert_model_parallel_size
    if number != "auto" and (not isinstance(number, int) or number < 1):
        yield f"--fluid-moe-chunks {number}: must be a number of at least 1, or auto"
    elif number not in ("auto", 1) and args.fluid_overlap != "full":
        yield (
            f"--fluid-moe-chunks {number} with --fluid-overlap {args.fluid_overlap}: layers are in chunks with full "
            "alone; use --fluid-overlap full, or drop the flag"
        )
    elif args.fluid_dispatch in ("static", "once-per-node") and number not in ("auto", 1):
        yield (
            f"--fluid-moe-chunks {number} with --fluid-dispatch {args.fluid_dispatch}: it sends all tokens in one "
            "piece; use once-per-rank, or drop the flag"
        )
    elif (
        (args.fluid_dispatch == "once-per-rank" and args.fluid_moe_chunks_of != "experts")
        or number == "auto"
        or args.num_experts is None
    ):
        pass  # perhaps chunks of tokens, of which there may be any number; or nothing to divide
    elif args.num_experts // ranks % number:
        local = args.num_experts // ranks
        allowed = ", ".join(str(fit) for fit in range(1, local + 1) if local % fit == 0)
        yield f"--fluid-moe-chunks {number}: a rank has {local} experts; allowed are {allowed} and auto"
    of = args.fluid_moe_chunks_of
    if of != "auto" and args.fluid_overlap != "full":
        yield (
            f"--fluid-moe-chunks-of {of} with --fluid-overlap {args.fluid_overlap}: layers are in chunks with full "
            "alone; use --fluid-overlap full, or drop the flag"
        )
    elif of == "tokens" and args.fluid_dispatch == "plain":
        yield (
            "--fluid-moe-chunks-of tokens with --fluid-dispatch plain: its chunks are of experts; use once-per-rank, "
            "or drop the flag"
        )
    parts = args.fluid_attention_chunks
    if parts != "auto" and (not isinstance(parts, int) or parts < 1):
        yield f"--fluid-attention-chunks {parts}: must be at least 1, which cuts nothing, or auto"
    elif parts not in ("auto", 1) and getattr(args, "context_parallel_size", 1) == 1:
        yield (
            f"--fluid-attention-chunks {parts} with --context-parallel-size 1: there is no "
            "AllToAll to compute beside; drop the flag, or raise the size"
        )


def _local_first(args: Namespace) -> Iterator[str]:
    if not args.fluid_local_first:
        return
    if args.fluid_overlap != "full":
        yield (
            f"--fluid-local-first with --fluid-overlap {args.fluid_overlap}: it is a chunk, and layers are in chunks "
            "with full alone; use --fluid-overlap full, or drop the flag"
        )
    if args.expert_model_parallel_size == 1:
        yield "--fluid-local-first with --expert-model-parallel-size 1: all rows are local; raise it, or drop the flag"
    if args.fluid_dispatch == "once-per-node":
        yield (
            "--fluid-local-first with --fluid-dispatch once-per-node: it sends all tokens in one piece; use "
            "once-per-rank, or drop the flag"
        )
    if args.fluid_a2a_payload_dtype != "same":
        yield (
            f"--fluid-local-first with --fluid-a2a-payload-dtype {args.fluid_a2a_payload_dtype}: chunks are not coded; "
            "drop one of the two"
        )


def _recorded(args: Namespace) -> Iterator[str]:
    """What ``mcore.graph_choice`` would refuse when the model is built, as far as flags say it; 'auto' asks it."""
    if args.fluid_moe_cuda_graph != "on":
        return
    stages, shards = (getattr(args, f"{kind}_model_parallel_size", 1) for kind in ("pipeline", "tensor"))
    obstacles = (
        (args.fluid_device in ("cpu", "npu"), f"--fluid-device {args.fluid_device}", "records no graphs; use cuda"),
        (
            args.fluid_dispatch not in RECORDED_DISPATCHES,
            f"--fluid-dispatch {args.fluid_dispatch}",
            f"may wait for sizes; use {' or '.join(RECORDED_DISPATCHES)}",
        ),
        (args.fluid_carry_over, "--fluid-carry-over", "leaves weight gradients for another layer; drop one of the two"),
        (args.fluid_interleave_batches, "--fluid-interleave-batches", "has two halves under way; drop one of the two"),
        (
            args.fluid_a2a_transport not in RECORDABLE_TRANSPORTS,
            f"--fluid-a2a-transport {args.fluid_a2a_transport}",
            f"may count its exchanges on the host; use {', '.join(RECORDABLE_TRANSPORTS)}",
        ),
        (stages > 1, f"--pipeline-model-parallel-size {stages}", "has several forwards waiting; use 1, or auto"),
        (getattr(args, "recompute_granularity", None) == "full", "--recompute-granularity full", "keeps random states"),
        (shards > 1, f"--tensor-model-parallel-size {shards}", "has collectives not recorded yet; use 1, or auto"),
    )
    for given, flag, fix in obstacles:
        if given:
            yield f"--fluid-moe-cuda-graph on with {flag}: it {fix}"


def _dispatch(args: Namespace) -> Iterator[str]:
    if args.fluid_dispatch in ("plain", "auto"):
        return
    chosen = f"--fluid-dispatch {args.fluid_dispatch}"
    if args.moe_token_dispatcher_type != "alltoall":
        yield (
            f"{chosen} with --moe-token-dispatcher-type {args.moe_token_dispatcher_type}: it is a form of our AllToAll "
            "dispatcher; use alltoall, or drop the flag"
        )
    if getattr(args, "moe_pad_expert_input_to_capacity", False):
        yield (
            f"{chosen} with --moe-pad-expert-input-to-capacity: it gives every expert its own fixed rows; drop one of "
            "the two"
        )
    # Not given, it is that of the other layers.
    given: int | None = getattr(args, "expert_tensor_parallel_size", None)
    shards = given or int(getattr(args, "tensor_model_parallel_size", 1))
    if args.fluid_dispatch in ("static", "once-per-node") and shards > 1:
        yield (
            f"{chosen} with expert tensor parallel size {shards}: its ranks exchange rows again, for which this has no "
            "form; use --expert-tensor-parallel-size 1, or --fluid-dispatch once-per-rank"
        )


def _transport(args: Namespace) -> Iterator[str]:
    name, size = args.fluid_a2a_transport, args.fluid_a2a_node_size
    by_nodes = name in ("auto", "two-level") or args.fluid_dispatch in ("auto", "once-per-node")
    if size < 0 or (size and not by_nodes):
        yield (
            f"--fluid-a2a-node-size {size} with --fluid-a2a-transport {name}: nodes have 1 rank or more and are for "
            "two-level and auto, and for --fluid-dispatch once-per-node; drop the flag to ask the launcher"
        )
    obstacle = ctas_obstacle(args.fluid_a2a_ctas, name, "--fluid-a2a-transport ")
    if obstacle:
        yield f"--fluid-a2a-ctas {args.fluid_a2a_ctas}: {obstacle}"
    if name not in ("auto", "collective") and args.expert_model_parallel_size == 1:
        yield (
            f"--fluid-a2a-transport {name} with --expert-model-parallel-size 1: experts exchange nothing; raise it, or "
            "drop the flag"
        )


def _interleave(args: Namespace, line: str) -> Iterator[str]:
    if not args.fluid_interleave_batches:
        return
    samples = getattr(args, "micro_batch_size", None)
    if samples is not None and samples % 2:
        yield (
            f"--fluid-interleave-batches with --micro-batch-size {samples}: it has no halves; use --micro-batch-size "
            f"{samples + 1}, or drop the flag"
        )
    if args.fluid_overlap == "off":
        yield "--fluid-interleave-batches with --fluid-overlap off: every AllToAll is waited for; drop one of the two"
    if line == "0.12":
        yield f"--fluid-interleave-batches: the layers of Megatron {line} have no steps; drop the flag"


def _payload(args: Namespace) -> Iterator[str]:
    if args.fluid_a2a_payload_dtype == "same":
        return
    chosen = f"--fluid-a2a-payload-dtype {args.fluid_a2a_payload_dtype}"
    if args.fluid_device == "npu":
        yield f"{chosen} with --fluid-device npu: torch_npu has no e4m3 numbers; drop the flag"
    if not args.moe_grouped_gemm:
        yield f"{chosen} without --moe-grouped-gemm: the AllToAlls are Megatron's then; add --moe-grouped-gemm"
    elif args.moe_token_dispatcher_type != "alltoall":
        yield (
            f"{chosen} with --moe-token-dispatcher-type {args.moe_token_dispatcher_type}: our dispatcher alone "
            "codes tokens; use alltoall, or drop the flag"
        )
    if args.fluid_dispatch == "once-per-node":
        yield (
            f"{chosen} with --fluid-dispatch once-per-node: rows that are sent on are not coded; use once-per-rank, or "
            "drop the flag"
        )
    if args.fluid_moe_chunks not in ("auto", 1):
        yield f"{chosen} with --fluid-moe-chunks {args.fluid_moe_chunks}: chunks are not coded; drop one of the two"


def _grouped(args: Namespace, line: str) -> Iterator[str]:
    if not args.moe_grouped_gemm:
        if args.fluid_a2a_transport != "collective":
            yield (
                f"--fluid-a2a-transport {args.fluid_a2a_transport} without --moe-grouped-gemm: the AllToAlls are "
                "Megatron's then; add --moe-grouped-gemm"
            )
        if args.fluid_dispatch != "plain":
            yield (
                f"--fluid-dispatch {args.fluid_dispatch} without --moe-grouped-gemm: it is about our MoE layers; add "
                "--moe-grouped-gemm"
            )
        if args.fluid_attention_chunks not in ("auto", 1):
            yield (
                f"--fluid-attention-chunks {args.fluid_attention_chunks} without --moe-grouped-gemm: the attention is "
                "Megatron's then; add --moe-grouped-gemm"
            )
        if args.fluid_moe_cuda_graph != "off":
            yield (
                f"--fluid-moe-cuda-graph {args.fluid_moe_cuda_graph} without --moe-grouped-gemm: it is about our MoE "
                "layers; add --moe-grouped-gemm"
            )
        switches = ("fluid_carry_over", "fluid_interleave_batches", "fluid_local_first")
        for flag in ("gemm_gradient_accumulation_fusion", *switches):
            if getattr(args, flag):
                yield f"{_name(flag)} without --moe-grouped-gemm: it is about grouped experts; add --moe-grouped-gemm"
        return
    if args.num_experts is None:
        yield "--moe-grouped-gemm without --num-experts: there are no experts to group; set --num-experts N"
    if args.moe_token_dispatcher_type == "flex":
        yield (
            "--moe-token-dispatcher-type flex with --moe-grouped-gemm: our layer has no flex dispatcher; use "
            "alltoall, or drop the import of fluid_npu.megatron_adaptor"
        )
    if getattr(args, "moe_use_legacy_grouped_gemm", False):
        yield "--moe-use-legacy-grouped-gemm: our experts take the place of the legacy ones; drop the flag"
    if args.add_bias_linear:
        yield "--moe-grouped-gemm with biases: grouped experts have none; add --disable-bias-linear"
    if line == "0.12" and args.fp16 and args.expert_model_parallel_size > 1:
        yield (
            f"--fp16 with --expert-model-parallel-size {args.expert_model_parallel_size}: Megatron {line} refuses it "
            "for all experts, which is not lifted here; use --bf16 or fp32, or a Megatron-LM from 0.16 on"
        )
    if line == "0.12" and args.fluid_carry_over:
        yield (
            f"--fluid-carry-over: the DDP of Megatron {line} takes no late gradients; drop the flag, or use a "
            "Megatron-LM from 0.16 on"
        )


def _others(args: Namespace) -> Iterator[str]:
    if not args.moe_grouped_gemm:
        return
    for flag, what in _OTHER_OVERLAPS.items():
        if getattr(args, flag, False):
            yield f"{_name(flag)} ({what}) with --moe-grouped-gemm: our layer overlaps by itself; drop {_name(flag)}"


def _name(destination: str) -> str:
    return "--" + destination.replace("_", "-")
