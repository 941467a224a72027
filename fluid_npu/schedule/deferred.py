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
from fluid_npu.device import device_of
from fluid_npu.ops.grouped_matmul import grouped_weight_grad
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


def add_grouped_dw(
    weight: DeferredWeight, x: torch.Tensor, dy: torch.Tensor, counts: Sequence[int], fuse: bool
) -> torch.Tensor:
    """Computes dW of one grouped weight; into ``main_grad`` when ``fuse`` and the parameter has one.

    Returns the gradient for autograd: the real one, or a placeholder when it was added already.
    """
    parameter = weight.parameter
    fuse_into = parameter if fuse and getattr(parameter, "main_grad", None) is not None else None
    return grouped_weight_grad(parameter.view(weight.view), x, dy, counts, fuse_into).view(parameter.shape)


def landed(weight: torch.nn.Parameter, grad: torch.Tensor, hooks: Sequence[Callable[[], None]]) -> None:
    """Tells a late DDP that the gradient of ``weight`` is there: in ``main_grad``, or in ``grad`` to be added."""
    weight.grad = grad
    for hook in hooks:
        hook()


class DeferredWeights:
    """The weights of one layer's experts during one forward and backward."""

    def __init__(self, weights: Sequence[DeferredWeight], scheduler: BackwardScheduler, label: str, fuse: bool) -> None:
        self._weights = list(weights)
        self._scheduler = scheduler
        self._label = label
        self._fuse = fuse
        self._grads: list[torch.Tensor | None] = [None] * len(self._weights)
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
            self._scheduler.submit(
                DWTask(
                    name=f"{self._label} {weight.name}",
                    run=lambda: self._land(index, x, dy, counts),
                    shape=(x.shape[0], x.shape[1], dy.shape[1]),
                    device=device_of(x),
                    carry=bool(weight.late_hooks),
                )
            )

        return queue

    def _land(self, index: int, x: torch.Tensor, dy: torch.Tensor, counts: Sequence[int]) -> None:
        weight = self._weights[index]
        with torch.no_grad():
            grad = add_grouped_dw(weight, x, dy, counts, self._fuse)
        if weight.late_hooks:
            landed(weight.parameter, grad, weight.late_hooks)
        else:
            self._grads[index] = grad

    def _collect(self) -> tuple[torch.Tensor | None, ...]:
        grads = tuple(self._grads[i] for i in self._delivered)
        self._grads = [None] * len(self._weights)
        return grads
