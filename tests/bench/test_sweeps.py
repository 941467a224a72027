"""Both sweeps: shapes, the published table and its two errors, the check before timing, the advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.bench.published import FFN, PARALLEL
from fluid_npu.bench.sweep_shapes import Shape, ffn_shape, parallel_shape
from fluid_npu.bench.sweeps_text import advice, sweep_text, sweep_verdict
from fluid_npu.train.config import TrainConfig, validate

POINT = {"scale": [24, 32, 16], "hidden": 256, "ffn": 128, "local_experts": 4, "rows": 512}


def test_two_printed_gains_do_not_follow_from_their_times() -> None:
    rows = {**{str(ffn): row for ffn, row in FFN.items()}, **PARALLEL}
    assert [name for name, row in rows.items() if row.wrong] == ["32768", "tp4ep2e8"]
    computed = {name: round(100 * row.gain_computed, 2) for name, row in rows.items()}
    assert computed == {
        **{"32768": -5.63, "16384": 3.55, "8192": 6.15, "4096": 8.64},
        **{"tp4ep2e16": 44.06, "tp4ep2e8": 15.93, "tp2ep4e16": 8.39, "tp2ep4e8": -2.16},
    }


def test_a_rank_holds_its_share_of_experts_and_ffn() -> None:
    assert ffn_shape(32768, small=False) == Shape(hidden=6144, ffn=32768, local_experts=4, rows=8192)
    assert parallel_shape("tp4ep2e16", small=False) == Shape(hidden=4096, ffn=3584, local_experts=8, rows=8192)
    assert parallel_shape("tp2ep4e8", small=True).as_dict() == {
        **{"hidden": 256, "ffn": 448, "local_experts": 2, "rows": 512, "scale": [16, 16, 16]}
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ffn-sweep", "--ffn", "7"), "--ffn 7"),
        (("parallel-sweep", "--config", "tp4"), "--config tp4: not of the form tp4ep2e16"),
        (("parallel-sweep", "--config", "tp3ep2e16"), "tp must divide"),
        (("parallel-sweep", "--config", "tp2ep8e8"), "use e16"),
        (("parallel-sweep", "--rounds", "1"), "--rounds 1"),
        (("ffn-sweep", "--dtype", "fp8"), "--dtype 'fp8'"),
    ],
)
def test_wrong_points_are_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fluid_npu.cli import main

    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def measured(kind: str, points: dict[str, Any], plant: float) -> Any:
    from fluid_npu.bench import sweeps
    from fluid_npu.bench.agreement import Disagreement
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    config = validate(TrainConfig(preset="h64", device="cpu", dtype="fp32", nproc=1, ep=1))
    place = join(config, store())
    try:
        return getattr(sweeps, kind)(config, {**points, "rounds": 2, "command": "x", "plant_error": plant}, place)
    except Disagreement as error:
        return str(error)


def test_rows_have_the_documented_form(run_ranks: Callable[..., list[Any]]) -> None:
    points = {"config": ["tp4ep2e8", "tp7ep2e4"]}
    result = run_ranks(1, measured, "measure_parallel", points, 0.0)[0]
    known, unknown = result["rows"]
    assert (known["config"], unknown["config"]) == ("tp4ep2e8", "tp7ep2e4") and result["scaled_down"]
    for row in result["rows"]:
        assert row["baseline_p10_ms"] <= row["baseline_ms"] <= row["baseline_p90_ms"]
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert known["published"]["wrong"] and unknown["published"] is None
    text = sweep_text(result)
    assert "+17.93 %*" in text and "+15.93 %" in text and "SCALED DOWN" in text


def test_a_broken_grouped_form_is_not_timed(run_ranks: Callable[..., list[Any]]) -> None:
    message = run_ranks(1, measured, "measure_ffn", {"ffn": [4096]}, 1e-3)[0]
    assert "grouped experts differ from the loop" in message and "not timed" in message


def row(ffn: int, low: float, high: float, judged: bool = True) -> dict[str, Any]:
    return {"ffn": ffn, "gain_low": low, "gain_high": high, "gain": (low + high) / 2, "judged": judged}


def test_the_advice_names_where_grouping_starts_to_lose() -> None:
    rows = [row(1, 0.1, 0.2), row(2, -0.1, 0.1), row(3, -0.4, -0.3), row(4, -9.0, -8.0, judged=False)]
    result: dict[str, Any] = {"bench": "ffn-sweep", "rows": rows, "loses_from": 3, "judged": False}
    result["advice"] = advice(result)
    text = " ".join(sweep_verdict(result))
    assert "wins at ffn 1." in text and "loses at ffn 3." in text and "no difference at ffn 2." in text
    assert "Too noisy to judge at ffn 4" in text and "starts to lose from ffn 3" in text
    assert "no point that could be judged loses" in advice({**result, "loses_from": None})
    assert "none; measure again" in advice({**result, "rows": rows[3:]})
