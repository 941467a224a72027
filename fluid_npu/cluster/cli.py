"""``fluid-npu cluster check|local``: checks a Megatron-LM command line for a cluster, or tries it on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from fluid_npu.cluster import report
from fluid_npu.cluster.flags import LINES
from fluid_npu.cluster.plan import Cluster
from fluid_npu.train import exit_codes
from fluid_npu.train.presets import PRESETS, PresetError

_CHECK = "checks flags, sizes, memory, files and environment of a Megatron-LM job; nothing is started"
_LOCAL = "runs the same arguments with tiny sizes on two CPU processes of this machine"


def add_cluster_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``cluster``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cluster",
        help="check a Megatron-LM job for a cluster, or try it with tiny sizes",
        description="What scripts/pretrain_*.sh call. Megatron-LM's own arguments follow after --.",
        epilog=exit_codes.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help=_CHECK, description=_CHECK, allow_abbrev=False)
    _add_cluster_flags(check)
    check.set_defaults(func=run_check)
    local = actions.add_parser("local", help=_LOCAL, description=_LOCAL, allow_abbrev=False)
    local.add_argument("--steps", type=int, default=5, metavar="N", help="training steps (5)")
    local.add_argument("--out", default="", metavar="DIR", help="outputs; default: a new folder below runs/")
    local.set_defaults(func=run_local)
    for action in (check, local):
        _add_common_flags(action)
    return parser


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"one of: {', '.join(PRESETS)}, or none")
    parser.add_argument("--megatron", default="", metavar="DIR", help="the Megatron-LM checkout")
    parser.add_argument(
        "--megatron-version",
        default="",
        metavar="X.Y.Z",
        help=f"whose flags to expect where the checkout does not say it ({LINES[0]}); known: {', '.join(LINES)}",
    )
    parser.add_argument("words", nargs="*", metavar="-- MEGATRON ARGUMENTS", help="the arguments of pretrain_gpt.py")


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    default = Cluster()
    parser.add_argument("--nnodes", type=int, default=default.nodes, metavar="N", help="machines")
    parser.add_argument("--nproc-per-node", type=int, default=default.per_node, metavar="N", help="devices of each")
    parser.add_argument("--node-rank", type=int, default=default.node_rank, metavar="N", help="this machine, from 0")
    parser.add_argument("--master-addr", default=default.master_addr, metavar="HOST", help="address of node 0")
    parser.add_argument("--master-port", type=int, default=default.master_port, metavar="PORT", help="free on node 0")
    parser.add_argument(
        "--device-memory", type=float, default=default.memory_gib, metavar="GIB", help="of one device (64: A2)"
    )
    parser.add_argument(
        "--imbalance", type=float, default=default.imbalance, metavar="X", help="rows of the busiest rank / mean (1.2)"
    )
    parser.add_argument("--no-files", action="store_true", help="do not look for data, tokenizer and Megatron-LM")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run_check(args: argparse.Namespace) -> int:
    """Prints the plan, the memory estimate and the problems; 0 without errors, 2 with, 3 when only files miss."""
    from fluid_npu.cluster.checks import Checked, check_job

    cluster = Cluster(
        nodes=args.nnodes,
        per_node=args.nproc_per_node,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        memory_gib=args.device_memory,
        imbalance=args.imbalance,
    )
    try:
        checked: Checked = check_job(
            args.words,
            cluster,
            preset=args.preset,
            megatron=args.megatron,
            version=args.megatron_version,
            env=os.environ,
            look_for_files=not args.no_files,
        )
    except PresetError as error:
        return _fail(error)
    print(json.dumps(report.as_dict(checked), indent=2) if args.json else report.as_text(checked))
    return checked.exit_code


def run_local(args: argparse.Namespace) -> int:
    """Runs the tiny job; the exit code is the trainer's or Megatron-LM's."""
    from fluid_npu.cluster.local import LocalError, run

    try:
        return run(
            args.words,
            preset=args.preset,
            megatron=args.megatron,
            version=args.megatron_version,
            steps=args.steps,
            out=args.out,
        )
    except (LocalError, PresetError) as error:
        return _fail(error)


def _fail(reason: object) -> int:
    print(f"fluid-npu cluster: {reason}", file=sys.stderr, flush=True)
    return exit_codes.USAGE
