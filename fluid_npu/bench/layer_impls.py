"""The Megatron layers that ``bench layer`` compares: stock experts of three kinds, ours plain, ours overlapped.

All are one transformer layer of the local spec, so that only the MoE part differs; weights are the first one's. The
kinds that may be missing here say why (``unavailable``). L local experts, H hidden, F ffn.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.bench.rig import OVERLAPPED, PLAIN, STOCK, Kind, Variant, fuse_weight_gradients
from fluid_npu.device.kernels.torch_kernels import TorchKernels
from fluid_npu.mcore.convert import gradients_by_name, unwrap, weights_by_name
from fluid_npu.mcore.lines.groups import expert_rank
from fluid_npu.mcore.lines.specs import rebuilt, submodules_of
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import build_model, layer_specs, moe_layers
from fluid_npu.train.parallel import Place

LEGACY = Kind(name="stock GroupedMLP", impl="stock")
LEGACY_TORCH = Kind(name="stock GroupedMLP over torch", impl="stock")
TE = Kind(name="stock TEGroupedMLP", impl="stock")
TE_OVERLAPPED = Kind(name="stock TEGroupedMLP, dW beside dispatch", impl="stock")


def ours(form: str, *changes: tuple[str, Any], overlap: str = "dw") -> Kind:
    """A form of ours, overlapped; ``changes`` are fields of TrainConfig and their values."""
    return Kind(name=f"ours overlapped, {form}", impl="fluid", overlap=overlap, changes=changes)


ONCE = ours("once per rank", ("dispatch", "once-per-rank"))
ONCE_NODE = ours("once per node", ("dispatch", "once-per-node"))
PEER = ours("peer copies", ("a2a_transport", "peer-copy"), ("a2a_ctas", 0))
ONCE_PEER = ours("once per rank, peer copies", *ONCE.changes, *PEER.changes)
STATIC = ours("static", ("dispatch", "static"))
STATIC_PEER = ours("static, peer copies", *STATIC.changes, *PEER.changes)
_GRAPH = ("moe_cuda_graph", True)
STATIC_GRAPH = ours("static, recorded", *STATIC.changes, _GRAPH)
#: Two pieces: rows that stay on their rank, and the others.
LOCAL_FIRST = ours("local rows first", ("moe_chunks", 1), ("local_first", True), overlap="full")
STATIC_LOCAL_FIRST = ours("static, local rows first", *STATIC.changes, *LOCAL_FIRST.changes, overlap="full")
STATIC_LOCAL_FIRST_GRAPH = ours(
    "static, local rows first, recorded", *STATIC_LOCAL_FIRST.changes, _GRAPH, overlap="full"
)
#: Pipelined in so many chunks of a rank's experts.
IN_CHUNKS = {n: ours(f"{n} chunks", ("moe_chunks", n), overlap="full") for n in (2, 4)}
_TWO = (("moe_chunks", 2),)
ONCE_IN_CHUNKS = ours("once per rank, 2 chunks", *ONCE.changes, *_TWO, ("moe_chunks_of", "tokens"), overlap="full")
ONCE_LOCAL_FIRST = ours("once per rank, local rows first", *ONCE.changes, *LOCAL_FIRST.changes, overlap="full")
ONCE_GRAPH, ONCE_LOCAL_FIRST_GRAPH, ONCE_IN_CHUNKS_GRAPH, ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH = (
    ours(f"once per rank{form}, recorded", *changes, _GRAPH, overlap=overlap)
    for form, changes, overlap in (
        ("", ONCE.changes, "dw"),
        (", local rows first", ONCE_LOCAL_FIRST.changes, "full"),
        (", local rows first, 2 chunks", (*ONCE_LOCAL_FIRST.changes, *_TWO, ("moe_chunks_of", "tokens")), "full"),
        (
            ", local rows first, 2 chunks of experts",
            (*ONCE_LOCAL_FIRST.changes, *_TWO, ("moe_chunks_of", "experts")),
            "full",
        ),
    )
)
#: Those that replay what was recorded.
RECORDED = (
    *(STATIC_GRAPH, STATIC_LOCAL_FIRST_GRAPH),
    *(ONCE_GRAPH, ONCE_LOCAL_FIRST_GRAPH, ONCE_IN_CHUNKS_GRAPH, ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH),
)
ONCE_FP8 = ours("once per rank, fp8", *ONCE.changes, ("a2a_payload_dtype", "fp8"))
#: The newest Megatron's own overlap within a layer: experts' dW on a second stream beside the dispatch's backward.
OWN_OVERLAP = "overlap_dispatch_backward_with_experts_wgrad"
#: Forms of sending to other ranks.
_TO_OTHERS = (
    *(ONCE, PEER, ONCE_PEER, STATIC, STATIC_PEER, STATIC_GRAPH, ONCE_IN_CHUNKS, ONCE_FP8),
    *(LOCAL_FIRST, ONCE_LOCAL_FIRST, STATIC_LOCAL_FIRST, STATIC_LOCAL_FIRST_GRAPH, ONCE_NODE),
    *(ONCE_GRAPH, ONCE_LOCAL_FIRST_GRAPH, ONCE_IN_CHUNKS_GRAPH, ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH),
)
#: Forms that need other packages or a device's own ways, or round more, or are new there; where they fail they are left
#: out.
EXTRAS = (LEGACY, LEGACY_TORCH, TE, TE_OVERLAPPED, *(kind for kind in _TO_OTHERS if kind is not ONCE))
KINDS = {
    "stock-sequential": STOCK,
    "stock-grouped": LEGACY,
    "stock-grouped-torch": LEGACY_TORCH,
    "stock-te": TE,
    "stock-te-overlapped": TE_OVERLAPPED,
    "ours-plain": PLAIN,
    "ours-overlapped": OVERLAPPED,
    **{f"ours-{n}-chunks": kind for n, kind in IN_CHUNKS.items()},
    "ours-once": ONCE,
    "ours-once-node": ONCE_NODE,
    "ours-peer": PEER,
    "ours-once-peer": ONCE_PEER,
    "ours-static": STATIC,
    "ours-static-peer": STATIC_PEER,
    "ours-static-graph": STATIC_GRAPH,
    "ours-once-2-chunks": ONCE_IN_CHUNKS,
    "ours-local-first": LOCAL_FIRST,
    "ours-once-local-first": ONCE_LOCAL_FIRST,
    "ours-static-local-first": STATIC_LOCAL_FIRST,
    "ours-static-local-first-graph": STATIC_LOCAL_FIRST_GRAPH,
    "ours-once-fp8": ONCE_FP8,
    "ours-once-graph": ONCE_GRAPH,
    "ours-once-local-first-graph": ONCE_LOCAL_FIRST_GRAPH,
    "ours-once-2-chunks-graph": ONCE_IN_CHUNKS_GRAPH,
    "ours-once-2-expert-chunks-graph": ONCE_IN_CHUNKS_OF_EXPERTS_GRAPH,
}
#: What no single layer can show, and why.
NEVER = {
    "stock 1F1B merge": "Megatron merges two micro-batches over the layers of a whole model "
    "(overlap_moe_expert_parallel_comm)"
}
#: Not our kernels of this device: the stock form must not run them.
_TORCH = TorchKernels()
_TE_EXPERT = re.compile(r"^(.*experts)\.(linear_fc[12])\.weight(\d+)$")


def unavailable(kind: Kind, config: TrainConfig) -> str | None:
    """Why a kind cannot run here, or None."""
    if kind is TE_OVERLAPPED and OWN_OVERLAP not in {item.name for item in dataclasses.fields(TransformerConfig)}:
        return f"this megatron-core has no {OWN_OVERLAP} (0.19 has)"
    if kind in (TE, TE_OVERLAPPED):
        if importlib.util.find_spec("transformer_engine") is None:
            return "transformer_engine is not installed"
        return None if config.device != "cpu" else "Transformer Engine runs on CUDA alone"
    if kind in (LEGACY, LEGACY_TORCH):
        experts = importlib.import_module("megatron.core.transformer.moe.experts")
        if not hasattr(experts, "GroupedMLP"):
            return "this megatron-core has no GroupedMLP (0.16 was the last)"
        if config.dtype != "bf16":
            return "GroupedMLP takes bf16 alone; use --dtype bf16"
    if kind is LEGACY_TORCH and importlib.util.find_spec("grouped_gemm") is None:
        return "the package grouped_gemm is not installed, so stock GroupedMLP itself runs over torch"
    if kind in _TO_OTHERS and config.ep == 1:
        return "--ep 1: there is no other rank to send a token to"
    return None if ("moe_chunks_of", "tokens") in kind.changes else _unchunked(kind, config)


def _unchunked(kind: Kind, config: TrainConfig) -> str | None:
    """Why a kind in chunks cannot run here, or None."""
    n, local = dict(kind.changes).get("moe_chunks", 1), config.model().experts // config.ep
    return f"the {local} experts of a rank make no {n} chunks of equally many" if local % n else None


class LayerVariant(Variant):
    """A variant whose model has one layer; gradients and weights by stock names, TE's experts too."""

    def __init__(self, kind: Kind, config: TrainConfig, place: Place, weights: dict[str, Tensor] | None) -> None:
        super().__init__(kind, config, place, optimizer="none", reduce=False, build=_builder(kind))
        if kind.impl == "fluid":
            fuse_weight_gradients(self)
        self.layer: Any = unwrap(self.model).decoder.layers[0]  # type: ignore[union-attr, index]
        if weights is not None:
            _load(weights, self.weights())

    def gradients(self) -> dict[str, Tensor]:
        return stock_names(self.model, gradients_by_name(self.model))

    def weights(self) -> dict[str, Tensor]:
        return stock_names(self.model, weights_by_name(self.model))


def _builder(kind: Kind) -> Callable[[TrainConfig, Any, str], torch.nn.Module]:
    if kind in (LEGACY, LEGACY_TORCH):
        return partial(_with_legacy_experts, over_torch=kind is LEGACY_TORCH)
    if kind in (TE, TE_OVERLAPPED):
        return partial(_with_te_experts, own_overlap=kind is TE_OVERLAPPED)
    return build_model


def _with_legacy_experts(config: TrainConfig, model_config: Any, overlap: str, *, over_torch: bool) -> torch.nn.Module:
    from megatron.core.transformer.moe.experts import GroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    class LegacyExperts(GroupedMLP):
        """The stock class; where the package grouped_gemm is not to be had, its call is made of torch's own matmuls."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _grouped_gemm(over_torch):
                super().__init__(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _grouped_gemm(over_torch):
                return super().forward(*args, **kwargs)

    experts = ModuleSpec(module=LegacyExperts)
    return _gpt(config, dataclasses.replace(model_config, moe_grouped_gemm=True), experts)


def _with_te_experts(config: TrainConfig, model_config: Any, overlap: str, *, own_overlap: bool) -> torch.nn.Module:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    class FusedExperts(TEGroupedMLP):
        """Adds weight gradients to main_grad within TE's matmuls; Megatron's local linears need Apex for that."""

        def __init__(self, count: int, model_config: Any, *args: Any, **kwargs: Any) -> None:
            fused = dataclasses.replace(model_config, gradient_accumulation_fusion=True)
            super().__init__(count, fused, *args, **kwargs)

    moe = get_moe_module_spec(use_te=True, num_experts=config.model().experts, moe_grouped_gemm=True)
    stock = submodules_of(moe).experts
    experts = rebuilt(stock, FusedExperts, submodules_of(stock))
    changes = {"moe_grouped_gemm": True, "moe_permute_fusion": True, **({OWN_OVERLAP: True} if own_overlap else {})}
    return _gpt(config, dataclasses.replace(model_config, **changes), experts)


def _gpt(config: TrainConfig, model_config: Any, experts: Any) -> torch.nn.Module:
    """The stock model with these experts in its layers."""
    from megatron.core.models.gpt import GPTModel

    preset = config.model()
    (block,) = layer_specs(config, model_config, "off")
    for layer in block.layer_specs:
        submodules_of(layer.submodules.mlp).experts = experts
    return GPTModel(
        model_config,
        block,
        vocab_size=preset.vocab_size,
        max_sequence_length=preset.seq_length,
        position_embedding_type="rope",
        rotary_base=int(preset.rope_theta),
        rotary_percent=preset.rotary_percent,
    )


def stock_names(model: torch.nn.Module, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """``entries`` with TE's ``experts.linear_fc1.weight2`` renamed to ``experts.<global number>.linear_fc1.weight``."""
    experts = next(iter(moe_layers(model))).experts
    found = {}
    for name, value in entries.items():
        match = _TE_EXPERT.match(name)
        if match is not None:
            number = expert_rank(experts) * experts.num_local_experts + int(match.group(3))  # type: ignore[union-attr, operator]
            name = f"{match.group(1)}.{number}.{match.group(2)}.weight"
        found[name] = value
    return found


def _load(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source.keys() != target.keys():
        raise ValueError(f"bench layer: names of weights differ: {sorted(source.keys() ^ target.keys())[:6]}")
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


@contextmanager
def _grouped_gemm(over_torch: bool) -> Iterator[None]:
    """For the while, Megatron's GroupedMLP finds the package grouped_gemm or the same call made of torch's matmuls."""
    from megatron.core.transformer.moe import grouped_gemm_util

    if grouped_gemm_util.grouped_gemm is not None and not over_torch:
        yield
        return
    package = SimpleNamespace(ops=SimpleNamespace(gmm=_gmm))
    with mock.patch.multiple(grouped_gemm_util, grouped_gemm=package, ops=package.ops):
        yield


class _GroupedMatmul(torch.autograd.Function):
    """[R, K] by [L, K, N], one kernel a direction where torch has a grouped matmul."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.sizes = sizes
        return _TORCH.grouped_mm(a, b, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            _TORCH.grouped_mm(grad, b, ctx.sizes, trans_w=True),
            _TORCH.grouped_dw(a, grad, ctx.sizes),
            None,
        )


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm's call."""
    product: Tensor = _GroupedMatmul.apply(a, b.transpose(1, 2) if trans_b else b, batch_sizes.tolist())
    return product
