"""Two halves of a micro-batch in one layer, so that the AllToAlls of one run beside the computation of the other.

    communication                  DA           DB          CA          CB
    compute          attention A   attention B  experts A   experts B   sums A, B

A and B are the first and the second half of the samples, D and C dispatch and combine. The backward is the mirror image
by itself: autograd runs nodes in the reverse order of their creation, the wait's node launches the reverse exchange and
the launch's node waits for it.

Each half is routed by itself, with an auxiliary loss of half the weight: a step is that of two micro-batches of half
the size. What both halves keep for the backward is what one piece keeps; more is what is in flight of both at a time,
one dispatch of a half. The combine of B has nothing of its layer beside it. S sequence, B samples, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from fluid_npu.mcore.moe_layer import FluidMoELayer
from fluid_npu.mcore.router import FluidRouter

_WHOLE = "use interleave_batches=False"
#: Arguments of a layer that belong to samples and are not cut, and the fix.
_UNCUT = {
    "packed_seq_params": "packed sequences have no samples to halve",
    "padding_mask": "a padding mask is not cut",
    "attention_bias": "an attention bias is not cut",
    "context": "cross attention is not cut",
}


def prepare(layer: Any) -> None:
    """Makes a whole layer ready for ``in_halves``. Raises ValueError, naming option and fix, where that cannot be."""
    found = _obstacle(layer)
    if found is not None:
        raise ValueError(f"interleave_batches=True: {found}; {_WHOLE}")
    if isinstance(layer.mlp.router, FluidRouter):
        layer.mlp.router.share_of_batch = 0.5


def in_halves(layer: Any, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
    """``([S, B, H], None)`` of ``[S, B, H]``. ``arguments`` as TransformerLayer's.

    Raises ValueError for an odd number of samples, and for arguments that cannot be halved.
    """
    samples = hidden_states.shape[1]
    _check(samples, arguments)
    arguments.pop("dynamic_inference_decode_only", None)
    moe: FluidMoELayer = layer.mlp
    started: list[tuple[Tensor, Any]] = []
    for number, half in enumerate(hidden_states.chunk(2, dim=1)):
        attended, _ = layer._forward_attention(half.contiguous(), **_of_half(arguments, number, samples))
        started.append((attended, moe.start(layer._forward_pre_mlp_layernorm(attended), number)))
    computed = [(residual, moe.compute(sent, number)) for number, (residual, sent) in enumerate(started)]
    halves = [layer._forward_post_mlp((moe.complete(sent), None), residual) for residual, sent in computed]
    return torch.cat(halves, dim=1), None


def _of_half(arguments: dict[str, Any], number: int, samples: int) -> dict[str, Any]:
    mask = arguments.get("attention_mask")
    if mask is None or mask.shape[0] != samples:
        return arguments
    return {**arguments, "attention_mask": mask.chunk(2)[number]}


def _check(samples: int, arguments: dict[str, Any]) -> None:
    if samples % 2:
        raise ValueError(
            f"interleave_batches=True: a micro-batch of {samples} samples has no halves; use an even micro-batch size, "
            "or interleave_batches=False"
        )
    for name, why in _UNCUT.items():
        if arguments.get(name) is not None:
            raise ValueError(f"interleave_batches=True with {name}: {why}; {_WHOLE}")


def _obstacle(layer: Any) -> str | None:
    """What keeps this layer from running in halves; None for nothing."""
    config, moe = layer.config, layer.mlp
    if not hasattr(layer, "_forward_post_mlp"):
        return "the TransformerLayer of this megatron-core has its MLP in one piece (from 0.16 on it has not)"
    if not isinstance(moe, FluidMoELayer) or not moe.steps:
        return f"the layer's MLP is {type(moe).__name__} without steps; moe_token_dispatcher_type must be 'alltoall'"
    if not isinstance(layer.cross_attention, IdentityOp):
        return "cross attention is not cut"
    recomputed = set(config.recompute_modules or []) if config.recompute_granularity == "selective" else set()
    if config.recompute_granularity == "full" or recomputed & {"moe", "mlp", "layernorm"}:
        return (
            f"recompute_granularity={config.recompute_granularity!r} with recompute_modules={sorted(recomputed)} "
            "repeats a layer's steps as one; recompute core_attn, moe_act or shared_experts instead"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        return "tensor parallelism without sequence_parallel does not train MoE layers; set sequence_parallel"
    for option, plain in _PLAIN.items():
        if getattr(config, option, plain[0]) not in plain:
            return f"{option}={getattr(config, option)!r} is not implemented"
    return _loss_obstacle(config, moe)


#: Options that change a layer's steps, and their values without effect; not every line has each of them.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "fp32_residual_connection": (False,),
    "cuda_graph_impl": ("none", None),
    "enable_cuda_graph": (False,),
    "fine_grained_activation_offloading": (False,),
    "moe_z_loss_coeff": (None, 0, 0.0),
}


def _loss_obstacle(config: Any, moe: FluidMoELayer) -> str | None:
    """An auxiliary loss that is not simply half as much for each half."""
    kinds = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    if not any(coefficients if isinstance(coefficients, list) else [coefficients]):
        return None
    if "global_aux_loss" in (kinds if isinstance(kinds, list) else [kinds]):
        return "global_aux_loss counts calls of the router as micro-batches"
    if config.calculate_per_token_loss:
        return "calculate_per_token_loss=True weighs an auxiliary loss by tokens"
    if not isinstance(moe.router, FluidRouter):
        return (
            f"the router is {type(moe.router).__name__}, whose auxiliary loss is not halved; set moe_aux_loss_coeff=0"
        )
    return None
