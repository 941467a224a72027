"""Grouped expert weights whose dW is a task and whose gradient is delivered by a later autograd node.

The operator that computes dX sees the weight as a constant. The weight itself is an input of the dispatch's launch
node (``comm.sink.Passengers``): when that node's backward has filled its flight, the gradient is there, and only
then does the weight's AccumulateGrad node, with DDP's hooks on it, run. So a parameter is ready for DDP exactly
when its dW has landed, also on a rank that received no token.

One object per forward call: several micro-batches may be under way. L local experts, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fluid_npu.comm.sink import Passengers
from fluid_npu.device import device_of, kernels_of
from fluid_npu.ops.grouped_matmul import add_to_main_grad, placeholder_grad
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask

GroupedDW = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], None]


@dataclass(frozen=True, kw_only=True)
class DeferredWeight:
    """A parameter, its name, the ``[L, K, N]`` shape its storage is seen as, and hooks of a late DDP (or none).

    With ``late_hooks`` the task may be carried over to another layer; the hooks run when its dW has landed.
    """

    name: str
    parameter: torch.nn.Parameter
    view: tuple[int, int, int]
    late_hooks: Sequence[Callable[[], None]] = ()


def landed(weight: torch.nn.Parameter, grad: torch.Tensor | None, hooks: Sequence[Callable[[], None]]) -> None:
    """Tells a late DDP that the gradient of ``weight`` is there: in ``main_grad``, or in ``grad`` to be added."""
    weight.grad = grad
    for hook in hooks:
        hook()


class DeferredWeights:
    """The weights of one layer's experts during one forward and backward."""

    def __init__(
        self,
        weights: Sequence[DeferredWeight],
        scheduler: BackwardScheduler,
        label: str,
        fuse: bool,
        carry: bool = True,
    ) -> None:
        self._weights = list(weights)
        self._scheduler = scheduler
        self._label = label
        self._fuse = fuse
        self._carry = carry
        self._grads: list[torch.Tensor | None] = [None] * len(self._weights)
        self._fused = [False] * len(self._weights)
        self._delivered = [i for i, weight in enumerate(self._weights) if not weight.late_hooks]

    @property
    def passengers(self) -> Passengers:
        """The weights that the launch node delivers: all but those that a late DDP takes from the task itself."""
        return Passengers([self._weights[i].parameter for i in self._delivered], self._collect)

    def dw_of(self, index: int) -> GroupedDW | None:
        """What an operator's backward calls with (x, dy, counts) instead of computing dW; None for a frozen weight."""
        weight = self._weights[index]
        if not weight.parameter.requires_grad:
            return None

        def queue(x: torch.Tensor, dy: torch.Tensor, counts: Sequence[int]) -> None:
            carry = self._carry and bool(weight.late_hooks)
            self._scheduler.submit(
                DWTask(
                    name=f"{self._label} {weight.name}",
                    run=lambda: self._land(index, x, dy, counts),
                    shape=(x.shape[0], x.shape[1], dy.shape[1]),
                    device=device_of(x),
                    carry=carry,
                    flight="moe_combine" if carry else "",
                    held_bytes=x.nbytes + dy.nbytes,
                )
            )

        return queue

    def _land(self, index: int, x: torch.Tensor, dy: torch.Tensor, counts: Sequence[int]) -> None:
        weight = self._weights[index]
        parameter = weight.parameter
        fused = self._fuse and getattr(parameter, "main_grad", None) is not None
        with torch.no_grad():
            if fused:
                add_to_main_grad(parameter, parameter.view(weight.view), x, dy, counts)
            else:
                self._grads[index] = kernels_of(x).grouped_dw(x, dy, counts).view(parameter.shape)
        self._fused[index] = fused
        if weight.late_hooks:
            landed(parameter, self._take(index), weight.late_hooks)

    def _take(self, index: int) -> torch.Tensor | None:
        """The gradient for autograd; placeholders are made only now, so that they do not outlive their use."""
        grad, self._grads[index] = self._grads[index], None
        if self._fused[index]:
            self._fused[index] = False
            return placeholder_grad(self._weights[index].parameter)
        return grad

    def _collect(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self._take(index) for index in self._delivered)
