"""The result of ``bench overlap`` as tables and a verdict. Standard library only."""

from __future__ import annotations

from typing import Any

from fluid_npu.bench.output import machine_text, number, table
from fluid_npu.report.summary_text import legs_text

Row = dict[str, Any]


def overlap_text(result: Row) -> str:
    """Both tables, machine, versions and verdict."""
    steps = (
        "",
        "workload",
        "plain ms",
        "twin ms",
        "overlapped",
        "hidden ms",
        "fraction",
        "sum of AllToAlls",
        "extra MiB",
    )
    parts = [table(steps, [_step_line(row) for row in result["steps"]])]
    head = (
        "",
        "AllToAll",
        "KiB",
        "alone ms",
        "transfer",
        "peer wait",
        "exposed",
        "hidden ms",
        "coverable",
        "beside it",
    )
    parts += ["", table(head, [_line(row) for row in result["rows"]]), "", machine_text(result)]
    cut = "".join(f" --{name.replace('_', '-')} {value}" for name, value in result["cut"].items())
    rounds = sorted({row["rounds"] for row in result["steps"]})
    parts.append(
        f"{result['preset']}{cut}, {result['dtype']}; forward and backward into main_grad, not reduced; rounds: "
        f"{', '.join(map(str, rounds))}, interleaved; times of a step: slowest rank, of an AllToAll: mean over ranks; "
        "medians"
    )
    parts += [_fewer_bytes(row) for row in result["steps"] if row.get("a2a_plain_bytes", 0) != row.get("a2a_bytes", 0)]
    if result["link"]:
        parts.append(f"link: {result['link']['rate']}, {result['link']['description']}")
    worst = max((entry["error"] for entry in result["agreement"].values()), default=0.0)
    parts.append(f"checked before timing: loss and gradients agree with stock within {worst:.1e}, twin bitwise equal")
    return "\n".join([*parts, "", *overlap_verdict(result)])


def _fewer_bytes(row: Row) -> str:
    sent, plain = row["a2a_bytes"], row["a2a_plain_bytes"]
    text = f"{row['workload']}: {sent / 2**20:.2f} MiB per step and rank to other ranks"
    text += f"; a row for every (token, expert) would be {plain / 2**20:.2f} MiB, {plain / sent:.2f} times as much"
    return text + legs_text(row)


def overlap_verdict(result: Row) -> list[str]:
    """What pays and what to turn off here."""
    sentences = [_judge(row) for row in result["steps"]]
    if result["planted_delay_ms"]:
        sentences.append(f"Every AllToAll was delayed by {result['planted_delay_ms']:g} ms.")
    judged = [row for row in result["steps"] if row["judged"]]
    pays = [row for row in judged if row["advice"] != "off"]
    if judged and not pays:
        noisy = "" if len(judged) == len(result["steps"]) else " that could be judged"
        sentences.append(f"Nothing{noisy} pays here: use --overlap off (train --overlap auto decides by itself).")
    elif pays:
        names = ", ".join(row["workload"] for row in pays)
        sentences.append(f"Overlap pays under {names}: use --overlap {pays[0]['advice']}.")
    return sentences + _uncovered(result)


def _judge(row: Row) -> str:
    title = f"{row['workload']} {row['description']}"
    if not row["judged"]:
        return f"{title}: too noisy to judge: the medians of two halves of the rounds differ by 10 % or more."
    gain, spread = row["hidden_ms"], row["hidden_spread_ms"]
    fraction = row["hidden_fraction"]
    share = "" if fraction is None else f", {100 * fraction:.0f} % of what can be covered"
    adds_up = "" if row["agrees"] else f" The AllToAlls' own figures sum to {row['a2a_hidden_ms']:.2f} ms, not to that."
    if gain > spread:
        return f"{title}: overlap hides {gain:.2f} ms +-{spread:.2f}{share}.{adds_up}"
    if gain < -spread:
        return f"{title}: overlap COSTS {-gain:.2f} ms +-{spread:.2f}; turn it off.{adds_up}"
    return f"{title}: no difference ({gain:+.2f} ms +-{spread:.2f}); off needs no extra memory.{adds_up}"


def _uncovered(result: Row) -> list[str]:
    """The exposed AllToAll with nothing beside it that takes longest, and what may help."""
    bare = [row for row in result["rows"] if not row["beside"]]
    if not bare:
        return []
    worst = max(bare, key=lambda row: row["exposed_ms"])
    fix = ""
    if worst["a2a"].startswith("backward of moe_combine") and not result["carry_over"]:
        fix = " --carry-over lets dW of FC2 run there."
    elif not worst["a2a"].startswith("backward"):
        fix = " Forward exchanges have only shared experts to hide behind."
    return [f"Longest with nothing beside it: {worst['a2a']} ({worst['workload']}), {worst['exposed_ms']:.2f} ms.{fix}"]


def _step_line(row: Row) -> tuple[str, ...]:
    return (
        row["workload"],
        row["description"] + ("" if row["judged"] else " (NOISY)"),
        *(number(row[f"{kind}_ms"]) for kind in ("plain", "twin", "overlapped")),
        f"{row['hidden_ms']:.2f} +-{row['hidden_spread_ms']:.2f}",
        number(row["hidden_fraction"]),
        number(row["a2a_hidden_ms"]),
        number(row["extra_peak_memory_mb"]),
    )


def _line(row: Row) -> tuple[str, ...]:
    names = ("alone_ms", "transfer_ms", "peer_wait_ms", "exposed_ms")
    return (
        row["workload"],
        row["a2a"],
        f"{row['bytes'] / 1024:.1f}",
        *(number(row[name]) for name in names),
        f"{row['hidden_ms']:.2f} +-{row['hidden_spread_ms']:.2f}",
        number(row["coverable_ms"]),
        ", ".join(f"{piece['name']} {piece['ms']:.2f}" for piece in row["beside"]) or "-",
    )
