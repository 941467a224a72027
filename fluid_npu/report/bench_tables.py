"""The tables of each bench's result, as docs/BENCHMARKS.md describes their JSON. A missing key raises KeyError."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fluid_npu.report.table import Table, all_judged, between, cells, figure, percent, plus_minus, signed_percent

Row = dict[str, Any]


def tables_of(result: Row) -> list[Table]:
    """All tables of a result. Raises KeyError for a bench that is not known."""
    return _TABLES[result["bench"]](result)


def _train_step(result: Row) -> list[Table]:
    head = ("case", "implementation", "median ms", "p10 to p90", "AllToAll ms", "hidden ms", "of coverable")
    rows = result["rows"]
    return [
        Table(
            name="steps",
            title="Training step",
            head=(*head, "stock / this (95 %)", "peak MiB"),
            rows=tuple(_train_step_row(row) for row in rows),
            words=2,
            note=all_judged(rows),
        )
    ]


def _train_step_row(row: Row) -> tuple[str, ...]:
    ratio, low, high = (row.get(f"ratio_stock_over_this{end}") for end in ("", "_low", "_high"))
    return cells(
        row["case"],
        row["impl"] + _noisy(row),
        figure(row["median_ms"], 1),
        between(row["p10_ms"], row["p90_ms"]),
        figure(row["a2a_ms"]),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
        percent(row["hidden_fraction"]),
        "-" if ratio is None else f"{ratio:.2f} ({between(low, high, 2)})",
        figure(row["peak_memory_mb"], 1),
    )


def _overlap(result: Row) -> list[Table]:
    steps, rows = result["steps"], result["rows"]
    return [
        Table(
            name="steps",
            title="Forward and backward under each routing workload",
            head=(
                "workload",
                "routing",
                "plain ms",
                "twin ms",
                "overlapped ms",
                "hidden ms",
                "of coverable",
                "sum over AllToAlls",
                "extra MiB",
                "advice",
            ),
            rows=tuple(_workload_row(row) for row in steps),
            words=2,
            note=all_judged(steps),
        ),
        Table(
            name="alltoalls",
            title="Each AllToAll",
            head=(
                "workload",
                "AllToAll",
                "beside it",
                "KiB",
                "alone ms",
                "transfer",
                "peer wait",
                "exposed",
                "hidden",
                "coverable",
            ),
            rows=tuple(_alltoall_row(row) for row in rows),
            words=3,
            note=all_judged(rows),
        ),
    ]


def _workload_row(row: Row) -> tuple[str, ...]:
    return cells(
        row["workload"],
        row["description"] + _noisy(row),
        *(figure(row[f"{kind}_ms"]) for kind in ("plain", "twin", "overlapped")),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
        percent(row["hidden_fraction"]),
        figure(row["a2a_hidden_ms"]) + ("" if row["agrees"] else " (does not agree)"),
        figure(row["extra_peak_memory_mb"]),
        row["advice"],
    )


def _alltoall_row(row: Row) -> tuple[str, ...]:
    return cells(
        row["workload"],
        row["a2a"] + _noisy(row),
        ", ".join(f"{piece['name']} {piece['ms']:.2f}" for piece in row["beside"]) or "-",
        figure(row["bytes"] / 1024, 1),
        *(figure(row[f"{name}_ms"]) for name in ("alone", "transfer", "peer_wait", "exposed")),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
        figure(row["coverable_ms"]),
    )


def _layer(result: Row) -> list[Table]:
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
        row["lever"] + _noisy(row),
        row["pass"],
        row["without"],
        row["with"],
        f"{figure(row['saved_ms'])} ({between(row['saved_low_ms'], row['saved_high_ms'], 2)})",
        figure(row["held_mb"], 1),
    )


def _layer_row(row: Row) -> tuple[str, ...]:
    low, high = row.get("ratio_baseline_over_this_low"), row.get("ratio_baseline_over_this_high")
    return cells(
        row["impl"] + _noisy(row),
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


def _sweep(result: Row) -> list[Table]:
    key, rows = sweep_key(result), result["rows"]
    note = (
        "gain = baseline / grouped - 1, median of the paired rounds. Published: MindSpeed's page, times in a unit it "
        "does not state. * Its printed gain does not follow from its times."
    )
    if result.get("scaled_down"):
        note += " SCALED DOWN for a CPU: the shapes are smaller than the published ones."
    return [
        Table(
            name="sweep",
            title={"ffn": "Grouped experts by ffn size", "config": "Grouped experts by parallel configuration"}[key],
            head=(
                key,
                "H x F, local experts, rows",
                "baseline ms",
                "grouped ms",
                "gain (95 %)",
                "published baseline",
                "grouped",
                "gain printed",
                "gain by its times",
            ),
            rows=tuple(_sweep_row(row, key) for row in rows),
            words=2,
            note=" ".join(filter(None, (note, all_judged(rows)))),
        )
    ]


def _block(result: Row) -> list[Table]:
    rows, twins, exchanges = result["rows"], result["twins"], result["exchanges"]
    layers = f"Transformer layers of {result['preset']}, cp {result['cp']}, ep {result['ep']}"
    first = "first / this (95 %)"
    return [
        Table(
            name="block",
            title=layers,
            head=("implementation", "pass", "median ms", "p10 to p90", first),
            rows=tuple(_block_row(row) for row in rows),
            words=2,
            note=all_judged(rows),
        ),
        Table(
            name="twins",
            title="Forward and backward beside the serialised twin",
            head=("implementation", "twin ms", "overlapped ms", "hidden ms"),
            rows=tuple(_twin_row(row) for row in twins),
            words=1,
            note=all_judged(twins),
        ),
        Table(
            name="alltoalls",
            title="Each AllToAll",
            head=("implementation", "AllToAll", "KiB", "alone ms", "transfer", "exposed", "hidden", "coverable"),
            rows=tuple(_block_exchange(row) for row in exchanges),
            words=2,
            note=all_judged(exchanges),
        ),
    ]


def _block_row(row: Row) -> tuple[str, ...]:
    low, high = (row[f"ratio_first_over_this_{end}"] for end in ("low", "high"))
    return cells(
        row["impl"] + _noisy(row),
        row["pass"],
        figure(row["median_ms"]),
        between(row["p10_ms"], row["p90_ms"], 2),
        f"{row['ratio_first_over_this']:.3f} ({between(low, high, 3)})",
    )


def _twin_row(row: Row) -> tuple[str, ...]:
    times = (figure(row[f"{kind}_median_ms"]) for kind in ("twin", "overlapped"))
    return cells(row["impl"] + _noisy(row), *times, plus_minus(row["hidden_ms"], row["hidden_spread_ms"]))


def _block_exchange(row: Row) -> tuple[str, ...]:
    return cells(
        row["impl"],
        row["a2a"] + _noisy(row),
        figure(row["bytes"] / 1024, 1),
        *(figure(row[f"{name}_ms"]) for name in ("alone", "transfer", "exposed")),
        plus_minus(row["hidden_ms"], row["hidden_spread_ms"]),
        figure(row["coverable_ms"]),
    )


def _sweep_row(row: Row, key: str) -> tuple[str, ...]:
    shape, known = row["shape"], row["published"]
    ours = (
        str(row[key]) + _noisy(row),
        f"{shape['hidden']} x {shape['ffn']}, {shape['local_experts']}, {shape['rows']}",
        figure(row["baseline_ms"]),
        figure(row["grouped_ms"]),
        f"{signed_percent(row['gain'])} ({signed_percent(row['gain_low'])} to {signed_percent(row['gain_high'])})",
    )
    if known is None:
        return (*ours, "-", "-", "-", "-")
    printed = signed_percent(known["gain_printed"]) + ("*" if known["wrong"] else "")
    times = (figure(known["baseline"], 0), figure(known["grouped"], 0))
    return (*ours, *times, printed, signed_percent(known["gain_computed"]))


def sweep_key(result: Row) -> str:
    """What a sweep varies: 'ffn' or 'config'."""
    return "ffn" if result["bench"] == "ffn-sweep" else "config"


def _noisy(row: Row) -> str:
    return "" if row.get("judged", True) else " (NOISY)"


_TABLES: dict[str, Callable[[Row], list[Table]]] = {
    "train-step": _train_step,
    "overlap": _overlap,
    "layer": _layer,
    "block": _block,
    "ffn-sweep": _sweep,
    "parallel-sweep": _sweep,
}
KNOWN = tuple(_TABLES)
