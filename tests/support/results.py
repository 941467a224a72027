"""Made-up results in the form of docs/BENCHMARKS.md, a training run and an order record, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LANES = ("compute", "communication")
A2AS = ("moe_dispatch AllToAll of layer 1", "backward of moe_combine AllToAll of layer 1")


def envelope(bench: str, rows: list[Row], **more: Any) -> Row:
    return {
        "bench": bench,
        "schema": 1,
        "command": f"fluid-npu bench {bench} --out OUT",
        "date": "2026-11-21T08:00:00Z",
        "machine": {
            "device": "cpu",
            "description": "a processor <of & tests>",
            "system": "Linux 6 x86_64",
            "cores": 2,
            "nproc": 2,
            "threads_per_rank": 1,
            "backend": "gloo",
            "settings": {"OMP_NUM_THREADS": "1"},
            "load_average": 0.5,
            "load_average_end": 1.5,
        },
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "dtype": "fp32",
        "link": {"rate": "1gbit", "description": "between network namespaces"},
        "planted_delay_ms": 0.0,
        "rows": rows,
        "judged": True,
        "verdict": [f"What {bench} says."],
    }


def train_step() -> Row:
    row = {
        "case": "h64",
        "impl": "ours overlapped",
        "median_ms": 61.25,
        "p10_ms": 55.0,
        "p90_ms": 70.0,
        "peak_memory_mb": 5.5,
        "a2a_ms": 4.5,
        "hidden_ms": 3.0,
        "hidden_spread_ms": 0.5,
        "hidden_fraction": 0.75,
        "coverable_ms": 4.0,
        "ratio_stock_over_this": 1.21,
        "ratio_stock_over_this_low": 1.1,
        "ratio_stock_over_this_high": 1.3,
        "rounds": 60,
        "judged": True,
    }
    stock = {**row, "impl": "stock SequentialMLP", "hidden_ms": 0.0, "hidden_spread_ms": None, "hidden_fraction": None}
    return envelope("train-step", [stock, row])


def overlap() -> Row:
    rows = [
        {
            "workload": workload,
            "a2a": name,
            "bytes": 4 * 2**20,
            "alone_ms": 33.6,
            "transfer_ms": 34.0,
            "peer_wait_ms": 1.0,
            "exposed_ms": 3.0 if beside else 34.0,
            "hidden_ms": 31.0 if beside else 0.1,
            "hidden_spread_ms": 0.5,
            "beside": beside,
            "beside_ms": sum(piece["ms"] for piece in beside),
            "coverable_ms": 34.0 if beside else 0.0,
            "judged": True,
        }
        for workload in ("W0", "W2")
        for name, beside in zip(A2AS, ([], [{"name": "layer 1 fc2", "ms": 40.0}]), strict=True)
    ]
    steps = [_workload(name, judged) for name, judged in (("W0", True), ("W2", False))]
    lanes = [
        {"workload": "W0", "kind": kind, "rank": rank, "lane": lane, "name": f"{lane} piece", "start_ms": 1.0 + n}
        | {"end_ms": 5.5 + n}
        for kind in ("twin", "overlapped")
        for rank in range(2)
        for n, lane in enumerate(LANES)
    ]
    return {**envelope("overlap", rows), "steps": steps, "lanes": lanes, "preset": "mixtral-tiny", "cut": {}}


def _workload(name: str, judged: bool) -> Row:
    times = {f"{kind}{end}_ms": 100.0 for kind in ("plain", "twin", "overlapped") for end in ("", "_p10", "_p90")}
    return {
        "workload": name,
        "description": "balanced",
        **times,
        "hidden_ms": 31.0,
        "hidden_spread_ms": 0.5,
        "hidden_fraction": 0.91,
        "coverable_ms": 34.0,
        "a2a_hidden_ms": 31.1,
        "agrees": judged,
        "peak_memory_mb": 12.0,
        "extra_peak_memory_mb": 2.0,
        "rounds": 12,
        "judged": judged,
        "advice": "dw",
    }


def layer() -> Row:
    parts = dict.fromkeys(("attention", "norms", "linear", "a2a", "experts", "grad_accumulation", "rest"), 2.0)
    rows = [
        {
            "impl": impl,
            "pass": which,
            "median_ms": 14.1,
            "p10_ms": 13.0,
            "p90_ms": 15.0,
            "floor_ms": 12.0,
            "floor_p10_ms": 11.0,
            "floor_p90_ms": 13.0,
            "ratio_baseline_over_this": 1.0,
            "ratio_baseline_over_this_low": 0.9,
            "ratio_baseline_over_this_high": 1.1,
            "parts": {**parts, "idle": None},
            "parts_ms": 14.0,
            "parts_agree": True,
            "activation_memory_mb": 30.0,
            "peak_memory_mb": 60.0,
            "judged": True,
        }
        for impl in ("baseline", "ours overlapped")
        for which in ("forward", "forward+backward")
    ]
    lever = {"lever": "kernels and the host", "pass": "forward", "without": "stock GroupedMLP", "with": "ours plain"}
    lever |= {"saved_ms": 1.0, "saved_low_ms": 0.5, "saved_high_ms": 1.5, "held_mb": -2.0, "judged": True}
    more = {"preset": "mixtral-tiny", "cut": {}, "part": "moe", "workload": "W0", "levers": [lever]}
    return {**envelope("layer", rows), **more}


def block() -> Row:
    rows = [
        {
            **{"impl": impl, "pass": "iteration", "median_ms": 14.1, "p10_ms": 13.0, "p90_ms": 15.0, "judged": True},
            **{f"ratio_first_over_this{end}": 1.0 for end in ("", "_low", "_high")},
        }
        for impl in ("stock with TE", "ours overlapped")
    ]
    exchange = {name: 1.0 for name in ("alone_ms", "transfer_ms", "peer_wait_ms", "exposed_ms", "coverable_ms")}
    exchange |= {"impl": "ours overlapped", "a2a": "sp2hp AllToAll of layer 1"}
    exchange |= {"bytes": 4096, "hidden_ms": 0.5, "hidden_spread_ms": 0.1, "beside": [{"name": "proj dW", "ms": 0.7}]}
    twin = {"impl": "ours overlapped", "twin_median_ms": 14.6, "overlapped_median_ms": 14.1, "judged": True}
    twin |= {"hidden_ms": 0.5, "hidden_spread_ms": 0.1}
    untold = {**exchange, "impl": "ours in chunks", "hidden_ms": None, "hidden_spread_ms": None, "judged": True}
    more = {"exchanges": [{**exchange, "judged": True}, untold], "twins": [twin], "cp": 2, "ep": 2}
    return {**envelope("block", rows), "preset": "mixtral-8x7b", "cut": {}, "activation": "preset", **more}


def sweep(bench: str = "ffn-sweep") -> Row:
    key, values = ("ffn", (8192, 32768)) if bench == "ffn-sweep" else ("config", ("tp4ep2e8", "tp2ep4e8"))
    published = [
        {"baseline": 1537, "grouped": 1448, "gain_printed": 0.0612, "gain_computed": 0.0615, "wrong": False},
        {"baseline": 2280, "grouped": 2416, "gain_printed": -0.0530, "gain_computed": -0.0563, "wrong": True},
    ]
    rows = [
        {
            key: value,
            "shape": {"hidden": 96, "ffn": 512, "local_experts": 4, "rows": 128, "scale": [64, 16, 64]},
            "baseline_ms": 12.0,
            "grouped_ms": 10.0,
            "gain": 0.2,
            "gain_low": 0.15,
            "gain_high": 0.25,
            "rounds": 30,
            "judged": True,
            "published": known,
        }
        for value, known in zip(values, published, strict=True)
    ]
    return {**envelope(bench, rows), "scaled_down": True, "loses_from": None, "advice": "Advice: use them."}


BENCHES = {
    "train-step": train_step,
    "overlap": overlap,
    "layer": layer,
    "block": block,
    "ffn-sweep": sweep,
    "parallel-sweep": lambda: sweep("parallel-sweep"),
}


def write_benches(folder: Path) -> None:
    """One JSON for each bench."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in BENCHES.items():
        (folder / f"{name}.json").write_text(json.dumps(make()), encoding="utf-8")


def write_run(folder: Path, steps: int = 30) -> None:
    """A finished training run."""
    (folder / "checkpoints" / "step_000030").mkdir(parents=True)
    (folder / "checkpoints" / "step_000030" / "state.pt").write_bytes(b"state")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    rows = [
        {
            "step": step,
            "loss": 8.0 - step / 20,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "step_ms": 50.0,
            "a2a_ms": None,
            "twin": step % 10 == 0,
            "tokens_per_s": 4000.0,
            "host_memory_mb": 500.0,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spans = [
        {"step": step, "kind": kind, "rank": rank, "lane": lane, "name": "dispatch", "start_ms": 1.0, "end_ms": 2.0}
        for step, kind in ((29, "overlapped"), (30, "twin"))
        for rank in range(2)
        for lane in LANES
    ]
    (folder / "lanes.json").write_text(json.dumps({"schema": 1, "lanes": spans}), encoding="utf-8")
    summary = {"loss_first": 7.95, "loss_last": 6.5, "steps": steps, "step_ms_median": 50.0, "out": "runs/first"}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def write_order(folder: Path) -> None:
    """The record of two ranks, written with the recorder's own entries."""
    from fluid_npu.order.records import Entry

    folder.mkdir(parents=True)
    for rank in range(2):
        entries = [
            Entry(kind="process", rank=rank, name="test"),
            Entry(kind="collective", number=1, rank=rank, name="all_to_all", label="dispatch", at=10.0, until=10.001),
            Entry(kind="op", number=2, rank=rank, name="mm", stream="host", line="x.py:3", at=10.002, until=10.004),
            Entry(kind="landed", number=3, rank=rank, of=1, stream="host", at=10.004, until=10.005),
        ]
        text = "".join(entry.as_json() + "\n" for entry in entries)
        (folder / f"rank{rank}.jsonl").write_text(text, encoding="utf-8")
