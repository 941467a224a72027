"""Tables of ``bench layer`` and ``bench block``: single layers, and whole ones under context parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fluid_npu.report.table import Table, all_judged, between, cells, figure, noisy, plus_minus

Row = dict[str, Any]


def layer(result: Row) -> list[Table]:
    """Of ``bench layer``: times, parts, levers."""
    rows = result["rows"]
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    return [
        Table(
            name="layer",
            title=f"One {result['part']} layer of {result['preset']}",
            head=(
                "implementation",
                "pass",
                "median ms",
                "p10 to p90",
                "floor ms",
                "first / this (95 %)",
                "activations MiB",
                "peak MiB",
            ),
            rows=tuple(_layer_row(row) for row in rows),
            words=2,
            note=all_judged(rows),
        ),
        Table(
            name="parts",
            title="Where its time goes, ms",
            head=("implementation", "pass", *(name.replace("_", " ") for name in parts), "sum", "median"),
            rows=tuple(_parts_row(row, parts) for row in rows),
            words=2,
            note="The sum agrees with the median within 5 %, or lies between p10 and p90, unless it says so.",
        ),
        *_levers(result.get("levers", [])),
    ]


def _levers(rows: Sequence[Row]) -> Iterator[Table]:
    """None for results from before there were levers."""
    if rows:
        yield Table(
            name="levers",
            title="What each lever gives: the difference of two medians of this run",
            head=("lever", "pass", "from", "to", "saves ms (95 %)", "held MiB"),
            rows=tuple(_lever_row(row) for row in rows),
            words=4,
            note=all_judged(rows),
        )


def _lever_row(row: Row) -> tuple[str, ...]:
    return cells(
        row["lever"] + noisy(row),
        row["pass"],
        row["without"],
        row["with"],
        f"{figure(row['saved_ms'])} ({between(row['saved_low_ms'], row['saved_high_ms'], 2)})",
        figure(row["held_mb"], 1),
    )


def _layer_row(row: Row) -> tuple[str, ...]:
    low, high = row.get("ratio_baseline_over_this_low"), row.get("ratio_baseline_over_this_high")
    return cells(
        row["impl"] + noisy(row),
        row["pass"],
        figure(row["median_ms"]),
        between(row["p10_ms"], row["p90_ms"], 2),
        figure(row["floor_ms"]),
        f"{figure(row['ratio_baseline_over_this'])} ({between(low, high, 2)})",
        figure(row["activation_memory_mb"], 1),
        figure(row["peak_memory_mb"], 1),
    )


def _parts_row(row: Row, parts: list[str]) -> tuple[str, ...]:
    total = figure(row["parts_ms"]) + ("" if row["parts_agree"] else " (does not agree)")
    return cells(
        row["impl"], row["pass"], *(figure(row["parts"].get(name)) for name in parts), total, figure(row["median_ms"])
    )


def block(result: Row) -> list[Table]:
    """Of ``bench block``: times of whole layers, each AllToAll beside its twin, and the twins."""
    title = f"Transformer layers of {result['preset']}, cp {result['cp']}, ep {result['ep']}"
    times = ("median ms", "p10 to p90", "first / this (95 %)")
    figures = ("KiB", "alone ms", "transfer ms", "exposed ms", "hidden ms", "coverable ms")
    tables = (
        ("block", title, ("implementation", "pass", *times), _block_row, result["rows"]),
        ("exchanges", "Each AllToAll", ("implementation", "AllToAll", *figures), _exchange_row, result["exchanges"]),
        (
            "twins",
            "Beside the serialised twin",
            ("implementation", "pass", "twin ms", "overlapped ms", "hidden ms"),
            _twin_row,
            result["twins"],
        ),
    )
    return [
        Table(name=name, title=text, head=head, rows=tuple(map(line, rows)), words=2, note=all_judged(rows))
        for name, text, head, line, rows in tables
        if rows
    ]


def _block_row(row: Row) -> tuple[str, ...]:
    low, high = row["ratio_first_over_this_low"], row["ratio_first_over_this_high"]
    return cells(
        row["impl"] + noisy(row),
        row["pass"],
        figure(row["median_ms"]),
        between(row["p10_ms"], row["p90_ms"], 2),
        f"{figure(row['ratio_first_over_this'])} ({between(low, high, 2)})",
    )


def _exchange_row(row: Row) -> tuple[str, ...]:
    return cells(
        row["impl"] + noisy(row),
        row["a2a"],
        figure(row["bytes"] / 1024, 1),
        *(figure(row[f"{name}_ms"]) for name in ("alone", "transfer", "exposed")),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
        figure(row["coverable_ms"]),
    )


def _twin_row(row: Row) -> tuple[str, ...]:
    return cells(
        row["impl"] + noisy(row),
        "forward+backward",
        figure(row["twin_median_ms"]),
        figure(row["overlapped_median_ms"]),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
    )
