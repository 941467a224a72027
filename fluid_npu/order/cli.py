"""``fluid-npu check-order DIR``: checks the records of a job."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_FOUND, _USAGE = 1, 2


def add_check_order_parser(subparsers: Any) -> None:
    """Adds the command to the parser of ``fluid-npu``."""
    parser = subparsers.add_parser(
        "check-order",
        help="check a job's order record: buffers read, overwritten or freed too early, collectives out of order",
        description="Checks the order records (*.jsonl, one a rank) of one run. Exit code 1: found something.",
    )
    parser.add_argument("folder", metavar="DIR", help="where the records are")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--redundant", action="store_true", help="list waits that added no order in this run as well")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace with a lane for each stream there")
    parser.set_defaults(func=_check_order)


def _check_order(args: argparse.Namespace) -> int:
    from fluid_npu.order.checker import check
    from fluid_npu.order.records import RecordError, read_folder

    folder = Path(args.folder)
    try:
        if not folder.is_dir():
            raise RecordError(f"DIR {args.folder!r} is no folder; give the one that the records were written to")
        ranks = read_folder(folder)
    except RecordError as error:
        print(f"fluid-npu check-order: {error}", file=sys.stderr)
        return _USAGE
    if args.trace:
        _write_trace(Path(args.trace), folder)
    report = check(ranks)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
        return _FOUND if report.findings else 0
    for finding in report.findings:
        print(finding, end="\n\n")
    if args.redundant:
        for line in report.redundant:
            print(f"adds no order: {line}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    print(f"{len(report.findings)} finding(s) in the records of {len(ranks)} rank(s): {counts}")
    return _FOUND if report.findings else 0


def _write_trace(path: Path, folder: Path) -> None:
    """The same file as the report's: a process for each rank, a lane for each stream."""
    from fluid_npu.report.sources import collect
    from fluid_npu.report.spans import spans_of
    from fluid_npu.report.trace import chrome_trace

    spans = [span for one in collect([folder]).sources if one.kind == "order" for span in spans_of(one)["order"]]
    path.write_text(json.dumps(chrome_trace(spans, folder.name)), encoding="utf-8")
