"""The peak of live tensor bytes, against allocations of known size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluid_npu.bench.memory import peak_memory_mb, peak_of, recordings_mb
from fluid_npu.device import get_device

MIB = 2**20


def test_the_peak_is_the_most_that_lived_at_once() -> None:
    def call() -> None:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        third = torch.empty(4 * MIB, dtype=torch.uint8)
        del second, third

    assert peak_memory_mb(get_device("cpu").value, call) == pytest.approx(6.0, abs=0.01)


def test_what_lived_before_does_not_count() -> None:
    before = torch.zeros(8 * MIB, dtype=torch.uint8)
    assert peak_memory_mb(get_device("cpu").value, lambda: before[: 2 * MIB].clone()) == pytest.approx(2.0, abs=0.01)


def test_backward_counts_too() -> None:
    weight = torch.ones(MIB, requires_grad=True)  # 4 MiB
    peak = peak_memory_mb(get_device("cpu").value, lambda: (weight * 2.0).sum().backward())
    assert 4.0 <= peak <= 12.1  # the product and its gradient; the sum's is expanded
    assert weight.grad is not None


def test_releases_alone_give_no_negative_peak() -> None:
    assert peak_of([-5, 3]) == 0
    assert peak_of([]) == 0
    assert peak_of([4, -4, 3, 3, -6]) == 6


def test_what_recordings_keep_is_that_of_all_recorded_layers() -> None:
    class Layer(torch.nn.Module):
        def __init__(self, held: int | None) -> None:
            super().__init__()
            self.graphed = None if held is None else SimpleNamespace(held_bytes=held)

    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), *map(Layer, (None, 2 * MIB, MIB // 2))])
    assert recordings_mb(model) == 2.5
