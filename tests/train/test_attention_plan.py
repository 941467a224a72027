"""--attention-chunks auto: the costs on real ranks, equal on all of them, what they decide, and what rules decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluid_npu.schedule.attention_planner import AttentionCosts
from fluid_npu.train import attention_costs, attention_plan
from fluid_npu.train.attention_plan import attention_obstacle, possible_chunks
from fluid_npu.train.config import TrainConfig
from tests.support.training import CUT, store, tiny, train_here

pytestmark = pytest.mark.host
DELAY_MS = 30.0
CP = {"cp": 2, "ep": 1, "attention_chunks": "auto"}


def planned(config_text: str) -> dict[str, Any]:
    """Costs with a planted delay; and what 'auto' makes of costs in which everything hides, or nothing does."""
    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    place = join(config, store())
    delayed = DelayedTransport(CollectiveTransport(), DELAY_MS)
    measured = attention_costs.measure_attention(config, place, delayed).value
    assert measured is not None
    found: dict[str, Any] = {"costs": dataclasses.asdict(measured)}
    slow = dataclasses.replace(measured, alpha_ms=0.0, beta_ms_per_mib=1e4, hiding=1.0, spread_ms=0.0, chunk_ms=0.0)
    slow = dataclasses.replace(slow, dw_ms=0.0)
    for name, costs in {"slow": slow, "nothing hides": dataclasses.replace(slow, hiding=0.0), "none": None}.items():
        attention_plan.measure_attention = lambda config, place, costs=costs: (costs, "no memory")
        found[name] = attention_plan._choose(config, "dw", place)
    found["settled"] = attention_plan.settle_attention(config, "off", place).attention_chunks
    found["asked"] = attention_plan.settle_attention(
        dataclasses.replace(config, attention_chunks=2), "dw", place
    ).attention_chunks

    def fail(self: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    if place.rank == 1:
        attention_costs._Attention.compute_ms = fail  # type: ignore[method-assign]
    found["no memory"] = attention_costs.measure_attention(config, place).reason
    return found


def test_costs_are_equal_on_all_ranks_and_decide(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(2, planned, tiny(tmp_path, **CP).to_json())
    assert first == second
    costs = AttentionCosts(**first["costs"])
    assert costs.exchanges_ms(1)[0] >= 0.99 * DELAY_MS and 0 <= costs.hiding <= 1
    assert all(ms > 0 for ms in (*costs.qkv_ms, costs.core_ms[0], *costs.proj_ms, costs.dw_ms))
    assert costs.to_rows_mib < costs.to_heads_mib
    chosen, reason = first["slow"]
    assert chosen == 2 and "expected of a layer's attention: 1 " in reason
    assert first["nothing hides"].value == first["none"].value == 1 and first["none"].reason == "no memory"
    assert (first["settled"], first["asked"]) == (1, 2)
    assert "a rank had no memory" in first["no memory"]


#: Changes of the run; the numbers above 1, or why there are none.
POSSIBLE: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "four heads of a rank": ({"cut": {**CUT, "heads": 8, "kv_heads": 4}}, [2, 4], ""),
    "one head of a rank": ({"cp": 4, "nproc": 4}, [], "1 query heads of a rank"),
    "no context parallelism": ({"cp": 1}, [], "with --cp 1 no heads are exchanged"),
    "latent": ({"preset": "deepseek-v3"}, [], "multi-latent attention of preset deepseek-v3"),
    "a ring": ({"cp": 3, "nproc": 3, "cut": {**CUT, "seq_length": 36}}, [], "a ring passes keys"),
    "stock": ({"impl": "stock", "cp": 1}, [], "stock Megatron's attention"),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_which_numbers_there_are(name: str, tmp_path: Path) -> None:
    changes, numbers, why = POSSIBLE[name]
    config = dataclasses.replace(tiny(tmp_path), **{**CP, **changes})
    found = possible_chunks(config)
    assert found.value == numbers and why in found.reason
    assert attention_obstacle(config, 1) is None
    assert (attention_obstacle(config, 2) is None) == (2 in numbers)
    assert attention_obstacle(config, 8) == (found.reason or "its heads make no 8 chunks; allowed are 1, 2, 4")


RULED = {
    "no AllToAll of this run is overlapped": ("off", {}),
    "the planted delay": ("dw", {"plant_delay_ms": 1.0}),
    "not for --a2a-transport pairwise": ("dw", {"a2a_transport": "pairwise"}),
    "with --cp 1": ("dw", {"cp": 1}),
}


@pytest.mark.parametrize("reason", RULED)
def test_where_nothing_is_measured(reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlap, changes = RULED[reason]
    config = dataclasses.replace(tiny(tmp_path), **{**CP, **changes})
    settled = attention_plan.settle_attention(config, overlap, None)  # type: ignore[arg-type]
    assert settled.attention_chunks == 1
    said = capsys.readouterr().out
    assert said.startswith("--attention-chunks auto: 1 (") and reason in said


def test_a_run_with_auto_trains(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    config = tiny(tmp_path, **CP, overlap="dw", steps=2)
    first, second = run_ranks(2, train_here, config.to_json())
    assert first["losses"] == second["losses"] and len(first["losses"]) == 2
