"""Flags of ``fluid-npu bench ffn-sweep`` and ``parallel-sweep``. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from fluid_npu.bench.options import add_common_flags, add_file_flags, add_rounds_flag, fail, run_bench
from fluid_npu.bench.published import FFN, PARALLEL
from fluid_npu.bench.sweep_shapes import ffn_shape, parallel_shape

_ROUNDS = 20
_WHAT = (
    "Forward and backward of one rank's experts into main_grad: a loop over experts (Megatron's SequentialMLP) against "
    "grouped matmuls (ours). gain = baseline / grouped - 1. Without AllToAlls. On a CPU the shapes are scaled down. "
    "MindSpeed's published rows stand beside."
)


def add_ffn_sweep_parser(commands: Any) -> None:
    """Register ``ffn-sweep``."""
    parser = commands.add_parser("ffn-sweep", help="grouped matmuls against a loop, by ffn size", description=_WHAT)
    sizes = sorted(FFN)
    parser.add_argument(
        "--ffn", nargs="+", type=int, default=sizes, metavar="F", help=f"ffn sizes ({' '.join(map(str, sizes))})"
    )
    _finish(parser, "ffn-sweep", run_ffn_sweep)


def add_parallel_sweep_parser(commands: Any) -> None:
    """Register ``parallel-sweep``."""
    parser = commands.add_parser(
        "parallel-sweep", help="grouped matmuls against a loop, by parallel sizes and experts", description=_WHAT
    )
    parser.add_argument(
        "--config", nargs="+", default=list(PARALLEL), metavar="C", help=f"such as tp4ep2e16 ({' '.join(PARALLEL)})"
    )
    _finish(parser, "parallel-sweep", run_parallel_sweep)


def _finish(parser: argparse.ArgumentParser, name: str, func: Any) -> None:
    add_rounds_flag(parser, str(_ROUNDS))
    add_file_flags(parser, name)
    add_common_flags(parser, nproc=1, ep=1)
    parser.set_defaults(func=func)


def run_ffn_sweep(args: argparse.Namespace) -> int:
    """Runs ``bench ffn-sweep``."""
    return _run(args, "ffn-sweep", "measure_ffn", {"ffn": list(dict.fromkeys(args.ffn))}, ffn_shape)


def run_parallel_sweep(args: argparse.Namespace) -> int:
    """Runs ``bench parallel-sweep``."""
    points = {"config": list(dict.fromkeys(args.config))}
    return _run(args, "parallel-sweep", "measure_parallel", points, parallel_shape)


def _run(args: argparse.Namespace, name: str, task: str, points: dict[str, Any], shape: Any) -> int:
    from fluid_npu.bench.sweeps_text import sweep_text, sweep_verdict

    try:
        for values in points.values():
            for value in values:
                shape(value, small=True)
    except ValueError as error:
        return fail(f"fluid-npu bench {name}", str(error))
    return run_bench(
        args,
        name,
        f"fluid_npu.bench.sweeps:{task}",
        {**points, "rounds": args.rounds or _ROUNDS},
        lambda result: (sweep_text(result), sweep_verdict(result)),
        preset="h64",
    )
