"""A tiny stock Megatron run that touches what the CPU patches are for: recompute, dropout, fp16 scaler, checkpoint."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.adaptor import select
from fluid_npu.adaptor.patch import Patch
from fluid_npu.adaptor.registry import Registry
from fluid_npu.adaptor.versions import installed_version
from tests.support import stock_extras

SEQ, BATCH, VOCAB = 8, 2, 32


def without_each(parts: dict[str, str]) -> dict[str, str]:
    """Leaves out one row after another and runs its part; maps its target to the error. '' maps to that of all rows.

    ``parts`` maps a target to the name of the part that needs its row: a function of ``stock_extras``, or
    ``train_once``. No error is ''. For ranks of an expert-parallel group of two.
    """
    rows = select(["cpu", "no_te"])
    whole = {*parts.values(), "load_in_parallel"}
    if str(installed_version("megatron-core")).startswith("0.12.") and not hasattr(np, "product"):
        whole.remove("load_in_parallel")  # 0.12 calls numpy.product there, which numpy 2 does not have
    outcome = {"": "".join(_try(rows, part) for part in sorted(whole))}
    for target, part in parts.items():
        outcome[target] = _try([row for row in rows if row.target != target], part)
    return outcome


def _try(rows: list[Patch], part: str) -> str:
    from megatron.core import parallel_state

    stock_extras.fresh_start()
    registry = Registry()
    registry.apply(rows)
    try:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
        (train_once if part == "train_once" else getattr(stock_extras, part))()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        parallel_state.destroy_model_parallel()
        registry.rollback()
        dist.barrier()


def train_once() -> None:
    """A stock run in each precision."""
    for dtype in (torch.float32, torch.float16):
        train_stock(dtype)


def train_stock(dtype: torch.dtype) -> None:
    """Two steps of a one-layer GPT with stock MoE layers, Megatron's DDP and optimizer; then a checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    stock_extras.seed(1)
    half = dtype == torch.float16
    config = stock_config(dtype)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    model: Any = GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=SEQ, position_embedding_type="rope")
    wrapped = Float16Module(config, model) if half else model
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    ddp = DistributedDataParallel(config, settings, wrapped)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, fp16=half, params_dtype=dtype, clip_grad=1.0), [ddp])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for _ in range(2):
        ddp.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([None]),
            model=[ddp],
            num_microbatches=1,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
    folder = [tempfile.mkdtemp(prefix="fluid-stock-")]
    dist.broadcast_object_list(folder, src=0)
    dist_checkpointing.save(model.sharded_state_dict(), folder[0])
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder[0]))


def stock_config(dtype: torch.dtype) -> Any:
    """One layer, dropout and recompute on, so that the random state tracker is used."""
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=16,
        moe_ffn_hidden_size=16,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=0.001,
        moe_shared_expert_intermediate_size=16,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=2,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.1,
        hidden_dropout=0.1,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        gradient_accumulation_fusion=True,
        persist_layer_norm=False,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
    )


def _forward_step(_iterator: Any, model: Any) -> Any:
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    positions = torch.arange(SEQ)[None].expand(BATCH, SEQ)
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu_(1)
    losses = model(tokens, positions, mask, labels=tokens)
    return losses, lambda out: (out.float().mean(), {"loss": out.detach().float().mean()})
