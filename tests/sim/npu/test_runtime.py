"""Devices, memory, streams and events of the simulated NPU, through torch_npu's own code."""

from __future__ import annotations

import os

import pytest
import torch


def test_the_device_is_the_chip_that_was_asked_for():
    assert torch.npu.is_available() and torch.npu.device_count() == 8
    assert torch.npu.get_device_name(0) == os.environ["FLUID_SIM_SOC"]


def test_tensors_travel_to_the_device_and_back_in_every_layout():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(x.npu().cpu(), x)
    assert torch.equal(x.npu().transpose(0, 2).cpu(), x.transpose(0, 2))
    assert torch.equal(x.npu(1).cpu(), x) and x.npu(1).device.index == 1
    assert torch.equal(x.npu().bfloat16().cpu(), x.bfloat16())
    assert torch.equal(x[:, 1].npu().cpu(), x[:, 1])


def test_a_stream_works_while_the_program_goes_on():
    side, done = torch.npu.Stream(), torch.npu.Event()
    x = torch.randn(600, 600).npu()
    torch.npu.synchronize()
    with torch.npu.stream(side):
        for _ in range(20):
            y = x @ x
        done.record()
    assert not done.query()
    done.synchronize()
    assert done.query() and torch.allclose(y.cpu(), x.cpu() @ x.cpu(), rtol=1e-3, atol=1e-3)


def copied_on_another_stream(wait: bool) -> bool:
    """Whether a copy on a side stream saw what the default stream computed."""
    x, target = torch.randn(700, 700).npu(), torch.zeros(700, 700).npu()
    side = torch.npu.Stream()
    torch.npu.synchronize()
    for _ in range(10):
        y = x @ x
    with torch.npu.stream(side):
        if wait:
            side.wait_stream(torch.npu.default_stream())
        target.copy_(y)
    torch.npu.synchronize()
    return torch.equal(target.cpu(), y.cpu())


def test_a_missing_wait_is_seen_and_a_wait_repairs_it():
    assert copied_on_another_stream(wait=True)
    # On a busy machine the side stream may come late and see the value: one of many attempts does not.
    assert not all(copied_on_another_stream(wait=False) for _ in range(20))


def test_events_measure_time_and_wait_for_the_last_record():
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    x = torch.randn(500, 500).npu()
    for _ in range(5):
        x = (x @ x).clamp(-1, 1)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0
    start.record()  # again: pending until the stream comes there
    torch.npu.synchronize()
    assert start.query()


def test_memory_beyond_the_chip_s_raises_torch_s_own_error():
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(70 << 30, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() < 1 << 30
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total == 64 << 30


def test_an_operator_without_an_npu_kernel_is_refused_by_name():
    name = "aten::_fused_moving_avg_obs_fq_helper"
    one = lambda *shape: torch.ones(*shape).npu()
    with pytest.raises(RuntimeError, match=f"no NPU kernel for {name}.*FLUID_SIM_FALLBACK"):
        torch.ops.aten._fused_moving_avg_obs_fq_helper(
            one(3), one(1).long(), one(1).long(), one(1), one(1), one(1), one(1).int(), 0.1, 0, 255, -1
        )
