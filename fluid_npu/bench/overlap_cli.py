"""Flags of ``fluid-npu bench overlap``. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from fluid_npu.bench.options import add_model_flags, add_run_flags, fail, run_bench
from fluid_npu.bench.workload_names import DESCRIPTIONS
from fluid_npu.train.presets import PresetError, get_preset

#: What a model is cut to, so that a step is short; flags replace it.
CUT = {"layers": 2, "first_dense_layers": 0, "micro_batch_size": 1}
_LONGEST = 4096


def add_overlap_parser(commands: Any) -> None:
    """Register ``overlap``."""
    words = ", ".join(f"{name} {text}" for name, text in DESCRIPTIONS.items())
    parser = commands.add_parser(
        "overlap",
        help="each AllToAll of a step: transfer, peer wait, exposed, hidden",
        description="Forward and backward of a small model whose routing follows a workload, plain, overlapped and as "
        "the serialised twin, in interleaved rounds with clocks on every AllToAll. Says what pays and what to turn "
        f"off here. Workloads: {words}. Sequences of more than {_LONGEST} tokens are cut to that.",
    )
    add_model_flags(parser, "mixtral-tiny")
    parser.add_argument(
        "--workloads", nargs="+", default=list(DESCRIPTIONS), choices=list(DESCRIPTIONS), metavar="W", help="all"
    )
    parser.add_argument("--overlap", default="dw", choices=("dw", "full"), help="what is overlapped (dw)")
    parser.add_argument("--moe-chunks", type=int, metavar="N", help="with --overlap full: chunks of a rank's experts")
    parser.add_argument("--carry-over", action="store_true", help="let dW wait for the combine of the layer below")
    parser.add_argument(
        "--plant-delay-ms", type=float, default=0.0, metavar="D", help="delay every AllToAll of ours, on a CPU"
    )
    parser.add_argument("--link", metavar="RATE", help="put the ranks behind links of this rate, such as 1gbit (root)")
    add_run_flags(parser, "overlap", "12")
    parser.set_defaults(func=run_overlap)


def run_overlap(args: argparse.Namespace) -> int:
    """Runs ``bench overlap``."""
    from fluid_npu.bench.overlap_text import overlap_text, overlap_verdict

    try:
        length = min(get_preset(args.preset).seq_length, _LONGEST)
    except PresetError as error:
        return fail("fluid-npu bench overlap", str(error))
    return run_bench(
        args,
        "overlap",
        "fluid_npu.bench.overlap:measure",
        {"workloads": list(dict.fromkeys(args.workloads)), "rounds": args.rounds or 12, "link": args.link},
        lambda result: (overlap_text(result), overlap_verdict(result)),
        preset=args.preset,
        cut={**CUT, "seq_length": length},
        carry_over=args.carry_over,
        overlap=args.overlap,
        moe_chunks=args.moe_chunks or "auto",
        plant_delay_ms=args.plant_delay_ms,
    )
