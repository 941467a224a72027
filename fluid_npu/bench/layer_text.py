"""The result of ``bench layer`` as tables and a verdict. Standard library only."""

from __future__ import annotations

from typing import Any

from fluid_npu.bench.output import machine_text, number, table

Row = dict[str, Any]
_PARTS = ("attention", "norms", "linear", "a2a", "experts", "router_permute", "grad_accumulation", "idle", "rest")


def layer_text(result: Row) -> str:
    """Times, parts, machine, versions and verdict."""
    head = ("pass", "impl", "median ms", "p10", "p90", "floor ms", "first/this (95 %)", "held MiB", "peak MiB")
    parts = [table(head, [_line(row) for row in result["rows"]]), ""]
    names = ("pass", "impl", *(name.replace("_", " ") for name in _PARTS), "sum", "of layer")
    parts += [table(names, [_part_line(row) for row in result["rows"]]), ""]
    if result["levers"]:
        levers = ("pass", "lever", "saves ms (95 %)", "held MiB", "from", "to")
        parts += [table(levers, [_lever_line(row) for row in result["levers"]]), ""]
    parts.append(machine_text(result))
    cut = "".join(f" --{name.replace('_', '-')} {value}" for name, value in result["cut"].items())
    parts.append(
        f"{result['part']} layer of {result['preset']}{cut}, {result['dtype']}, workload {result['workload']}; rounds: "
        f"{result['rows'][0]['rounds']}, interleaved; slowest rank; floor: each AllToAll a local slice; held: alive "
        "after forward for backward, and what a recorded layer keeps for itself; parts: from steps of their own"
    )
    parts += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    worst = max((entry["error"] for entry in result["agreement"].values()), default=0.0)
    parts.append(f"checked before timing: output and gradients agree with stock SequentialMLP within {worst:.1e}")
    return "\n".join([*parts, "", *layer_verdict(result)])


def layer_verdict(result: Row) -> list[str]:
    """The fastest, what hiding could still give, and what could not be judged."""
    sentences = []
    for name in dict.fromkeys(row["pass"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["pass"] == name]
        noisy = [row["impl"] for row in rows if not row["judged"]]
        judged = [row for row in rows if row["judged"]]
        if noisy:
            sentences.append(
                f"{name}: too noisy to judge: {', '.join(noisy)}; the medians of two halves of the rounds differ by "
                "10 % or more."
            )
        if judged:
            best = min(judged, key=lambda row: row["median_ms"])
            left = best["median_ms"] - best["floor_ms"]
            sentences.append(
                f"{name}: fastest of those judged is {best['impl']}, {best['median_ms']:.2f} ms; without AllToAlls it "
                f"takes {best['floor_ms']:.2f} ms, so hiding them all would save {left:.2f} ms more."
            )
    for row in result["rows"]:
        if not row["parts_agree"]:
            sentences.append(
                f"{row['pass']}, {row['impl']}: the parts sum to {row['parts_ms']:.2f} ms, the layer takes "
                f"{row['median_ms']:.2f} ms: more than 5 % apart."
            )
    return sentences


def _line(row: Row) -> tuple[str, ...]:
    low, high = (row[f"ratio_baseline_over_this_{end}"] for end in ("low", "high"))
    return (
        row["pass"],
        row["impl"] + ("" if row["judged"] else " (NOISY)"),
        *(number(row[name]) for name in ("median_ms", "p10_ms", "p90_ms", "floor_ms")),
        f"{row['ratio_baseline_over_this']:.3f} ({low:.3f} to {high:.3f})",
        number(row["activation_memory_mb"]),
        number(row["peak_memory_mb"]),
    )


def _lever_line(row: Row) -> tuple[str, ...]:
    saved, low, high = (row[f"saved{end}_ms"] for end in ("", "_low", "_high"))
    return (
        row["pass"],
        row["lever"] + ("" if row["judged"] else " (NOISY)"),
        f"{saved:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{row['held_mb']:+.1f}",
        row["without"],
        row["with"],
    )


def _part_line(row: Row) -> tuple[str, ...]:
    figures = (number(row["parts"][name]) for name in _PARTS)
    return (
        row["pass"],
        row["impl"],
        *figures,
        number(row["parts_ms"]),
        f"{100 * row['parts_ms'] / row['median_ms']:.0f} %",
    )
