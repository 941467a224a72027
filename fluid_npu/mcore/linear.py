"""Megatron's column- and row-parallel linears with dX at once and dW as a task of the model's scheduler.

Where dW runs is decided by the layer's place alone, so every rank decides alike:

    * a column-parallel linear with several tensor ranks: beside the all-reduce or reduce-scatter of its dX;
    * under context parallelism the output projection, and with carry-over the MLP's linears: queued, for the exchanges
      of their own layer's attention (``exchanges``);
    * a linear above the chunk's lowest MoE layer, with carry-over: queued, for the combine of the layer below;
    * a row-parallel linear with several tensor ranks elsewhere, and in a dense model: queued, for the collective of the
      column-parallel linear below it;
    * else at once.

A queued gradient reaches DDP when it has landed (``schedule.late_weight``), whatever DDP that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.sink import DirectSink
from fluid_npu.comm.tensor_parallel import TensorRegion
from fluid_npu.device import device_of
from fluid_npu.device.choice import Choice
from fluid_npu.mcore.lines.linears import enter_columns, leave_rows, only_stock_can, stock_product, tensor_group
from fluid_npu.ops.dense_linear import DenseGradInParts, dense_weight_grad
from fluid_npu.ops.grouped_matmul import placeholder_grad
from fluid_npu.ops.linear_parts import ColumnParts, RowParts, TakeDW
from fluid_npu.ops.parallel_linear import LinearBackward, parallel_linear
from fluid_npu.schedule.late_weight import LateWeight
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask


@dataclass(frozen=True, kw_only=True)
class InParts:
    """What a Fluid column-parallel linear is called with instead of ``x``, to compute in parts of its heads.

    ``parts``: heads of each part, blocks of ``size`` outputs (``ops.linear_parts``). The outputs of each part are
    handed to ``consume(number, y)``.
    """

    parts: Sequence[Sequence[int]]
    size: int
    x: Tensor
    consume: Callable[[int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class InRows:
    """What a Fluid row-parallel linear is called with instead of ``x``, whose input comes in parts.

    ``produce(number)`` gives part ``number`` of ``parts``: ``[..., P, n * D]`` (``ops.linear_parts.RowParts``).
    """

    parts: int
    produce: Callable[[int], Tensor]


class FluidLinear(torch.nn.Module):
    """What the two linears share; a mixin in front of Megatron's class. Constructor arguments are Megatron's."""

    gradient_accumulation_fusion: bool
    backward_scheduler: BackwardScheduler | None = None
    label = ""
    exchanges: tuple[str, ...] = ()
    """The kinds of exchange of the same layer's attention beside whose backward dW runs, an equal part beside each."""
    _place: tuple[int, int] | None = None
    _region: TensorRegion | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late = LateWeight()

    def join(self, scheduler: BackwardScheduler, label: str = "", place: tuple[int, int] | None = None) -> None:
        """Gives the linear's dW to a scheduler.

        Args:
            scheduler: of the model that the linear is part of; the same on every rank.
            label: how records and messages call the linear: "layer 3 self_attention.linear_qkv".
            place: the pipeline chunk and the number of its layer; dW is queued only if a collective follows that it can
                run beside. None: it is always queued, and what no collective takes runs when the backward ends.
        """
        self.backward_scheduler, self.label, self._place = scheduler, label, place
        self._region = None

    @property
    def dw_runs(self) -> str:
        """Where dW runs, in words."""
        if self._exchanges_dx():
            return "beside the collective of dX"
        if self.exchanges and self._queues(self.weight, None):
            return f"beside the backward of {' and '.join(self.exchanges)}"
        return "queued" if self._queues(self.weight, None) else "at once"

    @property
    def _forward_impl(self) -> Any:
        """What Megatron's forward calls for the product."""
        return self._product

    @_forward_impl.setter
    def _forward_impl(self, stock: Any) -> None:
        """Megatron 0.12 sets its own at each call."""

    def _product(self, *, input: Tensor, weight: Any, bias: Tensor | None = None, **keywords: Any) -> Tensor:
        why = only_stock_can(weight, keywords)
        if torch.is_autocast_enabled(input.device.type):
            why = "autocast chooses the dtypes"
        if why:
            Choice("Megatron's own product", why).announce(type(self).__name__)
            return stock_product(input=input, weight=weight, bias=bias, **keywords)
        region = self._region_of(keywords)
        if self._queues(weight, region):
            late = LinearBackward(take_dw=lambda x, dy: self._queue(weight, x, dy))
            return parallel_linear(input, weight.detach(), bias, late, self._late.gate(weight.device))
        at_once = LinearBackward(take_dw=lambda x, dy: self._run(weight, region, x, dy), region=region)
        return parallel_linear(input, weight, bias, at_once)

    def _dw_of_parts(self) -> tuple[TakeDW | None, Tensor | None]:
        """What takes the dW of a product in parts, and its gate: the weight is a constant to it, and its dW reaches DDP
        through the gate."""
        weight: Any = self.weight
        if not weight.requires_grad or not torch.is_grad_enabled():
            return None, None
        return lambda x, dy: self._take_late(weight, x, dy), self._late.gate(weight.device)

    def _take_late(self, weight: Any, x: Tensor, dy: Tensor) -> None:
        """dW queued where it may be, else computed now, and delivered to autograd by itself either way."""
        if self._queues(weight, None):
            return self._queue(weight, x, dy)
        debt = self._late.owe(weight)
        task = self._task(x, dy, lambda: debt.pay(self._dw(weight, x, dy)))
        if self.backward_scheduler is None:
            return task.run()
        self.backward_scheduler.run_now(task)

    def _exchanges_dx(self) -> bool:
        """Whether tensor ranks sum this linear's dX."""
        return False

    def _queues(self, weight: Any, region: TensorRegion | None) -> bool:
        """Whether dW waits for a later flight."""
        scheduler = self.backward_scheduler
        if region is not None or scheduler is None or scheduler.overlap == "off" or weight is not self.weight:
            return False
        return self._place is None or bool(self.exchanges) or self._flight_below() or self._column_below()

    def _flight_below(self) -> bool:
        """Whether an exchange of a layer below follows, for which dW may wait."""
        scheduler = self.backward_scheduler
        if scheduler is None or self._place is None:
            return False
        return scheduler.carry_over and scheduler.flight_below(*self._place)

    def _column_below(self) -> bool:
        """Whether a column-parallel linear whose dX is exchanged comes next in the backward."""
        return False

    def _region_of(self, keywords: dict[str, Any]) -> TensorRegion | None:
        """The exchange of this call's dX; None where it is not exchanged."""
        gathers = bool(keywords.get("sequence_parallel"))
        if not gathers and not keywords.get("allreduce_dgrad"):
            return None
        group = tensor_group(keywords.get("tp_group"))
        known = self._region
        if known is None or known.peers.group is not group or known.gathers != gathers:
            sink = self.backward_scheduler if self.backward_scheduler is not None else DirectSink()
            known = TensorRegion(peers=Peers.of(group), gathers=gathers, sink=sink, label=self.label)
            self._region = known
        return known

    def _queue(self, weight: Any, x: Tensor, dy: Tensor) -> None:
        assert self.backward_scheduler is not None
        debt = self._late.owe(weight)
        if len(self.exchanges) < 2:
            task = self._task(x, dy, lambda: debt.pay(self._dw(weight, x, dy)), *self.exchanges)
            self.backward_scheduler.submit(task)
            return
        columns = [part.shape[1] for part in dy.tensor_split(len(self.exchanges), 1)]
        parts = DenseGradInParts(weight, columns, self.gradient_accumulation_fusion, debt.pay)
        for number, (dy_part, flight) in enumerate(zip(dy.split(columns, 1), self.exchanges, strict=True)):
            run = lambda number=number, dy_part=dy_part: parts.add(number, x, dy_part)
            self.backward_scheduler.submit(self._task(x, dy_part, run, flight, f" part {number + 1}"))

    def _run(self, weight: Any, region: TensorRegion | None, x: Tensor, dy: Tensor) -> Tensor:
        """dW now, counted by the scheduler if there is one; what autograd gets for the weight."""
        found: list[Tensor | None] = []
        if self.backward_scheduler is None:
            found.append(self._dw(weight, x, dy))
        else:
            task = self._task(x, dy, lambda: found.append(self._dw(weight, x, dy)))
            beside = "at once" if region is None else region.name
            if region is not None and not self._flight_below():  # else the queue is for that exchange
                self.backward_scheduler.run_queue(beside)
            self.backward_scheduler.run_now(task, beside)
        return placeholder_grad(weight) if found[0] is None else found[0]

    def _dw(self, weight: Any, x: Tensor, dy: Tensor) -> Tensor | None:
        with torch.no_grad():
            return dense_weight_grad(weight, x, dy, self.gradient_accumulation_fusion)

    def _task(self, x: Tensor, dy: Tensor, run: Any, flight: str = "", which: str = "") -> DWTask:
        return DWTask(
            name=f"{self.label or type(self).__name__}{which}",
            run=run,
            shape=(x.shape[0], x.shape[1], dy.shape[1]),
            device=device_of(x),
            carry=True,
            flight=flight,
            held_bytes=x.nbytes + dy.nbytes,
        )


class FluidColumnParallelLinear(FluidLinear, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear, same arguments and results; the backward as this module says.

    Needs no Transformer Engine; without Apex ``gradient_accumulation_fusion`` needs ``fluid_npu.adapt()``, since
    Megatron's constructor checks for the extension (on a CPU and an NPU ours stands in). ``InParts`` instead of the
    input computes in parts; then tensor ranks exchange the whole input and the whole dX, with nothing beside it.
    """

    def forward(self, input_: Any, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's; with ``InParts`` (None, None)."""
        if not isinstance(input_, InParts):
            return super().forward(input_, *args, **kwargs)
        x, weight = enter_columns(self, input_.x), cast(Tensor, self.weight)
        product = ColumnParts(weight.detach(), input_.parts, input_.size, *self._dw_of_parts())
        bias: Any = self.bias
        for number in range(len(product.parts)):
            y = product.compute(x, number)
            input_.consume(number, y if bias is None else y + product.of_part(bias, number))
        return None, None

    def _exchanges_dx(self) -> bool:
        return bool((self.allreduce_dgrad or self.sequence_parallel) and not self.explicit_expert_comm)


class FluidRowParallelLinear(FluidLinear, RowParallelLinear):
    """Megatron's RowParallelLinear, same arguments and results. Its dX is not exchanged: the forward's output is.

    ``InRows`` instead of the input gives dX part by part, in the reverse order.
    """

    def forward(self, input_: Any) -> Any:
        """As Megatron's."""
        if not isinstance(input_, InRows):
            return super().forward(input_)
        weight = cast(Tensor, self.weight)
        product = RowParts(weight.detach(), input_.parts, *self._dw_of_parts())
        y = leave_rows(self, product.compute([product.enter(input_.produce(n)) for n in range(input_.parts)]))
        bias: Any = self.bias
        return (y, bias) if self.skip_bias_add or bias is None else (y + bias, None)

    def _column_below(self) -> bool:
        return bool(self.input_size_per_partition != self.input_size) and not self.explicit_expert_comm
