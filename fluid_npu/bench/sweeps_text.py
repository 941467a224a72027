"""The results of both sweeps as a table beside the published one, and the advice. Standard library only."""

from __future__ import annotations

from typing import Any

from fluid_npu.bench.output import machine_text, number, table

Row = dict[str, Any]


def sweep_text(result: Row) -> str:
    """Table, machine, versions and verdict."""
    key = key_of(result)
    head = (
        key,
        "H x F, experts, rows",
        "baseline ms",
        "grouped ms",
        "gain (95 %)",
        "published",
        "",
        "gain",
        "by its times",
    )
    parts = [table(head, [_line(row, key) for row in result["rows"]]), "", machine_text(result)]
    parts.append(
        f"forward and backward of one rank's experts into main_grad, {result['dtype']}; rounds: "
        f"{result['rows'][0]['rounds']}, interleaved; medians of the slowest rank; gain = baseline / grouped - 1, "
        "median of the paired rounds"
    )
    parts.append(
        "baseline: a loop over experts (Megatron's SequentialMLP); published: MindSpeed, times in a unit it does not "
        "state, of whole training; * its printed gain does not follow from its times"
    )
    if result["scaled_down"]:
        scale = result["rows"][0]["shape"]["scale"]
        parts.append(
            f"SCALED DOWN for a CPU: hidden / {scale[0]}, ffn / {scale[1]}, rows / {scale[2]}; not comparable in size"
        )
    error = result["agreement"]["grouped"]["error"]
    parts.append(f"checked before timing: outputs and gradients agree with the loop within {error:.1e}")
    return "\n".join([*parts, "", *sweep_verdict(result)])


def sweep_verdict(result: Row) -> list[str]:
    """Where grouping wins and loses, and what to set."""
    key = key_of(result)
    noisy = [row[key] for row in result["rows"] if not row["judged"]]
    judged = [row for row in result["rows"] if row["judged"]]
    names = {
        "wins": [row[key] for row in judged if row["gain_low"] > 0],
        "loses": [row[key] for row in judged if row["gain_high"] < 0],
        "makes no difference": [row[key] for row in judged if row["gain_low"] <= 0 <= row["gain_high"]],
    }
    sentences = [f"Grouping {verb} at {key} {_listed(found)}." for verb, found in names.items() if found]
    if noisy:
        sentences.append(
            f"Too noisy to judge at {key} {_listed(noisy)}: the medians of two halves of the rounds differ by 10 % "
            "or more."
        )
    return [*sentences, result["advice"]]


def advice(result: Row) -> str:
    """One sentence on what to do on this machine."""
    loses, key = result["loses_from"], key_of(result)
    if not any(row["judged"] for row in result["rows"]):
        return "Advice: none; measure again on a quiet machine."
    if loses is None:
        which = "swept point" if result["judged"] else "point that could be judged"
        return f"Advice: use grouped experts (--moe-grouped-gemm) throughout; no {which} loses."
    word = "from" if key == "ffn" else "at"
    return (
        f"Advice: grouping starts to lose {word} {key} {loses}; use a loop over experts there (leave "
        "--moe-grouped-gemm out) and grouped experts elsewhere."
    )


def key_of(result: Row) -> str:
    """'ffn' or 'config'."""
    return "ffn" if result["bench"] == "ffn-sweep" else "config"


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _line(row: Row, key: str) -> tuple[str, ...]:
    shape, known = row["shape"], row["published"]
    noisy = "" if row["judged"] else " NOISY"
    ours = (
        str(row[key]),
        f"{shape['hidden']} x {shape['ffn']}, {shape['local_experts']}, {shape['rows']}",
        number(row["baseline_ms"]),
        number(row["grouped_ms"]),
        f"{_percent(row['gain'])} ({_percent(row['gain_low'])} to {_percent(row['gain_high'])}){noisy}",
    )
    if known is None:
        return (*ours, "-", "-", "-", "-")
    star = "*" if known["wrong"] else ""
    return (
        *ours,
        f"{known['baseline']:g}",
        f"{known['grouped']:g}",
        f"{_percent(known['gain_printed'])}{star}",
        _percent(known["gain_computed"]),
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.2f} %"
