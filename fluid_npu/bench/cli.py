"""``fluid-npu parity`` and ``fluid-npu bench``: the commands and their own flags. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from fluid_npu.bench.block_cli import add_block_parser
from fluid_npu.bench.layer_cli import add_layer_parser
from fluid_npu.bench.options import (
    add_common_flags,
    add_engine_flags,
    add_model_flags,
    add_run_flags,
    run_bench,
    run_task,
)
from fluid_npu.bench.overlap_cli import add_overlap_parser
from fluid_npu.bench.sweeps_cli import add_ffn_sweep_parser, add_parallel_sweep_parser
from fluid_npu.train import exit_codes

_STEP_CASES = ("h64", "h256")
_PARITY_LR = 0.1  # high, so that the weights that are compared have moved


def add_parity_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``parity``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "parity",
        help="compare ours with stock Megatron: loss, every gradient and weight",
        description="Trains stock Megatron (SequentialMLP), ours plain and ours overlapped from the same weights and "
        "data with SGD and compares loss, every gradient and weight. Exit code 1 beyond the tolerance.",
    )
    add_model_flags(parser, "h64")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="SGD steps (20)")
    add_engine_flags(parser)
    add_common_flags(parser)
    parser.set_defaults(func=run_parity)
    return parser


def add_bench_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``bench`` and its own commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure ours against stock Megatron",
        description="Paired measurements; see each command, and docs/BENCHMARKS.md for what is measured.",
    )
    commands = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    _add_train_step_parser(commands)
    add_layer_parser(commands)
    add_block_parser(commands)
    add_overlap_parser(commands)
    add_ffn_sweep_parser(commands)
    add_parallel_sweep_parser(commands)
    return parser


def _add_train_step_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-step",
        help="a training step by stock, ours plain and ours overlapped",
        description="The same training step, and one MoE layer alone, by stock SequentialMLP, ours plain, ours "
        "overlapped and its serialised twin: checked to agree, then run in paired, interleaved rounds.",
    )
    parser.add_argument("--cases", nargs="+", default=list(_STEP_CASES), choices=_STEP_CASES, help="default: both")
    parser.add_argument(
        "--plant-delay-ms", type=float, default=0.0, metavar="D", help="delay every AllToAll of ours, on a CPU"
    )
    add_run_flags(parser, "train-step", "60 for h64, 20 for h256")
    parser.set_defaults(func=run_train_step)


def run_parity(args: argparse.Namespace) -> int:
    """Runs ``parity``; FAILED beyond the tolerance."""
    from fluid_npu.bench.output import parity_text, show

    values = {"preset": args.preset, "steps": args.steps, "lr": _PARITY_LR, "min_lr": 0.0}
    code, result = run_task(args, "fluid-npu parity", "fluid_npu.bench.parity:compare_variants", {}, **values)
    if result is None:
        return code
    show(result, parity_text(result), as_json=args.json)
    return exit_codes.OK if result["passed"] else exit_codes.FAILED


def run_train_step(args: argparse.Namespace) -> int:
    """Runs ``bench train-step``."""
    from fluid_npu.bench.output import train_step_text, train_step_verdict

    options = {"cases": list(dict.fromkeys(args.cases)), "rounds": args.rounds}
    return run_bench(
        args,
        "train-step",
        "fluid_npu.bench.train_step:measure",
        options,
        lambda result: (train_step_text(result), train_step_verdict(result)),
        preset="h64",
        plant_delay_ms=args.plant_delay_ms,
    )
