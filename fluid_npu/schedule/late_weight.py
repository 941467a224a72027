"""A dense weight whose dW may run in a later flight, delivered to autograd when it has landed.

The operator sees the weight as a constant, so its AccumulateGrad node, with DDP's hooks on it, is not part of the
graph. It runs in a backward of its own, of that one leaf, started when the last dW has landed: a parameter becomes
ready for any DDP, of Megatron or of torch, exactly then. Nothing is asked of the DDP, unlike ``DeferredWeights`` with
late hooks.

How often a weight is used in a backward is autograd's to count: each use also takes the weight's *gate*, an empty
leaf, and the gate's gradient is accumulated once, after the last use. So a weight that is used twice is delivered
once, as stock autograd does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from fluid_npu.ops.grouped_matmul import placeholder_grad


class Debt:
    """The dW that one backward owes a weight."""

    def __init__(self, weight: Parameter, graph: int) -> None:
        self.graph = graph
        self._weight = weight
        self._due = 0
        self._sealed = False
        self._grad: Tensor | None = None
        self._fused = False

    def owe(self) -> None:
        """One more dW will be paid."""
        self._due += 1

    def pay(self, grad: Tensor | None) -> None:
        """A dW has landed: ``grad``, or None when it was added to ``main_grad``."""
        self._due -= 1
        if grad is None:
            self._fused = True
        else:
            self._grad = grad if self._grad is None else self._grad + grad
        self._deliver()

    def seal(self) -> None:
        """No further use of the weight comes in this backward."""
        self._sealed = True
        self._deliver()

    def _deliver(self) -> None:
        if self._due or not self._sealed:
            return
        # A placeholder is made only now, so that it does not outlive its use.
        grad = placeholder_grad(self._weight) if self._fused else self._grad
        self._grad = None
        torch.autograd.backward([self._weight], [grad])


class LateWeight:
    """What a module keeps of its weight's debts. A copy of it, and a pickled one, starts empty."""

    def __init__(self) -> None:
        self._gate: Tensor | None = None
        self._open: Debt | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LateWeight, ()

    def gate(self, device: torch.device) -> Tensor:
        """The leaf that each use of the weight in a forward takes as an input."""
        if self._gate is None or self._gate.device != device:
            with torch.enable_grad(), torch.inference_mode(False):
                self._gate = torch.zeros(0, device=device, requires_grad=True)
            mine = weakref.ref(self)  # a hook that held us would keep both alive
            self._gate.register_post_accumulate_grad_hook(lambda gate: _seal(mine(), gate))
        return self._gate

    def owe(self, weight: Parameter) -> Debt:
        """Called in a use's backward: the debt that its dW shall be paid to, once."""
        graph = torch._C._current_graph_task_id()
        if self._open is None or self._open.graph != graph:  # what a failed backward left open is dropped
            self._open = Debt(weight, graph)
        self._open.owe()
        return self._open


def _seal(late: LateWeight | None, gate: Tensor) -> None:
    gate.grad = None
    if late is not None and late._open is not None:
        debt, late._open = late._open, None
        debt.seal()
