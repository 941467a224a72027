"""From a preset to Megatron's configuration and GPTModel.

Megatron's ``use_cpu_initialization`` stays False on every device: True gives all expert-parallel ranks the same
experts. Without Transformer Engine the local layer specs are used; attention is Megatron's
DotProductAttention, with ``impl=fluid`` behind the device's fused operator where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from fluid_npu.device import get_device
from fluid_npu.train.config import ConfigError, TrainConfig
from fluid_npu.train.latent_attention import FluidLatentDotProductAttention, LatentDotProductAttention
from fluid_npu.train.presets import Preset

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model_config(config: TrainConfig, dtype: str) -> TransformerConfig:
    """Megatron's configuration of the run's model. ``dtype`` is a key of ``TORCH_DTYPES``."""
    preset = config.model()
    arguments = {**_sizes(preset), **_router(preset), **_parallel(config), **_precision(dtype), **_FIXED, **_fusion()}
    if preset.mla is not None:
        return MLATransformerConfig(**arguments, **_mla(preset))
    return TransformerConfig(**arguments)


def build_model(config: TrainConfig, model_config: TransformerConfig, overlap: str) -> GPTModel:
    """This rank's part of a model whose pipeline stages are one chunk each."""
    (model,) = build_chunks(config, model_config, overlap)
    return model


def build_chunks(config: TrainConfig, model_config: TransformerConfig, overlap: str) -> list[GPTModel]:
    """This rank's chunks of the model. ``overlap`` is 'off', 'dw' or 'full'; stock Megatron ignores it."""
    preset = config.model()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [
        GPTModel(
            model_config,
            spec,
            vocab_size=padded_vocab(preset.vocab_size, config.tp),
            max_sequence_length=preset.seq_length,
            pre_process=rank == 0 and stage == 0,
            post_process=rank == config.pp - 1 and stage == config.vpp - 1,
            position_embedding_type="rope",
            rotary_base=int(preset.rope_theta),
            rotary_percent=preset.rotary_percent,
            share_embeddings_and_output_weights=preset.tie_embeddings,
            **_chunk(config, stage),
        )
        for stage, spec in enumerate(layer_specs(config, model_config, overlap))
    ]


def padded_vocab(entries: int, tp: int) -> int:
    """Vocabulary rounded up to what tensor parallelism can split."""
    return -(-entries // tp) * tp


def moe_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model's MoE layers in order."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return (module for module in model.modules() if isinstance(module, MoELayer))


def shared_experts(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The shared experts of the MoE layers that have some."""
    found = (getattr(layer, "shared_experts", None) for chunk in chunks for layer in moe_layers(chunk))
    return [module for module in found if module is not None]


def layer_specs(config: TrainConfig, model_config: TransformerConfig, overlap: str) -> Iterator[Any]:
    """One per chunk, with one scheduler for all. Made as the chunks are built."""
    make = _stock_spec if config.impl == "stock" else _fluid_spec(config, overlap)
    for stage in range(config.vpp):
        block = make(model_config, **_chunk(config, stage))
        if config.model().mla is not None:
            core = LatentDotProductAttention if config.impl == "stock" else FluidLatentDotProductAttention
            for layer in block.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = core
        yield block


def _chunk(config: TrainConfig, stage: int) -> dict[str, int]:
    """Without virtual stages nothing is said: Megatron 0.12 does not know the argument."""
    return {"vp_stage": stage} if config.vpp > 1 else {}


def _fluid_spec(config: TrainConfig, overlap: str) -> Callable[..., Any]:
    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec

    binder = SchedulerBinder(
        overlap,
        carry_over=config.carry_over,
        transport=_transport(config),
        dispatch=config.dispatch,
        chunks=config.moe_chunks if overlap == "full" else "auto",
        chunks_of=config.moe_chunks_of if overlap == "full" else "auto",
        local_first=config.local_first and overlap == "full",
        attention_chunks=int(config.attention_chunks),  # 'auto' was settled before the model is built
        interleave_batches=config.interleave_batches,
        payload_dtype=config.a2a_payload_dtype,
        cuda_graph=config.moe_cuda_graph,
        node_size=_node_size(config),
    )
    return partial(get_fluid_moe_block_spec, backend="local", binder=binder)


def _stock_spec(model_config: TransformerConfig, **chunk: int) -> Any:
    return get_gpt_decoder_block_spec(
        model_config, use_transformer_engine=False, normalization=model_config.normalization, **chunk
    )


def _transport(config: TrainConfig) -> Any:
    """What ``--a2a-transport`` chooses, behind the planted delay if there is one; a collective call unless default."""
    from fluid_npu.comm.transports import DelayedTransport
    from fluid_npu.comm.transports.calibration import Calibration
    from fluid_npu.comm.transports.choose import choose_transport

    tokens, hidden, topk, itemsize = _exchange_sizes(config)
    chosen = choose_transport(
        config.a2a_transport,
        [parallel_state.get_expert_model_parallel_group(), parallel_state.get_context_parallel_group()],
        get_device(config.device).value,
        Calibration(Path(config.out) / "transports.json" if config.out else None),
        bytes_to_peers=tokens * topk * hidden * itemsize * (config.ep - 1) // config.ep,
        timeout_s=config.timeout,
        node_size=config.a2a_node_size,
        ctas=config.a2a_ctas,
    ).value
    return DelayedTransport(chosen, config.plant_delay_ms) if config.plant_delay_ms else chosen


def _node_size(config: TrainConfig) -> int:
    """Ranks of a node for a dispatch by nodes; 0 where the transport alone may know. Collective where it must."""
    from fluid_npu.comm.transports.nodes import agreed_node_size
    from fluid_npu.mcore.dispatch_choice import lacks_nodes, nodes_for

    if config.dispatch == "once-per-node" and config.ep > 1:
        size = agreed_node_size(config.a2a_node_size).value
        ranks = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
        missing = lacks_nodes(nodes_for(config.dispatch, ranks, size))
        if missing:
            raise ConfigError(f"--dispatch once-per-node: {missing}; use another size, or --dispatch once-per-rank")
        return size
    return config.a2a_node_size if config.dispatch == "auto" else 0


def _exchange_sizes(config: TrainConfig) -> tuple[int, int, int, int]:
    """Tokens of a rank, hidden size, experts of a token, bytes of a number."""
    preset = config.model()
    tokens = preset.micro_batch_size * preset.seq_length // (config.tp * config.cp)
    dtype = config.dtype or ("fp32" if get_device(config.device).value.name == "cpu" else "bf16")
    return tokens, preset.hidden, preset.topk, TORCH_DTYPES[dtype].itemsize


_FIXED: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "deterministic_mode": False,
}


def _sizes(p: Preset) -> dict[str, Any]:
    return {
        "num_layers": p.layers,
        "hidden_size": p.hidden,
        "ffn_hidden_size": p.ffn,
        "moe_ffn_hidden_size": p.moe_ffn,
        "num_attention_heads": p.heads,
        "num_query_groups": p.kv_heads,
        "kv_channels": p.channels,
        "normalization": p.normalization,
        "layernorm_epsilon": p.norm_epsilon,
        "add_qkv_bias": p.qkv_bias,
        "qk_layernorm": p.qk_layernorm or p.mla is not None,
        "moe_shared_expert_intermediate_size": p.shared_expert_ffn,
        "moe_layer_freq": [0] * p.first_dense_layers + [1] * p.moe_layers,
    }


def _router(p: Preset) -> dict[str, Any]:
    return {
        "num_moe_experts": p.experts,
        "moe_router_topk": p.topk,
        "moe_router_score_function": p.score_function,
        "moe_router_enable_expert_bias": p.expert_bias,
        "moe_router_num_groups": p.router_groups,
        "moe_router_group_topk": p.group_topk,
        "moe_router_topk_scaling_factor": p.topk_scaling_factor,
        "moe_router_pre_softmax": p.pre_softmax,
        "moe_router_load_balancing_type": "aux_loss" if p.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": p.aux_loss_coeff,
        "moe_router_dtype": "fp32",
    }


def _parallel(config: TrainConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": config.tp,
        "pipeline_model_parallel_size": config.pp,
        **_interleaved(config),
        "context_parallel_size": config.cp,
        "expert_model_parallel_size": config.ep,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": config.tp > 1,
    }


def _interleaved(config: TrainConfig) -> dict[str, Any]:
    """With two stages a rank's neighbours before and after are one: only these settings keep its messages apart."""
    if config.vpp == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": config.vpp,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _fusion() -> dict[str, Any]:
    """dW straight into main_grad, where Megatron's linears can: Apex on CUDA, our stand-in on a CPU."""
    from megatron.core.tensor_parallel import layers

    return {"gradient_accumulation_fusion": bool(layers._grad_accum_fusion_available)}


def _precision(dtype: str) -> dict[str, Any]:
    chosen = TORCH_DTYPES[dtype]
    return {
        "params_dtype": chosen,
        "pipeline_dtype": chosen,
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
    }


def _mla(p: Preset) -> dict[str, Any]:
    assert p.mla is not None
    return {
        "multi_latent_attention": True,
        "q_lora_rank": p.mla.q_lora_rank,
        "kv_lora_rank": p.mla.kv_lora_rank,
        "qk_head_dim": p.mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": p.mla.qk_rope_head_dim,
        "v_head_dim": p.mla.v_head_dim,
        "rope_type": "rope",
        "rotary_base": p.rope_theta,
    }
