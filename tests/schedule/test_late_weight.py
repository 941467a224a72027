"""A weight is delivered to its AccumulateGrad node, and so to DDP's hooks, once and after its last dW landed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluid_npu.ops.parallel_linear import LinearBackward, parallel_linear
from fluid_npu.schedule.late_weight import LateWeight
from tests.support.device import here


class _Layer:
    """A weight with a late dW and a hook as DDP's; ``waiting`` are the tasks that nobody has run yet."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(here(torch.randn(4, 4)))
        self.late = LateWeight()
        self.waiting: list[Callable[[], None]] = []
        self.fired: list[torch.Tensor] = []
        # Megatron's DDP hooks the node, not the tensor.
        self.node = self.weight.expand_as(self.weight).grad_fn.next_functions[0][0]
        self.node.register_hook(lambda *_: self.fired.append(self.weight.grad.clone()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        backward = LinearBackward(take_dw=self._take)
        return parallel_linear(x, self.weight.detach(), None, backward, self.late.gate(x.device))

    def _take(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        debt = self.late.owe(self.weight)
        self.waiting.append(lambda: debt.pay(dy.t() @ x))

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


def _stock(weight: torch.Tensor, x: torch.Tensor, uses: int) -> torch.Tensor:
    weight = weight.detach().clone().requires_grad_()
    for _ in range(uses):
        x = x @ weight.t()
    x.sum().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_the_hook_fires_once_when_the_last_dw_has_landed(uses: int) -> None:
    torch.manual_seed(0)
    layer, x = _Layer(), here(torch.randn(3, 4))
    y = x
    for _ in range(uses):
        y = layer(y)
    y.sum().backward()
    assert layer.weight.grad is None and not layer.fired and len(layer.waiting) == uses
    layer.waiting, last = layer.waiting[:-1], layer.waiting[-1]
    layer.run()
    assert not layer.fired, "a gradient that lacks a dW was delivered"
    last()
    assert len(layer.fired) == 1
    assert torch.allclose(layer.fired[0], _stock(layer.weight, x, uses), rtol=1e-6)


def test_a_dw_that_runs_at_once_does_not_deliver_before_the_other_use() -> None:
    layer, x = _Layer(), here(torch.randn(3, 4))
    layer._take = lambda x, dy: layer.late.owe(layer.weight).pay(dy.t() @ x)  # type: ignore[method-assign]
    layer(layer(x)).sum().backward()
    assert len(layer.fired) == 1
    assert torch.allclose(layer.fired[0], _stock(layer.weight, x, 2), rtol=1e-6)


def test_two_micro_batches_whose_forwards_come_first_are_delivered_apart() -> None:
    layer, x = _Layer(), here(torch.randn(3, 4))
    first, second = layer(x).sum(), layer(2 * x).sum()
    one = _stock(layer.weight, x, 1)
    first.backward()
    layer.run()
    second.backward()
    layer.run()
    assert len(layer.fired) == 2
    assert torch.allclose(layer.fired[0], one) and torch.allclose(layer.fired[1], 3 * one)


def test_dw_may_run_inside_the_backward_of_another_node() -> None:
    """As a flight is filled: the delivery is a backward within a backward."""
    layer, x = _Layer(), here(torch.randn(3, 4))
    seen: list[int] = []

    class Fills(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(len(layer.fired))
            layer.run()
            seen.append(len(layer.fired))
            return grad

    layer(Fills.apply(x.requires_grad_())).sum().backward()
    assert seen == [0, 1] and torch.allclose(layer.fired[0], _stock(layer.weight, x.detach(), 1))


def test_a_recomputed_use_is_delivered_by_its_own_backward() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = _Layer(), here(torch.randn(3, 4)).requires_grad_()
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    layer.run()
    assert len(layer.fired) == 1 and torch.allclose(layer.fired[0], _stock(layer.weight, x.detach(), 1))


def test_a_failed_backward_leaves_no_debt() -> None:
    layer, x = _Layer(), here(torch.randn(3, 4))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no memory for dX")

    with pytest.raises(RuntimeError, match="no memory"):  # the weight's second use in backward never comes
        layer(Fails.apply(layer(x))).sum().backward()
    layer.waiting.clear()
    layer(x).sum().backward()
    layer.run()
    assert len(layer.fired) == 1 and torch.allclose(layer.fired[0], _stock(layer.weight, x, 1))


def test_copies_and_pickles_start_empty_and_nothing_keeps_a_dropped_one_alive() -> None:
    layer, x = _Layer(), here(torch.randn(3, 4))
    layer(x)
    for copied in (copy.deepcopy(layer.late), pickle.loads(pickle.dumps(layer.late))):
        assert copied._gate is None and copied._open is None
    gone = weakref.ref(layer.late)
    del layer, copied
    gc.collect()
    assert gone() is None
