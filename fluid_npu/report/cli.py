"""``fluid-npu report``: results as one page, plots, traces and markdown. Imports no plotting before it runs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

_OK, _FAILED, _USAGE, _DATA = 0, 1, 2, 3  # as train.exit_codes, which stands above this package


def add_report_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``report``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="one HTML page, PNG plots and traces from any set of results",
        description="Reads bench results (*.json), training runs (metrics.jsonl, summary.json) and order records below "
        "the paths. Writes OUT/report.html, which needs no other file and no network, OUT/plots/*.png and "
        "OUT/traces/*.trace.json for Perfetto or chrome://tracing. Files that it cannot show are named.",
    )
    parser.add_argument("paths", nargs="+", metavar="DIR", help="folders or files with results")
    parser.add_argument("--out", metavar="DIR", help="where the report is written (made if it is not there)")
    parser.add_argument("--title", default="", metavar="TEXT", help="heading of the page")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown; without --out no page")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON object")
    parser.set_defaults(func=run_report)
    return parser


def run_report(args: argparse.Namespace) -> int:
    """Writes the report; 2 for paths that are not there, 3 where nothing could be read."""
    if not args.out and not args.markdown:
        return _fail("--out is missing: give the folder for the page, or --markdown for tables alone", _USAGE)
    if args.json and args.markdown:
        return _fail("--json and --markdown both print on standard output; give one of them", _USAGE)
    try:
        if args.markdown:
            code = _print_markdown(args.paths)
            if code != _OK or not args.out:
                return code
        return _write(args)
    except FileNotFoundError as error:
        return _fail(f"DIR {error}: not there; give folders or files with results", _USAGE)
    except ImportError as error:
        return _fail(str(error), _FAILED)
    except OSError as error:
        return _fail(f"--out {args.out}: cannot be written ({error.strerror or error})", _FAILED)


def _write(args: argparse.Namespace) -> int:
    from fluid_npu.report.build import write_report

    written = write_report(args.paths, args.out, args.title)
    _name_unread(written.unread)
    if written.page is None:
        return _fail("no result in the paths; run a bench with --out or a training first", _DATA)
    if args.json:
        print(json.dumps(asdict(written), default=str))
    elif not args.markdown:
        print("\n".join(f"{number:3}. {name}" for number, name in enumerate(written.results, 1)))
        print(f"{written.page}: {len(written.plots)} plot(s), {len(written.traces)} trace(s)")
    if written.missing:
        print(f"fluid-npu report: {written.missing}", file=sys.stderr)
    return _OK


def _print_markdown(paths: list[str]) -> int:
    from fluid_npu.report.build import markdown_of

    text, unread = markdown_of(paths)
    _name_unread(unread)
    if not text:
        return _fail("no result in the paths; run a bench with --out or a training first", _DATA)
    print(text)
    return _OK


def _name_unread(unread: list[Any]) -> None:
    for one in unread:
        print(f"fluid-npu report: not shown: {one.path}: {one.reason}", file=sys.stderr)


def _fail(reason: str, code: int) -> int:
    print(f"fluid-npu report: {reason}", file=sys.stderr, flush=True)
    return code
