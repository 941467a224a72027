"""``fluid-npu sim``: exec, build, info."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fluid_npu.sim.errors import SimError

_USAGE = 2


def add_sim_parser(subparsers: Any) -> None:
    """Registers ``sim`` and its three commands."""
    text = "a simulated Ascend NPU: run NPU programs on a machine without one"
    parser = subparsers.add_parser("sim", help=text, description=text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_exec(commands)
    build = commands.add_parser("build", help="compile the simulator now; exec does it on first use")
    build.add_argument("--force", action="store_true", help="compile again")
    build.set_defaults(func=_guarded(_build))
    info = commands.add_parser("info", help="versions, folders, operators")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    info.set_defaults(func=_guarded(_info))


def _add_exec(commands: Any) -> None:
    parser = commands.add_parser("exec", help="run a command on the simulated NPU: sim exec -- COMMAND")
    parser.add_argument("--soc", default="910B", metavar="NAME", help="910B or 910C (910B)")
    parser.add_argument("--devices", type=int, metavar="N", help="NPUs that a process sees (8)")
    parser.add_argument("--hbm-mb", type=int, metavar="N", help="memory of one NPU in MiB (65536)")
    parser.add_argument("--delay-seed", type=int, metavar="N", help="random delay of stream tasks, from this seed")
    parser.add_argument("--delay-us", type=int, metavar="N", help="the longest such delay in microseconds (200)")
    parser.add_argument("--log", metavar="DIR", help="write the operator log there, a file for each process")
    parser.add_argument("--order", metavar="DIR", help="write the order record there, for fluid-npu check-order")
    parser.add_argument("--allow-fallback", action="store_true", help="let torch_npu's fall-backs to the host pass")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments")
    parser.set_defaults(func=_guarded(_exec))


def _guarded(action: Any) -> Any:
    """A SimError is one message and exit code 2."""

    def run(args: argparse.Namespace) -> int:
        try:
            code: int = action(args)
            return code
        except SimError as error:
            print(f"fluid-npu sim: {error}", file=sys.stderr)
            return _USAGE

    return run


def _exec(args: argparse.Namespace) -> int:
    from fluid_npu.sim.execute import execute, settings

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    names = ("soc", "devices", "hbm_mb", "delay_seed", "delay_us", "log", "order", "allow_fallback")
    execute(words, settings(**{name: getattr(args, name) for name in names}))
    return 0


def _build(args: argparse.Namespace) -> int:
    from fluid_npu.sim.build import build

    print(build(force=args.force))
    return 0


def _info(args: argparse.Namespace) -> int:
    from fluid_npu.sim.info import describe

    facts = describe()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return 0
