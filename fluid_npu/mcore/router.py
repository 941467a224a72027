"""Megatron's router, whose weight gradient may run beside the combine of the layer below.

Everything but the gating product is Megatron's. T tokens, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn.parameter import Parameter

from fluid_npu.device import device_of
from fluid_npu.mcore.late import LateWeights
from fluid_npu.ops.dense_linear import add_dense_dw_, dense_linear
from fluid_npu.ops.grouped_matmul import placeholder_grad
from fluid_npu.ops.wide_linear import wide_linear
from fluid_npu.schedule.deferred import landed
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class FluidRouter(LateWeights, TopKRouter):
    """TopKRouter; with a late DDP its dW is a task of the model's scheduler, added straight into ``main_grad``."""

    backward_scheduler: BackwardScheduler | None = None
    label = ""
    share_of_batch = 1.0
    """Part of a micro-batch that a call sees, by which an auxiliary loss is weighed."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Upstream's, of this call's share of the loss."""
        mine = aux_loss if self.share_of_batch == 1.0 else aux_loss * self.share_of_batch
        attached: Tensor = super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, mine, *args, **kwargs)
        return attached

    @classmethod
    def taking_over(cls, router: TopKRouter) -> FluidRouter:
        """A FluidRouter with the parameters and state of Megatron's; building another would draw random numbers."""
        ours = cls.__new__(cls)
        ours.__dict__.update(vars(router))
        return ours

    def gating(self, input: Tensor) -> Tensor:
        """``[..., E]`` logits in ``moe_router_dtype``; unlike upstream's, it needs no Transformer Engine symbol."""
        self._move_to_device()
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        late = self.backward_scheduler is not None and self.late_hooks(self.weight) and torch.is_grad_enabled()
        bias = self._bias()
        if bias is None and not late and dtype.itemsize > input.dtype.itemsize and self.weight.dtype == input.dtype:
            return wide_linear(input, self.weight, dtype)
        return dense_linear(input, self.weight, bias, defer_dw=self._queue if late else None, out_dtype=dtype)

    def _bias(self) -> Parameter | None:
        """A router of 0.12 has none."""
        return getattr(self, "bias", None)

    def _move_to_device(self) -> None:
        """Megatron creates the router's weight on the CPU and moves it at its first use."""
        for parameter in (self.weight, self._bias()):
            if parameter is not None and parameter.device.type == "cpu":
                parameter.data = parameter.data.to(torch.cuda.current_device())

    def _queue(self, x: Tensor, dy: Tensor) -> None:
        assert self.backward_scheduler is not None
        shape = (x.shape[0], x.shape[1], dy.shape[1])
        run = lambda: self._land(x, dy)
        task = DWTask(name=f"{self.label} router", run=run, shape=shape, device=device_of(x), carry=True)
        scheduler = self.backward_scheduler
        if self.layer_number in scheduler.lowest_layers and not scheduler.lowest_attention:
            scheduler.run_now(task)  # no exchange follows: a bucket of the DDP would wait for the backward's end
        else:
            scheduler.submit(task)

    def _land(self, x: Tensor, dy: Tensor) -> None:
        weight = self.weight
        with torch.no_grad():
            add_dense_dw_(weight.main_grad, x, dy)
        weight.grad_added_to_main_grad = True
        landed(weight, placeholder_grad(weight), self.late_hooks(weight))
