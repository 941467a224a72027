"""Flags of ``fluid-npu bench layer``. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from fluid_npu.bench.options import add_model_flags, add_run_flags, fail, run_bench
from fluid_npu.bench.workload_names import DESCRIPTIONS
from fluid_npu.train.presets import PresetError, get_preset

IMPLS = (
    *("baseline", "stock-sequential", "stock-grouped", "stock-grouped-torch", "stock-te", "stock-te-overlapped"),
    *("ours-plain", "ours-overlapped", "ours-once", "ours-peer", "ours-once-peer", "ours-2-chunks", "ours-4-chunks"),
    "ours-once-node",
    *("ours-static", "ours-static-peer", "ours-static-graph", "ours-once-2-chunks", "ours-once-fp8"),
    *("ours-local-first", "ours-once-local-first", "ours-static-local-first", "ours-static-local-first-graph"),
    *("ours-once-graph", "ours-once-local-first-graph", "ours-once-2-chunks-graph", "ours-once-2-expert-chunks-graph"),
)
_ROUNDS, _LONGEST = 20, 4096


def add_layer_parser(commands: Any) -> None:
    """Register ``layer``."""
    parser = commands.add_parser(
        "layer",
        help="one layer by Baseline, stock Megatron and ours, with parts and floor",
        description="One transformer or MoE layer, forward and forward with backward into main_grad, by plain torch "
        "(Baseline: the whole layer in one autograd function, attention recomputed), stock Megatron's experts and "
        "ours; where the time goes, the floor (each AllToAll a local slice), memory. Sequences of more than "
        f"{_LONGEST} tokens are cut to that.",
    )
    add_model_flags(parser, "mixtral-tiny")
    parser.add_argument("--impl", nargs="+", default=list(IMPLS), choices=IMPLS, metavar="I", help=", ".join(IMPLS))
    parser.add_argument("--part", default="transformer", choices=("transformer", "moe"), help="(transformer)")
    parser.add_argument(
        "--workload", default="W0", choices=list(DESCRIPTIONS), metavar="W", help="routing, W0 to W7 (W0 balanced)"
    )
    add_run_flags(parser, "layer", str(_ROUNDS))
    parser.set_defaults(func=run_layer)


def run_layer(args: argparse.Namespace) -> int:
    """Runs ``bench layer``."""
    from fluid_npu.bench.layer_text import layer_text, layer_verdict

    try:
        preset = get_preset(args.preset)
    except PresetError as error:
        return fail("fluid-npu bench layer", str(error))
    cut = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, "seq_length": min(preset.seq_length, _LONGEST)}
    options = {"impls": list(dict.fromkeys(args.impl)), "part": args.part, "workload": args.workload}
    options["node_size"] = _taken_node_size(args)
    return run_bench(
        args,
        "layer",
        "fluid_npu.bench.layer:measure",
        {**options, "rounds": args.rounds or _ROUNDS},
        lambda result: (layer_text(result), layer_verdict(result)),
        preset=args.preset,
        cut=cut,
    )


def _taken_node_size(args: argparse.Namespace) -> int:
    """``--a2a-node-size`` for ours-once-node; taken from the flags where no other part of the run has nodes."""
    size: int = args.a2a_node_size
    of_all = args.a2a_transport in ("auto", "two-level") or args.dispatch in ("auto", "once-per-node")
    if "ours-once-node" in args.impl and size > 0 and args.nproc % size == 0 and not of_all:
        args.a2a_node_size = 0
    return size
