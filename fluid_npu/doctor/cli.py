"""``fluid-npu doctor``: gathers the facts, asks the checks, prints. Imports neither torch nor Megatron."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from fluid_npu.train import exit_codes

_TIMEOUT_S = 120.0
_TOOL_TIMEOUT_S = 15.0


def add_doctor_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``doctor``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="what is on this machine, what is wrong, what to do next",
        description="Hardware and drivers, package versions, two Megatrons on the path, apex and MindSpeed, "
        "environment variables that hurt, patches, whether an AllToAll can be hidden here, and what to do next.",
        epilog="Exit code 0: nothing wrong (there may be warnings); 1: something that keeps training from working.",
    )
    parser.add_argument(
        "--dtypes", action="store_true", help="what --moe-grouped-gemm does in each Megatron version and dtype"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS", help=f"for each question ({_TIMEOUT_S:g})"
    )
    parser.set_defaults(func=run_doctor)
    return parser


def run_doctor(args: argparse.Namespace) -> int:
    """Runs ``doctor``; FAILED when something is wrong."""
    if not args.timeout > 0:
        print(f"fluid-npu doctor: --timeout {args.timeout:g}: must be above 0; use --timeout 120", file=sys.stderr)
        return exit_codes.USAGE
    return _run_dtypes(args) if args.dtypes else _run_report(args)


def _run_report(args: argparse.Namespace) -> int:
    from fluid_npu.doctor.examine import examine
    from fluid_npu.doctor.report import as_json, as_text

    report = examine(os.environ, sys.path, args.timeout, _TOOL_TIMEOUT_S)
    _print(as_json(report), as_text(report), as_json=args.json)
    return exit_codes.FAILED if report.verdict == "wrong" else exit_codes.OK


def _run_dtypes(args: argparse.Namespace) -> int:
    from fluid_npu.adaptor.dtypes import DTYPES, supported_lines
    from fluid_npu.doctor.ask import ask
    from fluid_npu.doctor.dtypes import dtypes_json, dtypes_text, failed_here, matrix
    from fluid_npu.doctor.megatrons import find_portions, imported_core

    reply = ask("dtypes", args.timeout)
    tried = {name: reply.problem for name in DTYPES} if reply.problem else dict(reply.facts["tried"])
    version = imported_core(find_portions(sys.path))
    rows = matrix(supported_lines(), version and ".".join(version.split(".")[:2]), tried)
    _print(dtypes_json(rows), dtypes_text(rows), as_json=args.json)
    return exit_codes.FAILED if failed_here(rows) else exit_codes.OK


def _print(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    print(json.dumps(result, indent=2) if as_json else text)
