"""Experts' buffers with room for fewer rows than arrive: the first ones are right, and nothing fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.ops.payload_once import SlotRow
from fluid_npu.ops.payload_static import ExpandStatic, ReduceStatic, StaticArrival

RECEIVED, LOCAL, SLOTS, HIDDEN = 30, 4, 3, 8
ROW = SlotRow(hidden=HIDDEN, slots=SLOTS, wire=torch.float32)


def arrived() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """A payload, its slots' probabilities, and the (received row, slot) of each row of the experts."""
    torch.manual_seed(0)
    chosen_ML = torch.rand(RECEIVED, LOCAL) > 0.4
    chosen_ML &= chosen_ML.cumsum(1) <= SLOTS
    expert_MS = torch.where(chosen_ML, torch.arange(LOCAL), LOCAL).sort(1)[0][:, :SLOTS]
    payload, p_MS = torch.randn(RECEIVED, ROW.width(torch.float32)), torch.rand(RECEIVED, SLOTS)
    ROW.write(payload, p_MS, expert_MS)
    order = [(m, int(chosen_ML[m, :e].sum())) for e in range(LOCAL) for m in range(RECEIVED) if chosen_ML[m, e]]
    return payload, p_MS, order


@pytest.mark.parametrize("lacking", [-5, 0, 1, 7, 20, None])
def test_rows_without_room_are_left_out_and_the_others_stay(lacking: int | None) -> None:
    payload, p_MS, order = arrived()
    capacity = 0 if lacking is None else len(order) - lacking
    used = min(capacity, len(order))
    rows = DeviceRows(LOCAL, capacity=capacity, expected=min(capacity, 10))
    arrival = StaticArrival(experts=rows)
    expand, reduce = ExpandStatic(ROW, arrival), ReduceStatic(arrival)
    x_CH, p_C = expand.unload(payload)
    assert x_CH.shape == (capacity, HIDDEN) and p_C.shape == (capacity,)
    assert sum(rows.on_host()) == used and int(rows.ends(payload.device, torch.int32)[-1]) == used
    kept = torch.tensor(order[:used], dtype=torch.int64).view(-1, 2)
    assert torch.equal(x_CH[:used], payload[kept[:, 0], :HIDDEN])
    assert torch.equal(p_C[:used], p_MS[kept[:, 0], kept[:, 1]])
    x_CH[used:], p_C[used:] = float("nan"), float("nan")
    wanted = torch.zeros(RECEIVED, HIDDEN).index_add_(0, kept[:, 0], x_CH[:used])
    assert torch.allclose(reduce.load(x_CH), wanted, atol=1e-6)
    back = expand.load_grad(x_CH, p_C)
    assert torch.allclose(back[:, :HIDDEN], wanted, atol=1e-6)
    filled = torch.zeros(RECEIVED, SLOTS, dtype=torch.bool)
    filled[kept[:, 0], kept[:, 1]] = True
    assert torch.equal(ROW.read_probs(back), torch.where(filled, p_MS, 0.0))
    (spread,) = reduce.unload_grad(payload[:, :HIDDEN].contiguous())
    assert spread is not None and spread.shape == (capacity, HIDDEN)
    assert torch.equal(spread[:used], x_CH[:used])
