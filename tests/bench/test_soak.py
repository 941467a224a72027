"""``scripts/soak.py``: steps with changing routing leave nothing behind, and what is planted to stay is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.bench.layer_cli import IMPLS
from fluid_npu.train.config import TrainConfig, validate

SIZES = {"hidden": 32, "ffn": 24, "moe_ffn": 24, "heads": 4, "kv_heads": 4, "experts": 8, "topk": 2}
CUT = {**SIZES, "layers": 1, "vocab_size": 128, "seq_length": 16, "micro_batch_size": 1}
OURS = [name for name in IMPLS if name.startswith("ours")]
Ranks = Callable[..., list[Any]]


def soak(impls: list[str], steps: int, plant: bool = False) -> dict[str, Any]:
    from fluid_npu.bench import soak as module
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    kept: list[Any] = []
    if plant:
        count = module._Routed._count
        module._Routed._count = lambda *a: (kept.append(a[-1][1].clone()), count(*a))[1]  # type: ignore[method-assign]
    config = validate(TrainConfig(preset="mixtral-8x7b", cut=CUT, device="cpu", dtype="fp32", overlap="dw"))
    return module.measure(config, {"impls": impls, "steps": steps}, join(config, store()))


LONG = [pytest.mark.nightly, pytest.mark.timeout(1000)]


@pytest.mark.parametrize(
    ("impls", "steps"),
    [(["ours-once-peer", "ours-2-chunks", "ours-static-graph"], 24), pytest.param(OURS, 1000, marks=LONG)],
)
def test_nothing_is_kept_from_step_to_step(run_ranks: Ranks, impls: list[str], steps: int) -> None:
    result = run_ranks(2, soak, impls, steps, timeout=900)[0]
    assert result["problems"] == []
    assert [row["impl"] for row in result["rows"]] == impls
    ran = [row for row in result["rows"] if "left_out" not in row]
    left_out = {row["impl"]: row["left_out"] for row in result["rows"] if "left_out" in row}
    assert left_out.keys() == {name for name in impls if name.endswith("-graph") or name == "ours-once-node"}
    assert "only CUDA graphs are supported" in left_out["ours-static-graph"]
    for row in ran:
        assert row["fewest_rows"] < row["most_rows"], "the routing did not change"
    growth = max(row["resident_mib"] for row in ran)
    print(f"2 ranks, {steps} steps of each of {len(ran)} forms: resident memory grew by at most {growth:.2f} MiB")


def test_what_every_step_keeps_is_found(run_ranks: Ranks) -> None:
    (problem,) = run_ranks(2, soak, ["ours-overlapped"], 9, plant=True)[0]["problems"]
    assert problem == "ours-overlapped: tensors grew by 6 in the last two thirds of the steps, allowed 0"
