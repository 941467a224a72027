"""``bench overlap``: planted milliseconds show where they belong, and the result has the documented form.

Where milliseconds are planted only they pass (``tests/support/clock.py``).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.bench.overlap_text import overlap_text, overlap_verdict
from fluid_npu.train.config import TrainConfig, validate
from tests.support.clock import MeetingTransport, planted_time

DELAY_MS, DW_MS, LATE_MS = 150.0, 100.0, 250.0  # dW: of FC1 and of FC2 each, together longer than the delay
ROUNDS, NOTHING_MS = 2, 1e-6


def planted(late: bool) -> dict[str, Any]:
    """Rows of one MoE layer whose AllToAlls take a planted time; with ``late`` rank 1 comes late to the combine."""
    import numpy as np
    import torch.distributed as dist
    from megatron.core.transformer.spec_utils import build_module

    from fluid_npu.bench.overlap_figures import rows_of_exchanges, step_row
    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.device import get_device
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from fluid_npu.schedule.deferred import DeferredWeights
    from fluid_npu.schedule.lanes import Lanes
    from tests.support.moe import Case, inputs, make_config

    case = Case(fuse=False)
    config = make_config(case)
    land = DeferredWeights._land
    DeferredWeights._land = lambda *args: (time.sleep(DW_MS / 1e3), land(*args))[1]
    x, _ = inputs(case, dist.get_rank(), 0)
    device = get_device("cpu").value

    def step(serialised: bool) -> float:
        clock.meet()
        start = time.perf_counter()
        with layer.backward_scheduler.serialise() if serialised else nullcontext():
            layer(x.requires_grad_())[0].sum().backward()
        return (time.perf_counter() - start) * 1e3

    with planted_time() as clock:
        transport = DelayedTransport(MeetingTransport(CollectiveTransport(), clock), DELAY_MS)
        layer = build_module(get_fluid_moe_layer_spec(config, transport=transport).submodules.mlp, config=config)
        layer.set_layer_number(1)
        if late and dist.get_rank() == 1:
            layer.experts.register_forward_hook(lambda *_: time.sleep(LATE_MS / 1e3))
        ms, found = np.zeros((ROUNDS, 3)), []
        for column, serialised in ((1, True), (2, False)):
            with Lanes(layer.backward_scheduler, device) as lanes:
                for number in range(ROUNDS):
                    lanes.begin()
                    ms[number, column] = step(serialised)
                every: list[Any] = [None, None]
                dist.all_gather_object(every, lanes.take_steps())
            found.append([list(one) for one in zip(*every, strict=True)])
    rows = rows_of_exchanges("W0", *found, [0.0] * 4)
    return {"rows": rows, "step": step_row("W0", ms, found[0], rows, "dw")}


def test_a_planted_delay_shows_as_exposed_or_as_hidden(run_ranks: Callable[..., list[Any]]) -> None:
    found = run_ranks(2, planted, False, sizes={"expert_model_parallel_size": 2})[0]
    *bare, covered = found["rows"]
    assert [row["a2a"] for row in found["rows"]] == [
        *("moe_dispatch AllToAll of layer 1", "moe_combine AllToAll of layer 1"),
        *("backward of moe_combine AllToAll of layer 1", "backward of moe_dispatch AllToAll of layer 1"),
    ]
    for row in bare:
        assert [row["transfer_ms"], row["exposed_ms"]] == pytest.approx([DELAY_MS, DELAY_MS])
        assert row["hidden_ms"] == pytest.approx(0.0, abs=NOTHING_MS) and row["beside"] == []
    assert covered["exposed_ms"] == pytest.approx(0.0, abs=NOTHING_MS)
    assert [covered["hidden_ms"], covered["coverable_ms"]] == pytest.approx([DELAY_MS, DELAY_MS])
    assert [piece["name"] for piece in covered["beside"]] == ["layer 1 fc2", "layer 1 fc1"]
    assert covered["beside_ms"] == pytest.approx(2 * DW_MS)
    step = found["step"]
    assert step["hidden_ms"] == pytest.approx(DELAY_MS) and step["hidden_spread_ms"] == pytest.approx(0, abs=NOTHING_MS)
    assert step["twin_ms"] == pytest.approx(4 * DELAY_MS + 2 * DW_MS)
    assert step["overlapped_ms"] == pytest.approx(3 * DELAY_MS + 2 * DW_MS)
    assert step["agrees"]


def test_a_late_peer_is_no_transfer(run_ranks: Callable[..., list[Any]]) -> None:
    dispatch, combine, *_ = run_ranks(2, planted, True, sizes={"expert_model_parallel_size": 2})[0]["rows"]
    # The planted delay runs from each rank's own launch, so that much of the late peer's absence is covered by it.
    assert combine["peer_wait_ms"] == pytest.approx(LATE_MS - DELAY_MS)
    for row in (dispatch, combine):
        assert [row["transfer_ms"], row["exposed_ms"]] == pytest.approx([DELAY_MS, DELAY_MS])


@pytest.mark.link
def test_a_slow_link_shows_in_every_all_to_all(tmp_path: Path) -> None:
    # Enough bytes that the first ones, which the limit lets pass at once, do not count.
    model = ("--preset", "h64", "--layers", "1", "--seq-length", "256", "--micro-batch-size", "4")
    words = ("--workloads", "W0", "--rounds", "2", "--link", "100mbit", "--json", "--out", str(tmp_path))
    command = [sys.executable, "-m", "fluid_npu", "bench", "overlap", *model, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["link"]["rate"] == "100mbit" and "veth" in result["link"]["description"]
    for row in result["rows"]:
        needed_ms = row["bytes"] * 8 / 100e6 * 1e3  # 22 ms
        assert row["alone_ms"] >= 0.85 * needed_ms and row["transfer_ms"] >= 0.85 * needed_ms, row
    assert json.loads((tmp_path / "overlap.json").read_text())["rows"] == result["rows"]
    assert "link: 100mbit" in (tmp_path / "overlap.txt").read_text()


CUT = {"layers": 1, "seq_length": 32}


def measured(config_text: str, names: list[str], plant: float) -> Any:
    from fluid_npu.bench.agreement import Disagreement
    from fluid_npu.bench.overlap import measure
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    config = TrainConfig.from_json(config_text)
    place = join(config, store())
    options = {"workloads": names, "rounds": 2, "command": "test", "plant_error": plant}
    try:
        return measure(config, options, place)
    except Disagreement as error:
        return str(error)


def config_text(**changes: Any) -> str:
    values = {"preset": "h64", "cut": CUT, "device": "cpu", "dtype": "fp32", "overlap": "dw", **changes}
    return validate(TrainConfig(**values)).to_json()


def test_the_result_has_the_documented_form(run_ranks: Callable[..., list[Any]]) -> None:
    result = run_ranks(2, measured, config_text(), ["W4", "W6"], 0.0)[0]
    assert (result["bench"], result["schema"], result["link"]) == ("overlap", 1, None)
    assert [row["workload"] for row in result["steps"]] == ["W4", "W6"]
    assert [row["workload"] for row in result["rows"]] == ["W4"] * 4 + ["W6"] * 4
    tokens = 4 * 32  # micro-batch, sequence; W4: the second rank holds half as many; top-2
    assert result["steps"][0]["tokens_per_rank"] == [tokens + tokens // 2] * 2
    assert result["steps"][1]["tokens_per_rank"] == [tokens * 4 * 3 // 4, tokens * 4 // 4]
    for row in result["rows"]:
        assert row["bytes"] > 0 and row["alone_ms"] > 0 and row["transfer_ms"] > 0 and row["exposed_ms"] >= 0
        assert math.isfinite(row["hidden_ms"]) and row["peer_wait_ms"] >= 0
    w4 = [row["bytes"] for row in result["rows"][:2]]
    assert w4 == [128 * (64 + 4) * 4, 128 * 64 * 4]  # half of rank 0's rows; 64 values and their probability (padded)
    for step in result["steps"]:
        assert step["plain_p10_ms"] <= step["plain_ms"] <= step["plain_p90_ms"]
        assert {"hidden_fraction", "a2a_hidden_ms", "agrees", "extra_peak_memory_mb", "advice"} <= step.keys()
    kinds = {(span["workload"], span["kind"], span["rank"], span["lane"]) for span in result["lanes"]}
    assert len(kinds) == 2 * 2 * 2 * 2
    assert all(0 <= span["start_ms"] <= span["end_ms"] for span in result["lanes"])
    text = overlap_text(result)
    assert "ragged sources" in text and "backward of moe_dispatch AllToAll of layer 1" in text
    assert any(sentence.startswith("W6 rotating") for sentence in overlap_verdict(result))


def test_a_broken_implementation_is_not_timed(run_ranks: Callable[..., list[Any]]) -> None:
    message = run_ranks(2, measured, config_text(), ["W0"], 1e-3)[0]
    assert "ours plain differs from stock" in message and "not timed" in message


def step(workload: str, hidden: float, judged: bool = True) -> dict[str, Any]:
    return {
        **{"workload": workload, "description": "x", "judged": judged, "hidden_ms": hidden, "hidden_spread_ms": 1.0},
        **{"hidden_fraction": None, "agrees": True, "a2a_hidden_ms": hidden, "advice": "dw" if hidden > 1 else "off"},
    }


def test_the_verdict_says_what_pays_what_costs_and_what_is_noise() -> None:
    result = {"steps": [step("W0", 9.0), step("W1", -9.0), step("W2", 0.5), step("W3", 99.0, judged=False)]}
    text = " ".join(overlap_verdict({**result, "rows": [], "planted_delay_ms": 0.0, "carry_over": False}))
    assert "W0 x: overlap hides 9.00 ms" in text and "W1 x: overlap COSTS 9.00 ms" in text
    assert "W2 x: no difference" in text and "W3 x: too noisy to judge" in text
    assert "Overlap pays under W0: use --overlap dw" in text
