"""``fluid-npu parity`` and ``bench train-step`` on two processes, with few rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.train.config import TrainConfig, validate

STEP = TrainConfig(preset="h64", device="cpu", dtype="fp32", overlap="dw")


def cli(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *prefix, "-m", "fluid_npu", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)


def on_rank(config_text: str, part: str, rounds: int, plant: float) -> Any:
    """Body of a rank: 'check' builds and checks a case, 'layer' and 'step' also time it, 'parity' compares."""
    from fluid_npu.bench.agreement import Disagreement
    from fluid_npu.bench.parity import compare_variants
    from fluid_npu.bench.train_step import Case
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    config = TrainConfig.from_json(config_text)
    place = join(config, store())
    options = {"plant_error": plant, "command": "test"}
    try:
        if part == "parity":
            return compare_variants(config, options, place)
        case = Case("case", config, place, options)
    except Disagreement as error:
        return str(error)
    if part == "check":
        return case.agreement
    return (case.layer_alone() if part == "layer" else case.whole_step()).rows(rounds, 1)


def ranks(
    run_ranks: Callable[..., list[Any]], config: TrainConfig, part: str, rounds: int = 0, plant: float = 0.0
) -> Any:
    return run_ranks(2, on_rank, validate(config).to_json(), part, rounds, plant)[0]


def test_train_step_prints_one_json_object(tmp_path: Path) -> None:
    done = cli("bench", "train-step", "--cases", "h64", "--rounds", "4", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"command", "machine", "versions", "rows"} <= result.keys()
    assert [(row["case"], row["impl"]) for row in result["rows"]] == [
        (case, impl)
        for case in ("h64", "h64 MoE layer alone")
        for impl in ("stock SequentialMLP", "ours plain", "ours overlapped", "ours serialised twin")
    ]
    for row in result["rows"]:
        assert 0.0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["peak_memory_mb"] > 0.1 and row["a2a_ms"] > 0.0
        assert row["ratio_stock_over_this_low"] <= row["ratio_stock_over_this"] <= row["ratio_stock_over_this_high"]
        assert isinstance(row["hidden_ms"], float) and "hidden_fraction" in row
    assert json.loads((tmp_path / "train-step.json").read_text())["rows"] == result["rows"]
    assert "ours overlapped" in (tmp_path / "train-step.txt").read_text()


def test_memory_of_a_step_does_not_exceed_stock(run_ranks: Callable[..., list[Any]]) -> None:
    stock, plain, overlapped, _ = ranks(run_ranks, STEP, "step", rounds=2)
    assert plain["peak_memory_mb"] <= stock["peak_memory_mb"]
    assert overlapped["peak_memory_mb"] <= 1.10 * stock["peak_memory_mb"]


def test_a_broken_variant_is_not_timed(run_ranks: Callable[..., list[Any]]) -> None:
    message = ranks(run_ranks, STEP, "check", plant=1e-3)
    assert "ours plain differs from stock" in message and "not timed" in message
    assert "linear_fc1.weight" in message


def test_train_step_refuses_a_broken_variant_with_exit_code_1() -> None:
    done = cli("bench", "train-step", "--cases", "h64", "--rounds", "2", "--plant-error", "0.01", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "not timed" in done.stderr and "Traceback" not in done.stderr


def test_parity_holds_under_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = cli("parity", "--steps", "2", "--layers", "1", "--json", prefix=launcher)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] and result["steps"] == 2 and result["cut"] == {"layers": 1}
    plain, overlapped = result["rows"]
    assert (plain["impl"], overlapped["impl"]) == ("ours plain", "ours overlapped")
    assert overlapped["twin_equal"] is True
    for row in result["rows"]:
        assert row["tokens_rerouted"] == 0
        assert row["gradient_error"] <= 1e-5 and row["weight_error"] <= 1e-5 and row["loss_error"] <= 1e-5


def test_parity_fails_with_a_perturbed_weight_gradient() -> None:
    done = cli("parity", "--steps", "2", "--layers", "1", "--plant-error", "1e-3")
    assert done.returncode == 1
    assert "PARITY DOES NOT HOLD" in done.stdout
    assert "experts" in done.stdout and "FAILED" in done.stdout


def test_twenty_steps_stay_equal(run_ranks: Callable[..., list[Any]]) -> None:
    result = ranks(run_ranks, replace(STEP, steps=20, lr=0.1), "parity")
    assert result["passed"], result["rows"]
    assert all(row["tokens_rerouted"] == 0 for row in result["rows"])


def test_parity_holds_in_fp16_where_no_token_is_rerouted(run_ranks: Callable[..., list[Any]]) -> None:
    result = ranks(run_ranks, replace(STEP, dtype="fp16", steps=1, cut={"layers": 1}), "parity")
    assert result["passed"], result["rows"]
    assert all(row["weight_error"] > 0 for row in result["rows"]), "an overflow would have skipped the updates"


def test_gradients_that_are_not_finite_are_refused_by_name(run_ranks: Callable[..., list[Any]]) -> None:
    message = ranks(run_ranks, replace(STEP, steps=1, cut={"layers": 1}), "parity", plant=float("inf"))
    assert message.startswith("ours plain: not finite: ") and "linear_fc" in message and "--dtype" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parity", "--preset", "nonsense"), "--preset 'nonsense'"),
        (("parity", "--ep", "3"), "--ep 3"),
        (("bench", "train-step", "--rounds", "1"), "--rounds 1"),
        (("bench", "train-step", "--cases", "h1"), "h1"),
        (("bench", "overlap", "--link", "fast"), "--link fast: not a rate"),
        (("bench", "overlap", "--link", "1gbit", "--device", "cuda"), "use --device cpu"),
    ],
)
def test_wrong_usage_is_refused_before_any_process_starts(words: tuple[str, ...], message: str) -> None:
    done = cli(*words)
    assert done.returncode == 2
    assert message in done.stderr
