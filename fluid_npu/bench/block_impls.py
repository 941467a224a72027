"""The transformer layers that ``bench block`` compares under context parallelism, on the same weights.

    stock with TE      Megatron's layers of Transformer Engine, its own context parallelism ('p2p' a ring, 'a2a')
    ours               Fluid layers, in one piece or in chunks of heads and of experts
    stock, whole       Megatron's local layers, each rank computing whole sequences: what the others are checked against
                       where there is no Transformer Engine. It is not timed.

S rows of a sequence, T of this rank, B batch, H hidden, P context-parallel ranks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.layer_impls import ONCE, PEER, ours, stock_names
from fluid_npu.bench.rig import OVERLAPPED, PLAIN, Kind, fuse_weight_gradients
from fluid_npu.comm.shards import SequenceShards, balanced_part
from fluid_npu.mcore.convert import gradients_by_name, weights_by_name
from fluid_npu.mcore.linear import FluidLinear
from fluid_npu.mcore.lines.arguments import taken
from fluid_npu.schedule.live import get_backward_scheduler
from fluid_npu.train.config import ConfigError, TrainConfig, validate
from fluid_npu.train.model import TORCH_DTYPES, build_model_config, layer_specs, moe_layers
from fluid_npu.train.parallel import Place

WHOLE = Kind(name="stock, whole sequences", impl="stock")
TE_RING = Kind(name="stock with TE, ring", impl="stock")
TE_A2A = Kind(name="stock with TE, AllToAll", impl="stock")
STOCK_TE = {TE_RING: "p2p", TE_A2A: "a2a"}
_FULL = (("attention_chunks", 2), ("moe_chunks", 2))
#: MoE layers in CUDA graphs, their AllToAlls ahead of what computes.
_GRAPHS = (("dispatch", "static"), ("moe_cuda_graph", True), ("a2a_transport", "high-priority"))
RECORDED = ours("MoE static, recorded", *_GRAPHS)
RECORDED_LOCAL_FIRST = replace(
    OVERLAPPED,
    name="ours full, MoE static, local rows first, recorded",
    overlap="full",
    changes=(*_GRAPHS, ("moe_chunks", 1), ("local_first", True)),
)
RECORDED_BOTH = replace(
    RECORDED_LOCAL_FIRST,
    name="ours full, MoE static, local rows first, recorded, 2 attention chunks",
    changes=(*RECORDED_LOCAL_FIRST.changes, ("attention_chunks", 2)),
)
RECORDED_ONCE = replace(
    RECORDED_LOCAL_FIRST,
    name="ours full, MoE once per rank, local rows first, recorded",
    changes=(*RECORDED_LOCAL_FIRST.changes, *ONCE.changes),
)
#: Those whose MoE layers are replayed.
REPLAYED = (RECORDED, RECORDED_LOCAL_FIRST, RECORDED_BOTH, RECORDED_ONCE)
KINDS = {
    "stock-te": TE_RING,
    "stock-te-a2a": TE_A2A,
    "ours-plain": PLAIN,
    "ours-overlapped": OVERLAPPED,
    "ours-carry": ours("Fluid linears", ("carry_over", True)),
    "ours-attention-chunks": ours("2 attention chunks", ("attention_chunks", 2)),
    "ours-chunks": replace(OVERLAPPED, name="ours full, 2 chunks of both", overlap="full", changes=_FULL),
    "ours-peer": PEER,
    "ours-once": ours("tokens once per rank", *ONCE.changes),
    "ours-recorded": RECORDED,
    "ours-recorded-local-first": RECORDED_LOCAL_FIRST,
    "ours-recorded-attention-chunks": RECORDED_BOTH,
    "ours-recorded-once": RECORDED_ONCE,
}
#: Forms that need other packages or a device's own ways; where they fail they are left out with the reason.
EXTRAS = (*STOCK_TE, PEER, *REPLAYED)
_OF_TE = (
    (re.compile(r"^(.*)self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r"\1input_layernorm.\2"),
    (
        re.compile(r"^(.*self_attention)\.linear_(q|kv)_up_proj\.layer_norm_(weight|bias)$"),
        r"\1.\2_layernorm.\3",
    ),
)


def unavailable(kind: Kind, config: TrainConfig) -> str | None:
    """Why a kind cannot run here, or None."""
    if kind in STOCK_TE:
        if config.device == "cpu":
            return "Transformer Engine runs on CUDA alone"
        if importlib.util.find_spec("transformer_engine") is None:
            return "transformer_engine is not installed"
        return None
    try:
        validate(_changed(kind, config))
    except ConfigError as error:
        return str(error)
    return None


class Layers(torch.nn.Module):
    """Transformer layers behind one another."""

    def __init__(self, specs: Sequence[Any], config: Any) -> None:
        super().__init__()
        made = [build_module(spec, config=config, layer_number=number + 1) for number, spec in enumerate(specs)]
        self.layers = torch.nn.ModuleList(made)

    def forward(self, x_TBH: Tensor, rotary: Tensor | None) -> Tensor:
        """``[T, B, H]``; causal by type."""
        for layer in self.layers:
            x_TBH = layer(hidden_states=x_TBH, attention_mask=None, rotary_pos_emb=rotary)[0]
        return x_TBH


class BlockVariant:
    """One kind's layers in Megatron's DDP with fp32 main_grad. Building is collective.

    ``activation`` 'gelu' gives experts without gate, as FluidMoE's; 'preset' the model's own.
    """

    def __init__(self, kind: Kind, config: TrainConfig, place: Place, activation: str = "preset") -> None:
        self.kind, self.name, self.place, self.whole = kind, kind.name, place, kind is WHOLE
        self.config = _changed(kind, config)
        dtype = config.dtype or "fp32"
        model_config = build_model_config(self.config, dtype)
        if activation == "gelu":
            model_config = replace(model_config, gated_linear_unit=False, activation_func=F.gelu)
        if kind in STOCK_TE:
            specs, model_config = _of_te(kind, self.config, model_config)
        else:
            specs = next(iter(layer_specs(self.config, model_config, kind.overlap))).layer_specs
        device = place.device.torch_device(place.local_rank)
        self.model = Layers(specs, model_config).to(device, TORCH_DTYPES[dtype])
        self.scheduler = get_backward_scheduler(self.model) if kind.impl == "fluid" else None
        self.ddp = DistributedDataParallel(model_config, _ddp_settings(self.config), self.model)
        self.ddp.broadcast_params()
        if kind.impl == "fluid":
            fuse_weight_gradients(self)  # type: ignore[arg-type]
            _fuse_linears(self.model)
        self._rotary = self._angles()

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes another variant's weights. ValueError where names differ."""
        own = self.weights()
        if own.keys() != weights.keys():
            raise ValueError(f"{self.name}: names of weights differ: {sorted(own.keys() ^ weights.keys())[:6]}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(weights[name])

    @property
    def recorded(self) -> bool:
        """Whether MoE layers are replayed: a replay has neither a twin nor clocks."""
        return self.kind in REPLAYED

    def force(self, forced: ForcedRouting) -> None:
        """Its routers follow the workload; of whole sequences, all ranks' tokens in the order of the sequence."""
        if not self.whole:
            forced.force(self.model)
            return
        all_tokens = copy.copy(forced)
        batch = self.config.model().micro_batch_size
        all_tokens.maps = [[_all_tokens(map_TE, batch, self.place) for map_TE in step] for step in forced.maps]
        all_tokens.force(self.model)

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences ``[S, B, H]`` of a kind that computes those, else this rank's rows ``[T, B, H]``."""
        y: Tensor = self.model(x, self._rotary)
        return y

    def own(self, whole_SBH: Tensor) -> Tensor:
        """This rank's rows of whole sequences."""
        return balanced_part(whole_SBH, self.place.cp_size, self.place.cp_rank, 0).contiguous()

    def results(self, x_SBH: Tensor, dy_SBH: Tensor) -> dict[str, Tensor]:
        """Output and input gradient of this rank's rows, and weight gradients summed over all ranks. Collective."""
        self.ddp.zero_grad_buffer()
        x = (x_SBH if self.whole else self.own(x_SBH)).detach().requires_grad_()
        y = self.forward(x)
        y.backward(self._only_own(dy_SBH) if self.whole else self.own(dy_SBH))
        assert x.grad is not None
        found = {"output": y.detach(), "input gradient": x.grad}
        if self.whole:
            dist.all_reduce(x.grad, group=parallel_state.get_context_parallel_group())
            found = {name: self.own(value) for name, value in found.items()}
        return {**found, **{name: _summed(name, grad) for name, grad in self._gradients().items()}}

    def mode(self, twin: bool) -> contextlib.AbstractContextManager[Any]:
        """What a step runs inside: of a twin each AllToAll is waited for at once."""
        if twin and self.scheduler is not None:
            serialised: contextlib.AbstractContextManager[Any] = self.scheduler.serialise()
            return serialised
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """By the names of stock's local layers."""
        return self._renamed(weights_by_name(self.model))

    def _gradients(self) -> dict[str, Tensor]:
        return self._renamed(gradients_by_name(self.model))

    def _renamed(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        entries = stock_names(self.model, entries)
        for pattern, name in _OF_TE if self.kind in STOCK_TE else ():
            entries = {pattern.sub(name, old): value for old, value in entries.items()}
        return entries

    def _only_own(self, dy_SBH: Tensor) -> Tensor:
        """The gradient of this rank's rows, zero elsewhere: the ranks' sum is that of all."""
        mine = SequenceShards.balanced([0, dy_SBH.shape[0]], self.place.cp_size, dy_SBH.device)
        length = dy_SBH.shape[0] // self.place.cp_size
        kept = torch.zeros_like(dy_SBH)
        kept[self.place.cp_rank * length :][:length] = self.own(dy_SBH)
        return mine.in_order(kept)

    def _angles(self) -> Tensor | None:
        """Rotary angles of the rows; latent attention makes its own."""
        preset = self.config.model()
        if preset.mla is not None:
            for layer in self.model.layers if self.whole else ():
                layer.self_attention.rotary_pos_emb.cp_group = None  # type: ignore[union-attr]
            return None
        embedding = RotaryEmbedding(preset.channels, preset.rotary_percent, rotary_base=int(preset.rope_theta))
        angles: Tensor = embedding(preset.seq_length, packed_seq=self.whole)
        return angles


def _ddp_settings(config: TrainConfig) -> DistributedDataParallelConfig:
    """Gradients in fp32, reduced when all are there."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=False,
        check_for_nan_in_grad=False,
        **taken(DistributedDataParallelConfig, delay_wgrad_compute=config.carry_over),
    )


def _fuse_linears(model: torch.nn.Module) -> None:
    """Our linears add dW to main_grad by themselves; Megatron's constructor lets nobody ask for it without Apex."""
    for module in model.modules():
        if isinstance(module, FluidLinear):
            module.gradient_accumulation_fusion = True


def _changed(kind: Kind, config: TrainConfig) -> TrainConfig:
    """The configuration of a kind."""
    cp = 1 if kind is WHOLE else config.cp
    delay = config.plant_delay_ms if kind.impl == "fluid" else 0.0
    changed = replace(config, impl=kind.impl, overlap=kind.overlap, cp=cp, plant_delay_ms=delay)
    return replace(changed, **dict(kind.changes))


def _of_te(kind: Kind, config: TrainConfig, model_config: Any) -> tuple[list[Any], Any]:
    """Specs of Transformer Engine's layers, and the configuration with what stock fuses."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    preset = config.model()
    latent, gated = preset.mla is not None, model_config.gated_linear_unit
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=preset.experts,
        moe_grouped_gemm=True,
        qk_layernorm=model_config.qk_layernorm,
        multi_latent_attention=latent,
    )
    changes = {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "gradient_accumulation_fusion": True,
        "bias_activation_fusion": gated,
        "apply_rope_fusion": not latent,
        "cp_comm_type": STOCK_TE[kind],
    }
    return [spec] * preset.layers, replace(model_config, **changes)


def _all_tokens(map_TE: Tensor, batch: int, place: Place) -> Tensor:
    """The routing of all ranks' tokens ``[S * B, E]``, from that of this rank's."""
    mine = map_TE.view(-1, batch, map_TE.shape[-1]).to(torch.uint8).contiguous()
    every = [torch.empty_like(mine) for _ in range(place.cp_size)]
    dist.all_gather(every, mine, group=parallel_state.get_context_parallel_group())
    rows = torch.cat(every)
    shards = SequenceShards.balanced([0, rows.shape[0]], place.cp_size, rows.device)
    return shards.in_order(rows).flatten(0, 1).bool()


def _summed(name: str, grad: Tensor) -> Tensor:
    """Over all ranks that hold the weight. Collective."""
    total = grad.detach().clone(memory_format=torch.contiguous_format)
    expert = ".mlp.experts." in name
    dist.all_reduce(total, group=parallel_state.get_expert_data_parallel_group() if expert else None)
    return total


def layers_of(variant: BlockVariant) -> int:
    """MoE layers."""
    return sum(1 for _ in moe_layers(variant.model))
