"""Layer Specs: the default door. Nothing global changes; Megatron builds our modules where the spec names them."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from fluid_npu.device.choice import Choice
from fluid_npu.mcore.attention import FluidDotProductAttention
from fluid_npu.mcore.binding import SchedulerBinder
from fluid_npu.mcore.chunk_choice import AUTO
from fluid_npu.mcore.experts import FluidGroupedMLP
from fluid_npu.mcore.linear import FluidColumnParallelLinear, FluidRowParallelLinear
from fluid_npu.mcore.lines.moe_layer import ROUTER_IN_SPEC
from fluid_npu.mcore.lines.specs import hides_groups, module_of, rebuilt, submodules_of
from fluid_npu.mcore.moe_layer import FluidMoELayer
from fluid_npu.mcore.norm import FluidNorm
from fluid_npu.mcore.router import FluidRouter
from fluid_npu.mcore.self_attention import FLUID_ATTENTION
from fluid_npu.mcore.transformer_layer import FluidTransformerLayer
from fluid_npu.probes import installed

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing itself from Python 3.11 on

    from fluid_npu.mcore.engine_arguments import EngineArguments

_LINEARS: dict[Any, type] = {ColumnParallelLinear: FluidColumnParallelLinear, RowParallelLinear: FluidRowParallelLinear}
_ANY_EXPERTS = 2  # Megatron's helper only asks whether there are experts; their number comes from the config.


def get_fluid_moe_layer_spec(
    config: TransformerConfig | None = None, *, backend: str = "auto", **engine: Unpack[EngineArguments]
) -> ModuleSpec:
    """The spec of a transformer layer with a FluidMoELayer, for ``GPTModel(transformer_layer_spec=...)``.

    Args:
        config: read for the norm, QK norm and multi-latent attention; None means RMSNorm without QK norm.
        backend: 'local' or 'te' for the modules around the MoE layer; 'auto' takes te where it is installed.
        engine: what is overlapped and how tokens travel; ``mcore.engine_arguments`` lists them, all optional.

    For Megatron's multi-token prediction take ``get_fluid_moe_block_spec``: its helper accepts Megatron's own
    TransformerLayer alone as a layer's spec.

    Raises:
        ValueError: an unknown overlap, dispatch, number of chunks or backend.
        TypeError: an unknown argument.
    """
    return with_fluid_moe(_layer_spec(config, choose_backend(backend).value), SchedulerBinder(**engine))


def get_fluid_moe_block_spec(
    config: TransformerConfig,
    *,
    backend: str = "auto",
    vp_stage: int | None = None,
    binder: SchedulerBinder | None = None,
    **engine: Unpack[EngineArguments],
) -> TransformerBlockSubmodules:
    """The specs of all layers of a pipeline stage, for models with dense layers too (``moe_layer_freq``).

    Arguments as ``get_fluid_moe_layer_spec``; ``vp_stage`` is the chunk of an interleaved pipeline. Chunks whose specs
    are made with one ``binder`` share a scheduler; it then stands for ``engine``, of which nothing may be given beside
    it (ValueError).
    """
    if binder is not None and engine:
        raise ValueError(f"binder: {', '.join(engine)} beside it would have no effect; give them to SchedulerBinder")
    use_te = choose_backend(backend).value == "te"
    block = get_gpt_decoder_block_spec(config, use_te, normalization=config.normalization, **_chunk(vp_stage))
    return with_fluid_block(block, SchedulerBinder(**engine) if binder is None else binder)


def with_fluid_block(block: TransformerBlockSubmodules, binder: SchedulerBinder) -> TransformerBlockSubmodules:
    """A copy of a block's spec with ``with_fluid_moe`` applied to every layer, and our final norm."""
    block = copy.copy(block)
    block.layer_specs = [with_fluid_moe(layer, binder) for layer in block.layer_specs]
    if block.layer_norm is WrappedTorchNorm:
        block.layer_norm = FluidNorm
    return block


def with_fluid_moe(layer: ModuleSpec, binder: SchedulerBinder) -> ModuleSpec:
    """A copy of a layer's spec with our MoE layer, where it has one, our self-attention and core, our norms, and with
    carry-over our linears.

    Every door into fluid_npu builds its modules with this function. Layers of one model share a ``binder``.
    """
    layer = copy.copy(layer)
    layer.submodules = copy.copy(layer.submodules)
    mlp = layer.submodules.mlp
    linears = _takes_linears(layer, binder)
    if module_of(mlp) is MoELayer:
        layer.submodules.mlp = fluid_moe_spec(mlp, binder, linears)
        if layer.module is TransformerLayer and hides_groups(mlp):
            layer.module = FluidTransformerLayer
        if binder.interleave_batches:
            _interleave(layer)
    elif linears and module_of(mlp) is not None and _has_linears(submodules_of(mlp)):
        layer.submodules.mlp = _with_linears(mlp)
    if linears:
        layer.module = FluidTransformerLayer
        layer.params = {**layer.params, "binder": binder}
    _replace_norms(layer.submodules)
    attention = layer.submodules.self_attention
    inside = submodules_of(attention)
    if inside is not None:
        inside = copy.copy(inside)
        _replace_norms(inside)
        if getattr(inside, "core_attention", None) is DotProductAttention:
            inside.core_attention = FluidDotProductAttention
        if linears:
            _replace_linears(inside)
        ours = FLUID_ATTENTION.get(module_of(attention))
        if ours is not None and getattr(inside, "core_attention", None) is FluidDotProductAttention:
            chunks = {"attention_chunks": binder.attention_chunks} if binder.attention_chunks != 1 else {}
            layer.submodules.self_attention = rebuilt(attention, ours, inside, binder=binder, **chunks)
        else:
            if module_of(attention) not in FLUID_ATTENTION.values():
                _check_chunks(binder.attention_chunks, attention, inside)
            layer.submodules.self_attention = rebuilt(attention, module_of(attention), inside)
    return layer


def _check_chunks(asked: int | str, attention: Any, inside: Any) -> None:
    """Of an attention that is not ours. Raises ValueError where chunks of its heads are asked for; 'auto' is told."""
    core = getattr(inside, "core_attention", None)
    why = (
        f"the layer has {_name(module_of(attention))} with {_name(core)}, not Megatron's SelfAttention with "
        "DotProductAttention"
    )
    if asked == AUTO:
        Choice(1, why).announce("attention_chunks='auto'")
    elif asked != 1:
        raise ValueError(f"attention_chunks={asked}: {why}; use backend='local' or attention_chunks=1")


def _interleave(layer: ModuleSpec) -> None:
    """In place: the layer trains in halves. Raises ValueError for a layer whose steps are not known."""
    if layer.module not in (TransformerLayer, FluidTransformerLayer):
        raise ValueError(
            f"interleave_batches=True: {_name(layer.module)} is not Megatron's TransformerLayer; use "
            "interleave_batches=False"
        )
    layer.module = FluidTransformerLayer
    layer.params = {**layer.params, "interleave_batches": True}


def _name(module: Any) -> str:
    return getattr(module, "__name__", str(module))


def _replace_norms(submodules: Any) -> None:
    """In place: Megatron's torch norms become ours, which sequence parallelism and an NPU's operator need."""
    for name, module in vars(submodules).items():
        if module is WrappedTorchNorm:
            setattr(submodules, name, FluidNorm)


def _takes_linears(layer: ModuleSpec, binder: SchedulerBinder) -> bool:
    """Whether all of a layer's linears become ours: with carry-over alone is there a flight that their dW could fill.

    Under context parallelism ``FluidSelfAttention`` takes its output projection by itself, whose exchanges follow.
    """
    if not binder.carry_over:
        return False
    what = "linear layers under carry_over"
    if layer.module is not TransformerLayer:
        reason = f"{getattr(layer.module, '__name__', layer.module)} is not Megatron's TransformerLayer"
        Choice("left as they are", reason).announce(what)
        return False
    if not _has_linears(submodules_of(layer.submodules.self_attention)):
        Choice("left as they are", "attention has none of Megatron's local linears").announce(what)
        return False
    Choice("Fluid", "their dW may run beside the combine of the layer below").announce(what)
    return True


def _has_linears(submodules: Any) -> bool:
    """Whether Megatron's parallel linears are among them."""
    values = vars(submodules).values() if submodules is not None else ()
    return any(isinstance(value, type) and value in _LINEARS for value in values)


def _with_linears(spec: Any) -> Any:
    """A copy of the spec of a module with linears, such as MLP, with ours."""
    inside = copy.copy(submodules_of(spec))
    _replace_linears(inside)
    return rebuilt(spec, module_of(spec), inside)


def _replace_linears(submodules: Any) -> None:
    """In place: Megatron's parallel linears become ours, but for those whose class latent attention checks."""
    for name, module in vars(submodules).items():
        if isinstance(module, type) and module in _LINEARS and not name.endswith("_down_proj"):
            setattr(submodules, name, _LINEARS[module])


def fluid_moe_spec(moe: Any, binder: SchedulerBinder, linears: bool = False) -> Any:
    """Megatron's spec of an MoE layer with our layer, experts and router in it; shared experts stay.

    With ``linears`` the linears of shared experts are ours too.

    A ModuleSpec gives a ModuleSpec, a functools.partial (0.17 and later) a partial. A router that a user put there
    stays too. Whatever experts the spec had are replaced: from 0.17 on Megatron's local spec ignores
    ``moe_grouped_gemm``.
    """
    submodules = copy.copy(submodules_of(moe))
    if ROUTER_IN_SPEC and submodules.router is TopKRouter:
        submodules.router = FluidRouter
    submodules.experts = ModuleSpec(module=FluidGroupedMLP)
    if linears and submodules.shared_experts is not None:
        submodules.shared_experts = _with_linears(submodules.shared_experts)
    return rebuilt(moe, FluidMoELayer, submodules, binder=binder)


def _chunk(vp_stage: int | None) -> dict[str, Any]:
    """How Megatron's block helper learns the chunk of an interleaved pipeline: an argument, on 0.12 a global."""
    if "vp_stage" in inspect.signature(get_gpt_decoder_block_spec).parameters:
        return {"vp_stage": vp_stage}
    current = parallel_state.get_virtual_pipeline_model_parallel_rank()
    if vp_stage is not None and vp_stage != current:
        raise ValueError(
            f"vp_stage={vp_stage}: this megatron-core reads the chunk from parallel_state, which says {current}; call "
            f"parallel_state.set_virtual_pipeline_model_parallel_rank({vp_stage}) first"
        )
    return {}


def choose_backend(backend: str) -> Choice[str]:
    """'te' or 'local', with the reason. Raises ValueError for another word."""
    if backend not in ("auto", "te", "local"):
        raise ValueError(f"backend={backend!r}: allowed are 'auto', 'te', 'local'")
    if backend != "auto":
        return Choice(backend, "as asked")
    found, reason = installed("transformer_engine")
    return Choice("te" if found else "local", reason)


def _layer_spec(config: TransformerConfig | None, backend: str) -> ModuleSpec:
    qk_layernorm = bool(config and config.qk_layernorm)
    latent = bool(config and config.multi_latent_attention)
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=_ANY_EXPERTS, qk_layernorm=qk_layernorm, multi_latent_attention=latent
        )
    return get_gpt_layer_local_spec(
        num_experts=_ANY_EXPERTS,
        qk_layernorm=qk_layernorm,
        multi_latent_attention=latent,
        normalization=config.normalization if config else "RMSNorm",
    )
