"""``fluid-npu parity`` and ``fluid-npu bench``: flags, checks, the run, the output. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fluid_npu.bench.job import Job
from fluid_npu.train import exit_codes
from fluid_npu.train.config import DTYPES, ConfigError, TrainConfig, validate
from fluid_npu.train.presets import CUT_FIELDS, PRESETS, PresetError, flag_of

_DEFAULTS = TrainConfig()
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
    parser.add_argument("--preset", default="h64", metavar="NAME", help=f"one of: {', '.join(PRESETS)} (h64)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="SGD steps (20)")
    _add_common_flags(parser)
    for name in CUT_FIELDS:
        parser.add_argument(flag_of(name), type=int, metavar="N", dest=f"cut_{name}", help=argparse.SUPPRESS)
    parser.epilog = f"Any figure of the preset can be replaced: {' '.join(f'{flag_of(n)} N' for n in CUT_FIELDS)}"
    parser.set_defaults(func=run_parity)
    return parser


def add_bench_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``bench`` and its own commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure ours against stock Megatron", description="Paired measurements; see each command."
    )
    commands = parser.add_subparsers(title="benches", metavar="BENCH", required=True)
    _add_train_step_parser(commands)
    _add_overlap_parser(commands)
    return parser


def _add_overlap_parser(commands: Any) -> None:
    parser = commands.add_parser("overlap", help="each AllToAll on a slow link: not built yet, refused by name")
    parser.add_argument("--link", metavar="RATE", help="rate of the link between the ranks, such as 1gbit")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(func=refuse_overlap)


def refuse_overlap(args: argparse.Namespace) -> int:
    """``bench overlap`` is named by ``train`` and not built yet: says so and what to use until then."""
    return _fail(
        args,
        "bench overlap: not built yet; until then 'fluid-npu train --preset mixtral-tiny --overlap dw "
        "--plant-delay-ms 20' shows what a network that takes time leaves to hide",
    )


def _add_train_step_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-step",
        help="a training step by stock, ours plain and ours overlapped",
        description="The same training step, and one MoE layer alone, by stock SequentialMLP, ours plain, ours "
        "overlapped and its serialised twin: checked to agree, then run in paired, interleaved rounds.",
    )
    parser.add_argument("--cases", nargs="+", default=list(_STEP_CASES), choices=_STEP_CASES, help="default: both")
    parser.add_argument(
        "--rounds", "--steps", type=int, metavar="N", help="paired rounds of each case (60 for h64, 20 for h256)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the rows")
    parser.add_argument("--out", metavar="DIR", help="write train-step.json and train-step.txt")
    parser.add_argument(
        "--plant-delay-ms", type=float, default=0.0, metavar="D", help="delay every AllToAll of ours, on a CPU"
    )
    _add_common_flags(parser)
    parser.set_defaults(func=run_train_step)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (("nproc", "processes on this machine"), ("ep", "expert parallel size")):
        value = getattr(_DEFAULTS, name)
        parser.add_argument(flag_of(name), type=int, default=value, metavar="N", help=f"{text} ({value})")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or npu (auto)")
    parser.add_argument("--dtype", default="fp32", metavar="NAME", help=f"{', '.join(DTYPES)} (fp32)")
    parser.add_argument("--seed", type=int, default=_DEFAULTS.seed, metavar="N", help="of weights and data")
    parser.add_argument("--timeout", type=float, default=_DEFAULTS.timeout, metavar="SECONDS", help="of a collective")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--plant-error",
        type=float,
        default=0.0,
        metavar="X",
        help="scale one weight gradient of ours plain by 1+X: shows that the check refuses",
    )


def run_parity(args: argparse.Namespace) -> int:
    """Runs ``parity``; FAILED beyond the tolerance."""
    from fluid_npu.bench.output import parity_text

    values = {"preset": args.preset, "steps": args.steps, "lr": _PARITY_LR, "min_lr": 0.0}
    code, result = _run(args, "fluid_npu.bench.parity:compare_variants", {}, **values)
    if result is None:
        return code
    _print(result, parity_text(result), args)
    return exit_codes.OK if result["passed"] else exit_codes.FAILED


def run_train_step(args: argparse.Namespace) -> int:
    """Runs ``bench train-step``."""
    from fluid_npu.bench.output import train_step_text, write_files

    if args.rounds is not None and args.rounds < 2:
        return _fail(args, f"--rounds {args.rounds}: at least 2 are needed for an interval; use --rounds 20")
    options = {"cases": list(dict.fromkeys(args.cases)), "rounds": args.rounds}
    delay = args.plant_delay_ms
    code, result = _run(args, "fluid_npu.bench.train_step:measure", options, preset="h64", plant_delay_ms=delay)
    if result is None:
        return code
    text = train_step_text(result)
    _print(result, text, args)
    try:
        write_files(result, text, args.csv, args.out, "train-step")
    except OSError as error:
        return _fail(args, f"{error.filename}: cannot be written ({error.strerror})", exit_codes.FAILED)
    return exit_codes.OK


def _run(args: argparse.Namespace, task: str, options: dict[str, Any], **values: Any) -> tuple[int, Any]:
    try:
        config = _config(args, **values)
    except (ConfigError, PresetError) as error:
        return _fail(args, str(error)), None
    from fluid_npu.bench.launch import run_job

    options = {**options, "command": " ".join(["fluid-npu", *sys.argv[1:]]), "plant_error": args.plant_error}
    return run_job(Job(task=task, config=config, options=options, command=_name(args)))


def _config(args: argparse.Namespace, **values: Any) -> TrainConfig:
    given = {name: getattr(args, f"cut_{name}", None) for name in CUT_FIELDS}
    shared = {name: getattr(args, name) for name in ("nproc", "ep", "device", "dtype", "seed", "timeout")}
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        shared["nproc"] = int(os.environ["WORLD_SIZE"])
    cut = {name: value for name, value in given.items() if value is not None}
    return validate(TrainConfig(**shared, **values, overlap="dw", cut=cut))


def _print(result: dict[str, Any], text: str, args: argparse.Namespace) -> None:
    from fluid_npu.bench.output import show

    show(result, text, as_json=args.json)


def _name(args: argparse.Namespace) -> str:
    return "fluid-npu parity" if args.func is run_parity else "fluid-npu bench train-step"


def _fail(args: argparse.Namespace, reason: str, code: int = exit_codes.USAGE) -> int:
    print(f"{_name(args)}: {reason}", file=sys.stderr, flush=True)
    return code
