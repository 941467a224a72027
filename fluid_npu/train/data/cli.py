"""`fluid-npu data build` and `fluid-npu data info`. Exit codes: 0 ok, 2 bad usage, 3 bad data."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fluid_npu.train.data.errors import DataError
from fluid_npu.train.data.tokenizer import DEFAULT_VOCAB, LEAST_VOCAB


def add_data_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register `data`; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="build and check training data",
        description="Turns text into a tokenizer and a Megatron IndexedDataset, and checks such data sets.",
    )
    parser.set_defaults(func=lambda args: _usage(parser))
    actions = parser.add_subparsers(metavar="ACTION")

    build = actions.add_parser("build", help="tokenize text into PREFIX.bin, .idx, .tokenizer.json, .meta.json")
    build.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="text files and directories (default: the Python standard library's sources and documentation)",
    )
    build.add_argument("--out", required=True, metavar="PREFIX", help="where to write, without a suffix")
    build.add_argument(
        "--vocab-size", type=int, default=DEFAULT_VOCAB, metavar="N", help="tokens (default: %(default)s)"
    )
    build.add_argument("--json", action="store_true", help="print JSON for machines")
    build.set_defaults(func=run_build)

    info = actions.add_parser("info", help="check a data set and describe it")
    info.add_argument("prefix", metavar="PREFIX")
    info.add_argument("--json", action="store_true", help="print JSON for machines")
    info.set_defaults(func=run_info)
    return parser


def run_build(args: argparse.Namespace) -> int:
    """Build a data set and describe it."""
    if args.vocab_size < LEAST_VOCAB:
        print(
            f"fluid-npu data build: --vocab-size {args.vocab_size}: must be at least {LEAST_VOCAB} "
            "(256 bytes and two special tokens)",
            file=sys.stderr,
        )
        return 2
    from fluid_npu.train.data.build import build, build_default

    try:
        if args.input:
            described = build(args.input, args.out, args.vocab_size)
        else:
            described = build_default(args.out, args.vocab_size)
    except DataError as error:
        return _bad_data("build", error)
    _show(args, described)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Check a data set and describe it."""
    from fluid_npu.train.data.build import info

    try:
        described = info(args.prefix)
    except DataError as error:
        return _bad_data("info", error)
    _show(args, described)
    return 0


def _show(args: argparse.Namespace, described: Any) -> None:
    prefix = getattr(args, "prefix", None) or args.out
    if args.json:
        print(json.dumps({"prefix": prefix, **described.as_dict()}, indent=2))
        return
    print(f"{prefix}: {described.source}")
    print(f"  {described.documents:,} documents, {described.text_bytes:,} bytes of text")
    print(f"  {described.tokens:,} tokens of a vocabulary of {described.vocab_size:,}")
    print(f"  unigram entropy {described.unigram_entropy:.3f} nats per token")
    if described.skipped_files:
        print(f"  {described.skipped_files} files were left out: not UTF-8 text")
    print("  sizes and sha256 of all files are right")


def _bad_data(action: str, error: DataError) -> int:
    print(f"fluid-npu data {action}: {error}", file=sys.stderr)
    return 3


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2
