"""Flags of ``fluid-npu bench block``. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fluid_npu.bench.options import add_model_flags, add_run_flags, fail, run_bench
from fluid_npu.train.presets import PresetError, get_preset

IMPLS = (
    *("stock-te", "stock-te-a2a"),
    *("ours-plain", "ours-overlapped", "ours-carry", "ours-attention-chunks", "ours-chunks", "ours-peer", "ours-once"),
    *("ours-recorded", "ours-recorded-local-first", "ours-recorded-attention-chunks"),
    "ours-recorded-once",
)
_ROUNDS, _ROWS = 12, 4096
PARTIAL = "block.partial.json"


def add_block_parser(commands: Any) -> None:
    """Register ``block``."""
    parser = commands.add_parser(
        "block",
        help="whole transformer layers under context parallelism, stock with TE and ours",
        description="Attention and MoE of whole layers over context-parallel ranks: forward and backward into "
        "main_grad, and the iteration with the reduction of gradients, by stock Megatron with Transformer Engine "
        "(where it is installed) and ours; each AllToAll of ours beside its serialised twin. Checked before timing: "
        "without Transformer Engine against stock Megatron on whole sequences. Sequences are cut to "
        f"{_ROWS} rows a rank.",
    )
    add_model_flags(parser, "mixtral-tiny")
    parser.add_argument("--cp", type=int, default=2, metavar="N", help="context parallel size (2)")
    parser.add_argument("--impl", nargs="+", default=list(IMPLS), choices=IMPLS, metavar="I", help=", ".join(IMPLS))
    parser.add_argument(
        "--activation", default="preset", choices=("preset", "gelu"), help="gelu: experts without gate (preset)"
    )
    parser.add_argument("--link", metavar="RATE", help="put the ranks behind links of this rate, such as 1gbit (root)")
    add_run_flags(parser, "block", str(_ROUNDS))
    parser.set_defaults(func=run_block)


def run_block(args: argparse.Namespace) -> int:
    """Runs ``bench block``; with --out what is measured so far stands in ``block.partial.json``."""
    from fluid_npu.bench.block_text import block_text, block_verdict

    try:
        preset = get_preset(args.preset)
    except PresetError as error:
        return fail("fluid-npu bench block", str(error))
    if args.cp < 2:
        return fail("fluid-npu bench block", f"--cp {args.cp}: there is no exchange of attention; use --cp 2")
    cut = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, "micro_batch_size": 1}
    cut["seq_length"] = min(preset.seq_length, _ROWS * args.cp)
    options = {"impls": list(dict.fromkeys(args.impl)), "activation": args.activation, "link": args.link}
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        options["partial"] = str(Path(args.out).resolve() / PARTIAL)
    code = run_bench(
        args,
        "block",
        "fluid_npu.bench.block:measure",
        {**options, "rounds": args.rounds or _ROUNDS},
        lambda result: (block_text(result), block_verdict(result)),
        preset=args.preset,
        cp=args.cp,
        cut=cut,
    )
    if code == 0 and args.out:
        (Path(args.out) / PARTIAL).unlink(missing_ok=True)
    return code
