"""The planner's table on real ranks: equal on all of them, and used where 'auto' would overlap."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluid_npu.schedule.planner import Costs
from fluid_npu.train import costs as costs_module
from fluid_npu.train import overlap
from fluid_npu.train.config import TrainConfig
from tests.support.training import store, tiny

pytestmark = pytest.mark.host
DELAY_MS, JOIN_MS = 30.0, 60.0


def planned(config_text: str) -> dict[str, Any]:
    """Costs with a planted delay; and what 'auto' makes of costs in which everything hides, or nothing does."""
    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.device.kernels.torch_kernels import TorchKernels
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    place = join(config, store())
    pieces = TorchKernels.grouped_dw_pieces_add_
    TorchKernels.grouped_dw_pieces_add_ = lambda *given: (time.sleep(JOIN_MS / 2e3), pieces(*given))[1]
    measured, _ = costs_module.measure_costs(config, place, DelayedTransport(CollectiveTransport(), DELAY_MS))
    assert measured is not None
    found: dict[str, Any] = {"costs": dataclasses.asdict(measured)}
    overlap._host_names = lambda place: ["one", "two"]  # a network lies between them
    # What decides is planted: a busy machine must not.
    planted = {"alpha_ms": 0.1, "beta_ms_per_mib": 1e4, "hiding": 1.0, "spread_ms": 0.0, "chunk_ms": 0.0}
    compute = {"forward_ms": 9.0, "dx_ms": 9.0, "dw_ms": 9.0, "local_join_ms": 1.0}
    slow = dataclasses.replace(measured, **planted, **compute)
    odd = dataclasses.replace(config, cut={**config.cut, "micro_batch_size": 3})  # has no halves
    for name, costs in {"slow": slow, "nothing hides": dataclasses.replace(slow, hiding=0.0), "none": None}.items():
        overlap.measure_costs = lambda config, place, costs=costs: (costs, "no memory")
        settled, (value, reason) = overlap.settle(odd, place)
        found[name] = (value, settled.carry_over, settled.moe_chunks, reason, settled.local_first)
    once = dataclasses.replace(config, dispatch="once-per-rank")
    found["once"] = dataclasses.asdict(costs_module.measure_costs(once, place).value)
    overlap.measure_costs = lambda config, place: (slow, "")
    settled, (value, _) = overlap.settle(dataclasses.replace(odd, dispatch="once-per-rank"), place)
    found["slow once"] = (value, settled.moe_chunks, settled.dispatch)
    overlap.measure_costs = lambda config, place: pytest.fail("asked for: nothing is measured")
    halves = dataclasses.replace(slow, around_forward_ms=1e7, around_backward_ms=1e7, local_share=0.0)
    overlap.measure_costs = lambda config, place: (halves, "")
    settled, (value, reason) = overlap.settle(config, place)
    found["halves"] = (value, settled.interleave_batches)
    settled, (value, reason) = overlap.settle(dataclasses.replace(config, preset="mixtral-tiny"), place)
    found["halves with aux loss"] = (settled.interleave_batches, reason)
    found["static"] = overlap.settle(dataclasses.replace(config, dispatch="static"), place)[1].value
    found["asked"] = overlap.settle(dataclasses.replace(config, overlap="dw"), place)[1].value
    return found


def test_costs_are_equal_on_all_ranks_and_decide_what_auto_does(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    first, second = run_ranks(2, planned, tiny(tmp_path, overlap="auto").to_json())
    assert first == second
    costs = Costs(**first["costs"])
    assert costs.transfer_ms(costs.dispatch_mib) >= 0.99 * DELAY_MS
    assert min(costs.forward_ms, costs.dx_ms, costs.dw_ms) > 0 and 0 <= costs.hiding <= 1
    value, _, chunks, reason, local_first = first["slow"]
    assert (
        value == "full" and chunks in (1, 2, 4) and local_first + chunks > 1 and "expected of a layer: plain" in reason
    )
    assert first["nothing hides"][:3] == ("off", False, "auto")
    assert first["none"][0] == "dw" and first["none"][3].endswith("not planned from costs: no memory")
    assert first["asked"] == "dw"
    # 8 experts, top-2: 1.27 times fewer rows; what two pieces add to dW was measured, of both weights.
    assert 0.6 < first["once"]["dispatch_mib"] / costs.dispatch_mib < 0.8
    assert costs.join_ms == 0 and costs.local_share == 0.5
    assert min(first["once"]["join_ms"], costs.local_join_ms) >= 0.5 * JOIN_MS
    assert costs.around_forward_ms > 0 and first["halves"] == ("dw", True)
    interleaved, reason = first["halves with aux loss"]
    assert not interleaved and "halves interleaved were not considered: each half would have an auxiliary" in reason
    assert first["slow once"][0] == "full" and first["slow once"][1] in (1, 2, 4, 8)
    assert first["slow once"][2] == "once-per-rank"
    assert first["static"] == "dw", "it has no chunks, and its costs are not those of the measurement"


def test_a_rank_without_memory_keeps_all_from_planning(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, without_memory, tiny(tmp_path).to_json()) == [None, None]


def without_memory(config_text: str) -> Any:
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    place = join(config, store())

    def fail(self: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    if place.rank == 1:
        costs_module._Layer.compute_ms = fail  # type: ignore[method-assign]
    return costs_module.measure_costs(config, place).value
