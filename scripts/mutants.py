"""Mutation check of the engine's order: which small changes of its waits, events and queues are noticed, and by what.

    python scripts/mutants.py list
    python scripts/mutants.py run [--only TEXT] [--out FILE]

Each mutant runs overlapped schedules on two ranks over gloo (tests/support/mutant_case.py). It is *reported by the
checker* (fluid_npu.order) or *by a value* (a loss, a gradient, the order of the queue, a statistic, an error), or it
*survives*: then the checker has a fault, or the engine a wait that it does not need. Exit code 1: one survived.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.mutation import LEFT_OUT, Mutant, all_mutants  # noqa: E402

#: Seconds for one run; a mutant that makes a rank wait for ever is noticed by it.
TIMEOUT = 60.0
#: Events of an accelerator: nothing on a CPU calls them. tests/order/test_on_the_simulator.py runs these.
ON_NPU = "fluid_npu/device/base.py"


@dataclass(frozen=True)
class Verdict:
    """What happened to a mutant: ``by`` is "checker", "value" or "" for a survivor."""

    mutant: Mutant
    by: str
    why: str


def baseline() -> list[dict[str, Any]]:
    """What the unchanged engine gives on each rank. Raises RuntimeError when its record is not clean."""
    first, again = _results(None), _results(None)
    report = _report([entries for _, entries in first])
    if report.findings:
        raise RuntimeError("the unchanged engine is not clean:\n" + "\n".join(map(str, report.findings)))
    if [values for values, _ in first] != [values for values, _ in again]:
        raise RuntimeError(f"two runs of the unchanged engine differ: {_differences(first, [v for v, _ in again])}")
    return [values for values, _ in first]


def judge(mutant: Mutant, expected: list[dict[str, Any]]) -> Verdict:
    """Runs one mutant."""
    from tests.support.ranks import RankError

    try:
        results = _results(mutant)
    except RankError as error:
        return Verdict(mutant, "value", _last_line(str(error)))
    report = _report([entries for _, entries in results])
    if report.findings:
        finding = report.findings[0]
        return Verdict(mutant, "checker", f"{finding.kind}: {finding.second.name} after {finding.first.name}")
    different = _differences(results, expected)
    return Verdict(mutant, "value" if different else "", different)


def _results(mutant: Mutant | None) -> list[tuple[dict[str, Any], list[Any]]]:
    from tests.support import mutant_case
    from tests.support.ranks import run_ranks

    return run_ranks(2, mutant_case.run, mutant, timeout=TIMEOUT)


def _report(records: list[list[Any]]) -> Any:
    from fluid_npu.order.checker import check
    from fluid_npu.order.records import numbered

    return check({rank: numbered(entries, rank) for rank, entries in enumerate(records)})


def _differences(results: list[tuple[dict[str, Any], list[Any]]], expected: list[dict[str, Any]]) -> str:
    for rank, (values, _) in enumerate(results):
        names = [name for name in expected[rank] if values.get(name) != expected[rank][name]]
        if names:
            return f"rank {rank}, {', '.join(names[:3])}"
    return ""


def _last_line(text: str) -> str:
    """The exception of the rank that failed first."""
    if "no answer" in text.partition("\n")[0]:
        return "a rank waits for ever"
    lines = [line for line in text.partition("\n--- ")[0].splitlines() if line and not line.startswith(" ")]
    return lines[-1][:110] if lines else "no answer"


def run(mutants: list[Mutant], out: Any) -> int:
    """Judges the mutants and prints a table; the number of survivors."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    say = lambda text: (print(text, flush=True), print(text, file=out, flush=True) if out else None)
    say(f"python scripts/mutants.py run, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {commit.stdout.strip()}")
    expected, counts, survivors = baseline(), Counter(), []
    for number, mutant in enumerate(mutants, 1):
        verdict = judge(mutant, expected)
        counts[verdict.by or "survived"] += 1
        say(f"{number:3} {verdict.by or 'SURVIVED':8} {mutant}\n             {verdict.why}")
        survivors += [] if verdict.by else [mutant]
    say(f"{len(mutants)} mutants: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return len(survivors)


def chosen(text: str) -> list[Mutant]:
    """The mutants whose line contains the text, without those that need an accelerator."""
    return [mutant for mutant in all_mutants() if text in str(mutant) and mutant.path != ON_NPU]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "run"])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose line contains the text")
    parser.add_argument("--out", metavar="FILE", help="append the table to this file too")
    args = parser.parse_args()
    if args.action == "list":
        for mutant in all_mutants():
            print(mutant)
        for path, why in LEFT_OUT.items():
            print(f"left out: {path}, {why}")
        return 0
    if not chosen(args.only):
        parser.error(f"--only {args.only!r}: no mutant's line contains it; see `python scripts/mutants.py list`")
    with open(args.out, "a", encoding="utf-8") if args.out else open("/dev/null", "w") as out:
        return 1 if run(chosen(args.only), out if args.out else None) else 0


if __name__ == "__main__":
    sys.exit(main())
