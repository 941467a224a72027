"""One training step through Megatron's schedules: forward and backward of all micro-batches, then the optimizer.

Symbols: B micro-batch, S sequence length.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from fluid_npu.comm.guard import collective
from fluid_npu.comm.legs import LEG_COUNTERS
from fluid_npu.comm.shards import balanced_part
from fluid_npu.mcore.lines.arguments import taken
from fluid_npu.schedule.definitions import Coverage
from fluid_npu.schedule.hidden import TwinClock
from fluid_npu.schedule.lanes import Span
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import shared_experts
from fluid_npu.train.parallel import Place

COUNTERS = ("a2a_ms", "a2a_count", "a2a_bytes", "a2a_plain_bytes", "exposed_ms", "dw_ms", *LEG_COUNTERS)


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """``loss`` is the mean over data-parallel ranks, in nats per token. ``counters``: AllToAll, mean over ranks."""

    loss: float
    grad_norm: float | None
    lr: float
    step_ms: float
    twin: bool
    skipped: bool
    counters: dict[str, float]
    coverage: Coverage | None = None
    """Of a twin, mean over ranks."""
    spans: list[Span] | None = None
    """Of a step that was traced, this rank's lanes."""

    @property
    def a2a_ms(self) -> float | None:
        """All AllToAlls of the step; None without any (--ep 1 --cp 1), and where compute ran beside some."""
        return self.counters.get("a2a_ms")


def wrap_ddp(config: TrainConfig, model_config: TransformerConfig, model: GPTModel) -> DistributedDataParallel:
    """Megatron's DDP with fp32 gradient buffers; all ranks of a group start from the same weights."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        use_distributed_optimizer=config.distributed_optimizer,
        check_for_nan_in_grad=False,
        **taken(DistributedDataParallelConfig, delay_wgrad_compute=config.carry_over),
    )
    # Also turns what torch made in fp32, such as norms, into the run's precision; Megatron's optimizer expects that.
    wrapped = Float16Module(model_config, model) if model_config.bf16 or model_config.fp16 else model
    ddp = DistributedDataParallel(model_config, settings, wrapped)
    ddp.broadcast_params()
    return ddp


class TrainStep:
    """Callable that runs one step; the model configuration's callbacks are set here."""

    def __init__(
        self,
        config: TrainConfig,
        place: Place,
        model_config: TransformerConfig,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        backward_scheduler: Any | None,
    ) -> None:
        self.config = config
        self.place = place
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.schedule = schedule
        self.backward_scheduler = backward_scheduler
        self.preset = config.model()
        self.overlapping = backward_scheduler is not None and backward_scheduler.overlap != "off"
        schedulers = [backward_scheduler] if backward_scheduler is not None else []
        self._clock = TwinClock(schedulers, place.device, shared_experts(self.chunks))
        self.forward_backward = get_forward_backward_func()
        model_config.finalize_model_grads_func = self._finalize
        model_config.grad_scale_func = optimizer.scale_loss
        if config.overlap_grad_reduce:
            # All but the last micro-batch of a step leave their gradients unreduced.
            no_syncs = [chunk.no_sync for chunk in self.chunks]
            model_config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]

    def __call__(self, batches: Iterator[dict[str, torch.Tensor]], *, twin: bool, traced: bool = False) -> StepResult:
        """Runs one step, with clocks if it is traced. Raises TrainingDiverged and CollectiveError."""
        start = time.perf_counter()
        if self.backward_scheduler is not None:
            self.backward_scheduler.reset_stats()
        lr = self.optimizer.param_groups[0]["lr"]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._clocked(twin, traced), self.place.phase("forward and backward", watched=False):
            losses = self._forward_backward(batches)
        with self.place.phase("optimizer step"):
            updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.schedule.step(1)
        loss, counters = self._agree(losses)
        if (self.overlapping and not twin) or self.config.ep * self.config.cp == 1:
            counters.pop("a2a_ms", None)
        self.place.device.synchronize()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss}; start again with a lower --lr (now {self.config.lr:g})")
        step_ms = (time.perf_counter() - start) * 1e3
        return StepResult(
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=lr,
            step_ms=step_ms,
            twin=twin,
            skipped=not updated,
            counters=counters,
            coverage=self._coverage() if twin and self.backward_scheduler is not None else None,
            spans=self._clock.spans() if traced else None,
        )

    def _clocked(self, twin: bool, traced: bool) -> contextlib.AbstractContextManager[Any]:
        clocked = self.backward_scheduler is not None and (twin or traced)
        return self._clock.clocked(serialised=twin) if clocked else contextlib.nullcontext()

    def _coverage(self) -> Coverage:
        """What of the twin's AllToAlls could be covered, mean over all ranks. Collective; not in the step's time."""
        with self.place.phase("reading of the twin"):
            values = self._mean_over_ranks(list(astuple(self._clock.coverage())))
        return Coverage(**dict(zip((item.name for item in fields(Coverage)), values, strict=True)))

    def _forward_backward(self, batches: Iterator[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        step_batches = [next(batches) for _ in range(self.config.micro_batches)]
        outputs = self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=[iter(step_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=self.config.micro_batches,
            seq_length=self.preset.seq_length,
            micro_batch_size=self.preset.micro_batch_size,
            forward_only=False,
        )
        return [output["loss"] for output in outputs]

    def _forward(self, batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
        device = self.place.device.torch_device(self.place.local_rank)
        cp = (self.place.cp_size, self.place.cp_rank)
        batch = {
            name: balanced_part(value, *cp, 1).to(device, non_blocking=True) for name, value in next(batches).items()
        }
        # No mask: the layers are causal by type, which a fused attention computes without reading one.
        losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        group = parallel_state.get_context_parallel_group() if self.place.cp_size > 1 else None
        return losses_BS, partial(masked_mean, batch["loss_mask"], group=group)

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        with self.place.phase("gradient reduction"):
            finalize_model_grads(*args, **kwargs)

    def _agree(self, losses: list[torch.Tensor]) -> tuple[float, dict[str, float]]:
        """Means over the ranks that have a loss (last pipeline stage), and over all for the counters."""
        stats = self.backward_scheduler.get_stats() if self.backward_scheduler is not None else {}
        here = [float(torch.stack(losses).mean()), 1.0] if losses else [0.0, 0.0]
        counters = [float(stats.get(name, 0.0)) for name in COUNTERS]
        with self.place.phase("loss reduction"):
            values = self._mean_over_ranks([*here, *counters])
        return values[0] / values[1], dict(zip(COUNTERS, values[2:], strict=True)) if stats else {}

    def _mean_over_ranks(self, values: list[float]) -> list[float]:
        device = self.place.device.torch_device(self.place.local_rank)
        dtype = torch.float64 if self.place.device.name != "npu" else torch.float32
        total = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(total)
        return [float(value) / self.place.world for value in total.tolist()]


def masked_mean(
    loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor, group: Any = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over the tokens that count, and its detached copy for the log.

    With the ``group`` of ranks that share the sequences, the mean is over all their tokens: this rank returns its part
    of it, which Megatron multiplies by the group's size before it takes the mean over ranks. The copy for the log is
    multiplied already.
    """
    mask_BS = loss_mask_BS.view_as(losses_BS)
    count, ranks = mask_BS.sum(), 1
    if group is not None:
        ranks = group.size()
        with collective("loss mask reduction", dist.get_process_group_ranks(group)):
            dist.all_reduce(count, group=group)
    loss = (losses_BS.float() * mask_BS).sum() / count.clamp(min=1)
    return loss, {"loss": loss.detach() * ranks}
