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
from typing import Any

import torch

from fluid_npu.comm.sink import Passengers
from fluid_npu.device import device_of, kernels_of
from fluid_npu.device.kernels.groups import Groups, rows_in
from fluid_npu.device.kernels.known_rows import kernels_for
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.ops.grouped_matmul import placeholder_grad
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask

GroupedDW = Callable[[torch.Tensor, torch.Tensor, Groups], None]


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
        carry: bool | Callable[[], bool] = True,
        placeholders: bool = True,
    ) -> None:
        self._weights = list(weights)
        self._placeholders = placeholders
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

    def wants(self, index: int) -> bool:
        """Whether a weight has a gradient: not where it is frozen."""
        return self._weights[index].parameter.requires_grad

    def dw_of(self, index: int) -> GroupedDW | None:
        """What an operator's backward calls with (x, dy, counts) instead of computing dW; None for a frozen weight."""
        if not self.wants(index):
            return None
        return lambda x, dy, counts: self.submit(index, [DWPart(x, dy, counts)])

    def submit(self, index: int, parts: Sequence[DWPart], rows: PieceRows | None = None) -> None:
        """Queues the dW of a weight: one task, whose parts are groups of experts, together all in their order.

        With ``rows`` the parts share experts: each has the rows of one piece.
        """
        weight = self._weights[index]
        first, parts = parts[0], list(parts)
        # Asked now, in the backward: what is known of it in the forward may not be enough.
        carry = bool(weight.late_hooks) and (self._carry() if callable(self._carry) else self._carry)
        self._scheduler.submit(
            DWTask(
                name=f"{self._label} {weight.name}",
                run=lambda: self._land(index, parts, rows),
                shape=(sum(rows_in(part.counts, part.x) for part in parts), first.x.shape[1], first.dy.shape[1]),
                device=device_of(first.x),
                carry=carry,
                flight="moe_combine" if carry else "",
                held_bytes=sum(part.x.nbytes + part.dy.nbytes for part in parts),
            )
        )

    def _land(self, index: int, parts: Sequence[DWPart], rows: PieceRows | None) -> None:
        weight = self._weights[index]
        parameter = weight.parameter
        fused = self._fuse and getattr(parameter, "main_grad", None) is not None
        with torch.no_grad():
            if fused:
                _add_to_main_grad(weight, parts, rows)
            elif rows is not None and rows.on_device:
                self._grads[index] = _summed(weight, parts, rows)
            else:
                by_expert = parts if rows is None else rows.joined(parts)
                grads = [kernels_for(part.x, part.counts).grouped_dw(*part) for part in by_expert]
                self._grads[index] = (grads[0] if len(grads) == 1 else torch.cat(grads)).view(parameter.shape)
        self._fused[index] = fused
        if weight.late_hooks:
            landed(parameter, self._take(index), weight.late_hooks)

    def _take(self, index: int) -> torch.Tensor | None:
        """The gradient for autograd; placeholders are made only now, so that they do not outlive their use."""
        grad, self._grads[index] = self._grads[index], None
        if self._fused[index]:
            self._fused[index] = False
            return placeholder_grad(self._weights[index].parameter) if self._placeholders else None
        return grad

    def _collect(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self._take(index) for index in self._delivered)


def _summed(weight: DeferredWeight, parts: Sequence[DWPart], rows: PieceRows) -> torch.Tensor:
    """The gradient by way of a sum in fp32, since the host knows no rows to put together."""
    parameter = weight.parameter
    wide = torch.promote_types(parameter.dtype, torch.float32)
    dw = torch.zeros(weight.view, dtype=wide, device=parameter.device)
    kernels_of(dw).grouped_dw_pieces_add_(dw, parts, rows)
    return dw.to(parameter.dtype).view(parameter.shape)


def _add_to_main_grad(weight: DeferredWeight, parts: Sequence[DWPart], rows: PieceRows | None) -> None:
    """Adds each part to its experts' part of ``main_grad``, or with ``rows`` all of them to all in one pass.

    Sets ``grad_added_to_main_grad``.
    """
    parameter: Any = weight.parameter
    main_grad, first = parameter.main_grad.view(weight.view), 0
    if rows is not None:
        kernels_of(parts[0].x).grouped_dw_pieces_add_(main_grad, parts, rows)
        parts = ()
    for part in parts:
        experts = slice(first, first + len(part.counts))
        kernels_for(part.x, part.counts).grouped_dw_add_(main_grad[experts], *part)
        first = experts.stop
    parameter.grad_added_to_main_grad = True
