"""The result of ``bench block`` as tables and a verdict. Standard library only."""

from __future__ import annotations

from typing import Any

from fluid_npu.bench.output import machine_text, number, table

Row = dict[str, Any]


def block_text(result: Row) -> str:
    """Times, AllToAlls, machine, versions and verdict."""
    head = ("pass", "impl", "median ms", "p10", "p90", "first/this (95 %)")
    parts = [table(head, [_line(row) for row in result["rows"]]), ""]
    if result["exchanges"]:
        names = ("impl", "AllToAll", "MiB", "alone ms", "transfer", "exposed", "hidden ms", "coverable")
        parts += [table(names, [_exchange(row) for row in result["exchanges"]]), ""]
    parts.append(machine_text(result))
    cut = "".join(f" --{name.replace('_', '-')} {value}" for name, value in result["cut"].items())
    rounds = sorted({row["rounds"] for row in result["rows"]})
    parts.append(
        f"transformer layers of {result['preset']}{cut}, activation: {result['activation']}, cp {result['cp']}, ep "
        f"{result['ep']}, {result['dtype']}; rounds: {', '.join(map(str, rounds))}, interleaved; slowest rank; "
        "iteration: gradients cleared before and reduced after; an AllToAll's figures: mean over ranks, medians"
    )
    if result["link"]:
        parts.append(f"link: {result['link']['rate']}, {result['link']['description']}")
    parts += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    worst = max((entry["error"] for entry in result["agreement"].values()), default=0.0)
    parts.append(
        f"checked before timing: output and summed gradients agree with {result['reference']} within {worst:.1e}"
    )
    if not result["complete"]:
        parts.append("NOT COMPLETE: the run was cut off")
    return "\n".join([*parts, "", *block_verdict(result)])


def block_verdict(result: Row) -> list[str]:
    """The fastest of each pass, what the twins show, whether they have the same bits."""
    sentences = []
    for name in dict.fromkeys(row["pass"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["pass"] == name]
        noisy = [row["impl"] for row in rows if not row["judged"]]
        if noisy:
            sentences.append(f"{name}: too noisy to judge: {', '.join(noisy)}.")
        best = min((row for row in rows if row["judged"]), key=lambda row: row["median_ms"], default=None)
        if best is not None:
            sentences.append(f"{name}: fastest of those judged is {best['impl']}, {best['median_ms']:.2f} ms.")
    for row in result["twins"]:
        gain, spread = row["hidden_ms"], row["hidden_spread_ms"]
        sentences.append(
            f"{row['impl']}: its serialised twin takes {row['twin_median_ms']:.2f} ms, it takes "
            f"{row['overlapped_median_ms']:.2f} ms: {gain:+.2f} ms +-{spread:.2f} hidden"
            f"{'' if row['judged'] else ' (NOISY)'}."
        )
    for name, entry in result["agreement"].items():
        if "twin_differs_in" in entry:
            differs = entry["twin_differs_in"]
            text = f"is NOT bitwise equal to it in {', '.join(differs)}" if differs else "is bitwise equal to it"
            sentences.append(f"{name} {text} (its twin).")
    return sentences


def _line(row: Row) -> tuple[str, ...]:
    low, high = (row[f"ratio_first_over_this_{end}"] for end in ("low", "high"))
    return (
        row["pass"],
        row["impl"] + ("" if row["judged"] else " (NOISY)"),
        *(number(row[name]) for name in ("median_ms", "p10_ms", "p90_ms")),
        f"{row['ratio_first_over_this']:.3f} ({low:.3f} to {high:.3f})",
    )


def _exchange(row: Row) -> tuple[str, ...]:
    figures = (row[name] for name in ("alone_ms", "transfer_ms", "exposed_ms"))
    hidden = "-" if row["hidden_ms"] is None else f"{row['hidden_ms']:+.2f} +-{row['hidden_spread_ms']:.2f}"
    return (
        row["impl"],
        row["a2a"],
        f"{row['bytes'] / 2**20:.2f}",
        *map(number, figures),
        hidden,
        number(row["coverable_ms"]),
    )
