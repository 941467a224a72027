"""``fluid-npu``: the command line. Sub-commands register themselves; only the chosen one imports torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fluid_npu.train import exit_codes
from fluid_npu.version import __version__

# Module and the function that takes the sub-parsers.
_COMMANDS = (
    ("fluid_npu.train.cli", "add_train_parser"),
    ("fluid_npu.train.data.cli", "add_data_parser"),
    ("fluid_npu.train.presets_cli", "add_presets_parser"),
    ("fluid_npu.bench.cli", "add_parity_parser"),
    ("fluid_npu.bench.cli", "add_bench_parser"),
    ("fluid_npu.bench.tune_cli", "add_tune_parser"),
    ("fluid_npu.doctor.cli", "add_doctor_parser"),
    ("fluid_npu.megatron_lm.cli", "add_megatron_lm_parser"),
    ("fluid_npu.cluster.cli", "add_cluster_parser"),
    ("fluid_npu.sim.cli", "add_sim_parser"),
    ("fluid_npu.order.cli", "add_check_order_parser"),
    ("fluid_npu.report.cli", "add_report_parser"),
)


class _StrictParser(argparse.ArgumentParser):
    """A sub-command that accepts no shortened flags: ``--step`` is a typing error, not ``--steps``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="fluid-npu",
        description="Trains Mixture-of-Experts models on Megatron-Core with their AllToAll hidden behind computation.",
        epilog=exit_codes.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fluid-npu {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_StrictParser)
    for module, function in _COMMANDS:
        getattr(import_module(module), function)(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.func(args)
    except KeyboardInterrupt:
        print("fluid-npu: interrupted", file=sys.stderr)
        return exit_codes.interrupted()
    return code
