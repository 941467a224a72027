"""What all benches share on the command line: flags, the configuration they make, the run, the output. No torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from fluid_npu.bench.job import Job
from fluid_npu.link import LinkError, parse_link, why_unavailable
from fluid_npu.train import exit_codes
from fluid_npu.train.config import (
    A2A_TRANSPORTS,
    DISPATCHES,
    DTYPES,
    PAYLOAD_DTYPES,
    ConfigError,
    TrainConfig,
    validate,
)
from fluid_npu.train.presets import CUT_FIELDS, PRESETS, PresetError, flag_of

_DEFAULTS = TrainConfig()


def add_common_flags(parser: argparse.ArgumentParser, *, nproc: int = 2, ep: int = 2) -> None:
    """Device, processes, data type, seed, output: the same for every bench."""
    for name, value, text in (("nproc", nproc, "processes on this machine"), ("ep", ep, "expert parallel size")):
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
        help="scale a weight gradient of ours plain by 1+X: shows that the check refuses",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """How our layers send, for benches that run AllToAlls."""
    text = f"ours sends a token to a rank with several of its experts: {', '.join(DISPATCHES)} (plain)"
    parser.add_argument("--dispatch", default=_DEFAULTS.dispatch, metavar="NAME", help=text)
    text = f"what moves the bytes of our AllToAlls: {', '.join(A2A_TRANSPORTS)} ({_DEFAULTS.a2a_transport})"
    parser.add_argument("--a2a-transport", default=_DEFAULTS.a2a_transport, metavar="NAME", help=text)
    text = "ranks of a node, for --a2a-transport two-level and --dispatch once-per-node; 0: those of the launcher (0)"
    parser.add_argument("--a2a-node-size", type=int, default=0, metavar="N", help=text)
    text = "NCCL's CTAs for an exchange: so many with --a2a-transport high-priority, at most so many with few-ctas; a "
    text += "power of 2 up to 64; 0: NCCL's choice, 8 with few-ctas (0)"
    parser.add_argument("--a2a-ctas", type=int, default=0, metavar="N", help=text)
    text = f"of the tokens that our dispatches send: {', '.join(PAYLOAD_DTYPES)} (same)"
    parser.add_argument("--a2a-payload-dtype", default=_DEFAULTS.a2a_payload_dtype, metavar="NAME", help=text)


def add_file_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the result goes besides the screen."""
    parser.add_argument("--csv", metavar="FILE", help="write the rows")
    parser.add_argument("--out", metavar="DIR", help=f"write {name}.json and {name}.txt")


def add_rounds_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """How often everything runs."""
    parser.add_argument("--rounds", "--steps", type=int, metavar="N", help=f"paired, interleaved rounds ({default})")


def add_run_flags(parser: argparse.ArgumentParser, name: str, rounds: str) -> None:
    """What every bench of our layers' AllToAlls has besides its model and its own flags."""
    add_rounds_flag(parser, rounds)
    add_file_flags(parser, name)
    add_engine_flags(parser)
    add_common_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser, preset: str) -> None:
    """Which model, and any figure of it."""
    parser.add_argument("--preset", default=preset, metavar="NAME", help=f"one of: {', '.join(PRESETS)} ({preset})")
    for name in CUT_FIELDS:
        parser.add_argument(flag_of(name), type=int, metavar="N", dest=f"cut_{name}", help=argparse.SUPPRESS)
    parser.epilog = f"Any figure of the preset can be replaced: {' '.join(f'{flag_of(n)} N' for n in CUT_FIELDS)}"


def make_config(args: argparse.Namespace, **values: Any) -> TrainConfig:
    """The configuration of the ranks. Raises ConfigError or PresetError."""
    given = {name: getattr(args, f"cut_{name}", None) for name in CUT_FIELDS}
    shared = {name: getattr(args, name) for name in ("nproc", "ep", "device", "dtype", "seed", "timeout")}
    engine = ("dispatch", "a2a_transport", "a2a_node_size", "a2a_ctas", "a2a_payload_dtype")
    shared |= {name: getattr(args, name) for name in engine if hasattr(args, name)}
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        shared["nproc"] = int(os.environ["WORLD_SIZE"])
    cut = {**values.pop("cut", {}), **{name: value for name, value in given.items() if value is not None}}
    return validate(TrainConfig(**shared, **{"overlap": "dw", **values}, cut=cut))


def run_task(
    args: argparse.Namespace, name: str, task: str, options: dict[str, Any], **values: Any
) -> tuple[int, dict[str, Any] | None]:
    """Runs ``task`` on the ranks; exit code and result (None on failure and on other ranks of torchrun)."""
    rounds = getattr(args, "rounds", None)
    if rounds is not None and rounds < 2:
        return fail(name, f"--rounds {rounds}: at least 2 are needed for an interval; use --rounds 20"), None
    try:
        if options.get("link"):
            values = {**values, **_behind_link(args, options["link"], values)}
        config = make_config(args, **values)
    except (ConfigError, PresetError, LinkError) as error:
        return fail(name, str(error)), None
    from fluid_npu.bench.launch import run_job

    options = {**options, "command": " ".join(["fluid-npu", *sys.argv[1:]]), "plant_error": args.plant_error}
    return run_job(Job(task=task, config=config, options=options, command=name))


def _behind_link(args: argparse.Namespace, text: str, values: dict[str, Any]) -> dict[str, Any]:
    """What a slow link changes of the configuration. Raises LinkError."""
    try:
        link = parse_link(text)
    except ValueError as error:
        raise LinkError(str(error)) from error
    if "RANK" in os.environ:
        raise LinkError(f"--link {text}: torchrun's ranks are on its own network; run the command by itself")
    if args.device not in ("auto", "cpu"):
        raise LinkError(f"--link {text}: joins ranks of a CPU; use --device cpu")
    reason = why_unavailable()
    if reason is not None:
        raise LinkError(f"--link {text}: {reason}")
    args.device = "cpu"
    return {"plant_delay_ms": values.get("plant_delay_ms", 0.0) + link.delay_ms}


def run_bench(
    args: argparse.Namespace,
    name: str,
    task: str,
    options: dict[str, Any],
    present: Callable[[dict[str, Any]], tuple[str, list[str]]],
    **values: Any,
) -> int:
    """Runs a bench, prints and writes its result; ``present`` gives (text, verdict) of it."""
    from fluid_npu.bench.output import show, write_files

    code, result = run_task(args, f"fluid-npu bench {name}", task, options, **values)
    if result is None:
        return code
    text, result["verdict"] = present(result)
    show(result, text, as_json=args.json)
    try:
        write_files(result, text, args.csv, args.out, name)
    except OSError as error:
        reason = f"{error.filename}: cannot be written ({error.strerror})"
        return fail(f"fluid-npu bench {name}", reason, exit_codes.FAILED)
    return exit_codes.OK


def fail(name: str, reason: str, code: int = exit_codes.USAGE) -> int:
    """Says what is wrong and returns the exit code."""
    print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return code
