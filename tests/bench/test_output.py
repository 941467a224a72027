"""Tables and verdicts from planted results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from fluid_npu.bench.output import parity_text, train_step_text, train_step_verdict, write_files


def row(impl: str, ms: float, memory: float, ratio: tuple[float, float, float], hidden: float, spread: Any) -> Any:
    names = ("ratio_stock_over_this", "ratio_stock_over_this_low", "ratio_stock_over_this_high")
    return {
        "case": "h64",
        "impl": impl,
        "median_ms": ms,
        "p10_ms": ms,
        "p90_ms": ms,
        "peak_memory_mb": memory,
        "a2a_ms": 2.0,
        "hidden_ms": hidden,
        "hidden_spread_ms": spread,
        "hidden_fraction": None,
        "coverable_ms": 1.0,
        **dict(zip(names, ratio, strict=True)),
        "rounds": 60,
    }


def result(hidden: float = -0.4, device: str = "cpu", ratio: tuple[float, float, float] = (1.2, 1.1, 1.3)) -> Any:
    return {
        "command": "fluid-npu bench train-step",
        "machine": {
            "device": device,
            "description": "a machine",
            "cores": 2,
            "nproc": 2,
            "threads_per_rank": 1,
            "backend": "gloo",
            "settings": {"OMP_NUM_THREADS": "1"},
            "load_average": 9.0,
            "load_average_end": 9.5,
        },
        "versions": {"torch": "2.13.0"},
        "planted_delay_ms": 0.0,
        "agreement": {"h64": {"ours plain": {"error": 2e-7, "where": "x"}}},
        "rows": [
            row("stock SequentialMLP", 12.0, 10.0, (1.0, 1.0, 1.0), 0.0, None),
            row("ours plain", 10.0, 9.0, ratio, 0.0, None),
            row("ours overlapped", 10.5, 10.5, (1.1, 1.0, 1.2), hidden, 0.1),
            row("ours serialised twin", 10.1, 10.5, (1.1, 1.0, 1.2), 0.0, None),
        ],
    }


def test_overlap_that_costs_is_said_and_leads_to_the_slow_link() -> None:
    text = " ".join(train_step_verdict(result()))
    assert "ours plain is faster than stock, 1.20 times (1.10 to 1.30)" in text
    assert "Overlap costs 0.40 ms" in text
    assert "loopback" in text and "bench overlap --link" in text
    assert "plain -10.0 %, overlapped +5.0 %" in text


def test_overlap_that_pays_is_said_without_a_pointer() -> None:
    text = " ".join(train_step_verdict(result(hidden=0.8)))
    assert "Overlap hides 0.80 ms" in text
    assert "--link" not in text


def test_a_slower_or_undecided_result_is_not_dressed_up() -> None:
    assert "SLOWER" in " ".join(train_step_verdict(result(ratio=(0.8, 0.7, 0.9))))
    assert "no difference in speed" in " ".join(train_step_verdict(result(ratio=(1.02, 0.97, 1.1))))


def test_a_busy_machine_is_marked() -> None:
    text = train_step_text(result())
    assert "BUSY" in text and "torch 2.13.0" in text and "rounds: h64 60" in text


def test_files_hold_rows_result_and_text(tmp_path: Path) -> None:
    write_files(result(), "the text", str(tmp_path / "rows.csv"), str(tmp_path / "out"), "train-step")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [r["impl"] for r in rows][1] == "ours plain"
    assert rows[0]["hidden_fraction"] == ""
    assert json.loads((tmp_path / "out" / "train-step.json").read_text())["rows"][0]["median_ms"] == 12.0
    assert (tmp_path / "out" / "train-step.txt").read_text() == "$ fluid-npu bench train-step\n\nthe text\n"


def test_a_routing_tie_is_named_as_such() -> None:
    parity = {
        **{name: result()[name] for name in ("machine", "versions")},
        **{"preset": "h64", "cut": {"layers": 1}, "dtype": "fp32", "steps": 2, "ep": 2, "tolerance": 1e-5},
        "passed": False,
        "rows": [
            {
                "impl": "ours plain",
                "loss_error": 0.1,
                "gradient_error": 0.2,
                "gradient_where": "x, step 2",
                "weight_error": 0.3,
                "tokens_rerouted": 3,
                "reroute_margin": 1e-7,
                "twin_equal": None,
                "twin_differs_in": [],
                "passed": False,
            }
        ],
    }
    text = parity_text(parity)
    assert "3 tokens went to other experts" in text and "tie" in text and "1.0e-07" in text
    assert "PARITY DOES NOT HOLD" in text and "h64 --layers 1" in text
