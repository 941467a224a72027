"""Results as text for people: a table, where it was measured, and a verdict in plain words. Standard library only."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first two are words, the others figures."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *lines]
    )


def train_step_text(result: Row) -> str:
    """Table, machine, versions, repeats and verdict of ``bench train-step``."""
    head = (
        "case",
        "impl",
        "median ms",
        "p10",
        "p90",
        "peak MiB",
        "a2a ms",
        "hidden ms",
        "fraction",
        "stock/this (95 %)",
    )
    parts = [table(head, [_train_step_line(row) for row in result["rows"]]), "", machine_text(result)]
    cases = dict.fromkeys(row["case"] for row in result["rows"])
    rounds = {case: next(row["rounds"] for row in result["rows"] if row["case"] == case) for case in cases}
    parts.append("rounds: " + ", ".join(f"{case} {n}" for case, n in rounds.items()) + "; paired, rotating order")
    worst = max((entry["error"] for case in result["agreement"].values() for entry in case.values()), default=0.0)
    parts.append(f"checked before timing: losses and gradients agree with stock within {worst:.1e}, twin bitwise equal")
    parts += ["", *train_step_verdict(result)]
    return "\n".join(parts)


def train_step_verdict(result: Row) -> list[str]:
    """Per case: whether ours is faster, needs more memory, and whether overlap pays."""
    sentences = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = {row["impl"]: row for row in result["rows"] if row["case"] == case}
        stock, plain, overlapped = (
            rows[f"{name}"] for name in ("stock SequentialMLP", "ours plain", "ours overlapped")
        )
        sentences.append(f"{case}: {_speed(plain)} {_memory(stock, plain, overlapped)} {_overlap(overlapped)}")
    delay = result["planted_delay_ms"]
    if delay:
        sentences.append(
            f"Every AllToAll of ours was delayed by {delay:g} ms; stock's was not, so they are not compared."
        )
    elif any(
        (row["hidden_ms"] or 0.0) <= (row["hidden_spread_ms"] or 0.0) for row in result["rows"] if _is_overlapped(row)
    ):
        where = "this machine's loopback, where the copy itself is CPU work" if _on_cpu(result) else "this machine"
        sentences.append(
            f"Where overlap does not pay on {where}, train --overlap auto runs plain; "
            "'fluid-npu bench overlap --link 1gbit' shows it on a network that takes time."
        )
    return sentences


def parity_text(result: Row) -> str:
    """Table and verdict of ``parity``."""
    head = ("impl against stock", "worst gradient", "loss", "gradient", "weight", "rerouted", "verdict")
    lines = [
        (
            row["impl"],
            row["gradient_where"],
            f"{row['loss_error']:.1e}",
            f"{row['gradient_error']:.1e}",
            f"{row['weight_error']:.1e}",
            str(row["tokens_rerouted"]),
            "ok" if row["passed"] else "FAILED",
        )
        for row in result["rows"]
    ]
    cut = "".join(f" --{name.replace('_', '-')} {value}" for name, value in result["cut"].items())
    title = (
        f"{result['preset']}{cut}, {result['steps']} SGD steps, {result['dtype']}, ep {result['ep']}; "
        f"relative Frobenius errors, allowed {result['tolerance']:.0e}"
    )
    return "\n".join([title, "", table(head, lines), "", machine_text(result), "", *parity_verdict(result)])


def parity_verdict(result: Row) -> list[str]:
    """What held and what did not."""
    sentences = []
    rerouted = [row for row in result["rows"] if row["tokens_rerouted"]]
    for row in rerouted:
        sentences.append(
            f"{row['impl']}: {row['tokens_rerouted']} tokens went to other experts than in stock; their router logits "
            f"lay within {row['reroute_margin']:.1e}. A margin near rounding is a tie: try another --seed."
        )
    if not rerouted:
        sentences.append("Routing: every token went to the same experts in all variants, in every step.")
    for row in result["rows"]:
        if row["twin_equal"]:
            sentences.append(f"{row['impl']} is bitwise equal to its serialised twin: loss, gradients and weights.")
        elif row["twin_equal"] is False:
            sentences.append(
                f"{row['impl']} is NOT equal to its serialised twin in {', '.join(row['twin_differs_in'])}."
            )
    sentences.append("Parity holds." if result["passed"] else "PARITY DOES NOT HOLD.")
    return sentences


def machine_text(result: Row) -> str:
    """Two lines: machine and versions."""
    m = result["machine"]
    end = f" to {m['load_average_end']}" if m.get("load_average_end") is not None else ""
    load = f", load average {m['load_average']}{end}" if m["load_average"] is not None else ""
    busy = m["load_average"] is not None and m["load_average"] > m["cores"]
    settings = "".join(f" {name}={value}" for name, value in m["settings"].items())
    return (
        f"machine: {m['description']}; {m['nproc']} ranks of {m['threads_per_rank']} thread(s), {m['backend']}{load}"
        f"{' (BUSY: the figures are disturbed)' if busy else ''};{settings}\n"
        f"versions: {', '.join(f'{name} {value}' for name, value in result['versions'].items())}"
    )


def write_files(result: Row, text: str, csv_path: str | None, out: str | None, name: str) -> None:
    """``--csv`` and ``--out DIR`` (NAME.json and NAME.txt). Raises OSError."""
    if csv_path:
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(result["rows"][0]))
            writer.writeheader()
            writer.writerows(result["rows"])
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / f"{name}.txt").write_text(f"$ {result['command']}\n\n{text}\n", encoding="utf-8")


def show(result: Row, text: str, *, as_json: bool) -> None:
    """One JSON object or the text on standard output."""
    print(json.dumps(result) if as_json else text)
    sys.stdout.flush()


def _train_step_line(row: Row) -> tuple[str, ...]:
    ratio = "-"
    if row["ratio_stock_over_this"] is not None:
        low, high = row["ratio_stock_over_this_low"], row["ratio_stock_over_this_high"]
        ratio = f"{row['ratio_stock_over_this']:.3f} ({low:.3f} to {high:.3f})"
    hidden = number(row["hidden_ms"])
    if row["hidden_spread_ms"] is not None:
        hidden += f" +-{row['hidden_spread_ms']:.2f}"
    figures = (row[name] for name in ("median_ms", "p10_ms", "p90_ms", "peak_memory_mb", "a2a_ms"))
    return (row["case"], row["impl"], *map(number, figures), hidden, number(row["hidden_fraction"]), ratio)


def number(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def _speed(row: Row) -> str:
    ratio, low, high = (row[f"ratio_stock_over_this{end}"] for end in ("", "_low", "_high"))
    if ratio is None:
        return ""
    if low > 1.0:
        return f"ours plain is faster than stock, {ratio:.2f} times ({low:.2f} to {high:.2f})."
    if high < 1.0:
        return f"ours plain is SLOWER than stock: stock/ours is {ratio:.2f} ({low:.2f} to {high:.2f})."
    return f"no difference in speed from stock can be told: {low:.2f} to {high:.2f}."


def _memory(stock: Row, plain: Row, overlapped: Row) -> str:
    base = stock["peak_memory_mb"]
    ours = [(name, row["peak_memory_mb"] / base - 1.0) for name, row in (("plain", plain), ("overlapped", overlapped))]
    return f"Memory against stock: {', '.join(f'{name} {100 * more:+.1f} %' for name, more in ours)}."


def _overlap(row: Row) -> str:
    gain, spread = row["hidden_ms"], row["hidden_spread_ms"]
    fraction = "" if row["hidden_fraction"] is None else f", {100 * row['hidden_fraction']:.0f} % of what dW can cover"
    if gain > spread:
        return f"Overlap hides {gain:.2f} ms +-{spread:.2f}{fraction}."
    if gain < -spread:
        return f"Overlap costs {-gain:.2f} ms +-{spread:.2f} here."
    return f"Overlap makes no difference here ({gain:+.2f} ms +-{spread:.2f})."


def _is_overlapped(row: Row) -> bool:
    return bool(row["impl"] == "ours overlapped")


def _on_cpu(result: Row) -> bool:
    return bool(result["machine"]["device"] == "cpu")
