"""Several variants of one model in one process group: the same weights, data, DDP and optimizer, other MoE layers.

    stock SequentialMLP      Megatron's MoE layer, alltoall dispatcher, one MLP per expert
    ours plain               FluidMoELayer, overlap 'off'
    ours overlapped          FluidMoELayer, overlap 'dw'
    ours serialised twin     as overlapped, each AllToAll waited for at once

All run Megatron's schedule with gradients fused into fp32 main_grad. B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from fluid_npu.mcore.convert import copy_weights, gradients_by_name, weights_by_name
from fluid_npu.schedule.live import get_backward_scheduler
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import TORCH_DTYPES, build_model, build_model_config, moe_layers
from fluid_npu.train.parallel import Place
from fluid_npu.train.step import masked_mean, wrap_ddp

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a variant is. ``impl`` and ``overlap`` as in TrainConfig, ``changes`` more of it; ``twin`` serialises."""

    name: str
    impl: str
    overlap: str = "off"
    twin: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


STOCK = Kind(name="stock SequentialMLP", impl="stock")
PLAIN = Kind(name="ours plain", impl="fluid")
OVERLAPPED = Kind(name="ours overlapped", impl="fluid", overlap="dw")
TWIN = Kind(name="ours serialised twin", impl="fluid", overlap="dw", twin=True)
KINDS = (STOCK, PLAIN, OVERLAPPED, TWIN)


class Variant:
    """One model with its DDP and optimizer. Building is collective.

    Args:
        kind: which MoE layer.
        config: the run; its ``impl`` is replaced by the kind's.
        place: this rank.
        optimizer: 'adam', 'sgd' (plain, without momentum: weights can be compared) or 'none'.
        weights: a model whose weights are copied; None keeps the initial ones.
        reduce: whether a step ends with the reduction of gradients over ranks.
        build: makes the model.
    """

    def __init__(
        self,
        kind: Kind,
        config: TrainConfig,
        place: Place,
        *,
        optimizer: str = "adam",
        weights: torch.nn.Module | None = None,
        reduce: bool = True,
        build: Callable[[TrainConfig, Any, str], torch.nn.Module] = build_model,
    ) -> None:
        delay = config.plant_delay_ms if kind.impl == "fluid" else 0.0
        self.kind, self.name, self.place = kind, kind.name, place
        self.config = replace(config, impl=kind.impl, plant_delay_ms=delay, **dict(kind.changes))
        dtype = config.dtype or "fp32"
        self._model_config = build_model_config(self.config, dtype)
        model = build(self.config, self._model_config, kind.overlap)
        model.to(place.device.torch_device(place.local_rank))
        if weights is not None:
            copy_weights(weights, model)
        self.scheduler = get_backward_scheduler(model) if kind.impl == "fluid" else None
        self.ddp = wrap_ddp(self.config, self._model_config, model)
        self.model = model
        self._model_config.finalize_model_grads_func = finalize_model_grads if reduce else None
        self.optimizer: Any = None
        if optimizer != "none":
            self.optimizer = get_megatron_optimizer(_optimizer_config(config, optimizer, dtype), [self.ddp])
            self._model_config.grad_scale_func = self.optimizer.scale_loss
        self._schedule = get_forward_backward_func()

    def step(self, batch: Batch) -> float:
        """One whole training step on one micro-batch; returns this rank's loss."""
        loss = self.forward_backward(batch)
        self.update()
        return loss

    def forward_backward(self, batch: Batch) -> float:
        """Gradients of one micro-batch left in main_grad, reduced over ranks if so asked; returns this rank's loss."""
        self.ddp.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        with self.mode():
            outputs = self._schedule(
                forward_step_func=_forward,
                data_iterator=iter([batch]),
                model=[self.ddp],
                num_microbatches=1,
                seq_length=batch["tokens"].shape[1],
                micro_batch_size=batch["tokens"].shape[0],
                forward_only=False,
            )
        return float(outputs[0]["loss"])

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def as_twin(self) -> Variant:
        """The serialised twin on this variant's own model and gradients."""
        twin = copy.copy(self)
        twin.kind, twin.name = TWIN, TWIN.name
        return twin

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        """What a step of this variant runs inside."""
        if self.kind.twin and self.scheduler is not None:
            serialised: contextlib.AbstractContextManager[Any] = self.scheduler.serialise()
            return serialised
        return contextlib.nullcontext()

    def gradients(self) -> dict[str, torch.Tensor]:
        """By name, experts in the stock layout (``mcore.convert``)."""
        return gradients_by_name(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        """As ``gradients``."""
        return weights_by_name(self.model)


def fuse_weight_gradients(variant: Variant) -> None:
    """Our experts' weight gradients go straight into main_grad, as --gemm-gradient-accumulation-fusion asks."""
    for layer in moe_layers(variant.model):
        layer.experts.fuse_dw = True  # type: ignore[union-attr]


class LayerAlone:
    """Forward and backward of a variant's first MoE layer; weight gradients are added to its main_grad."""

    def __init__(self, variant: Variant) -> None:
        self.name, self._variant = variant.name, variant
        self.layer = next(iter(moe_layers(variant.model)))

    def step(self, x_SBH: torch.Tensor, dy_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and input gradient."""
        x_SBH = x_SBH.detach().requires_grad_()
        with self._variant.mode():
            y_SBH, _ = self.layer(x_SBH)
            y_SBH.backward(dy_SBH)
        assert x_SBH.grad is not None
        return y_SBH.detach(), x_SBH.grad


def build_variants(
    kinds: Sequence[Kind], config: TrainConfig, place: Place, *, optimizer: str = "adam", reduce: bool = True
) -> list[Variant]:
    """One variant per kind, all with the weights of the first."""
    variants: list[Variant] = []
    for kind in kinds:
        weights = variants[0].model if variants else None
        variants.append(Variant(kind, config, place, optimizer=optimizer, weights=weights, reduce=reduce))
    return variants


class MockData:
    """Random tokens and layer inputs as a function of (seed, number, data-parallel rank).

    ``seq_length`` None is the preset's; ranks may differ in it.
    """

    def __init__(self, config: TrainConfig, place: Place, seq_length: int | None = None) -> None:
        self._preset, self._seed, self._place = config.model(), config.seed, place
        self._device = place.device.torch_device(place.local_rank)
        self._dtype = TORCH_DTYPES[config.dtype or "fp32"]
        self._length = length = seq_length or self._preset.seq_length
        self._mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=self._device).triu_(1)

    def batch(self, number: int) -> Batch:
        """Micro-batch ``number`` of this rank, in the form of ``train.data``'s."""
        p = self._preset
        text = torch.randint(
            p.vocab_size, (p.micro_batch_size, self._length + 1), generator=self._generator(number)
        ).to(self._device)
        positions = torch.arange(self._length, device=self._device).expand(p.micro_batch_size, -1)
        return {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "position_ids": positions,
            "loss_mask": torch.ones(text[:, 1:].shape, device=self._device),
            "attention_mask": self._mask,
        }

    def layer_input(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of an MoE layer and the gradient of its output, ``[S, B, H]`` each."""
        p, generator = self._preset, self._generator(number)
        shape = (self._length, p.micro_batch_size, p.hidden)
        x, dy = (torch.randn(shape, generator=generator).to(self._device, self._dtype) for _ in range(2))
        return x, dy

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + number) * 4096 + self._place.dp_rank)


def _forward(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses_BS, partial(masked_mean, batch["loss_mask"])


def _optimizer_config(config: TrainConfig, optimizer: str, dtype: str) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=optimizer,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=0.0 if optimizer == "sgd" else config.weight_decay,
        sgd_momentum=0.0,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=TORCH_DTYPES[dtype],
        initial_loss_scale=2.0**16,  # as the trainer's; Megatron's own, 2**32, overflows fp16 for many steps
        clip_grad=0.0 if optimizer == "sgd" else config.clip_grad,
        use_distributed_optimizer=config.distributed_optimizer,
    )
