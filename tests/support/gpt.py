"""Small GPT models of the same weights, stock and Fluid, under Megatron's DDP; steps, losses and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.device import can_fuse, here

VOCAB, SEQUENCE, BATCH = 64, 16, 2

#: A configuration without auxiliary losses, recompute or drops.
BASE: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    moe_ffn_hidden_size=48,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_token_dispatcher_type="alltoall",
    moe_grouped_gemm=True,
    moe_router_load_balancing_type="none",
    gated_linear_unit=True,
    add_bias_linear=False,
    normalization="RMSNorm",
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_activation_fusion=False,
    moe_router_dtype="fp32",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. ``impl`` is stock (SequentialMLP), grouped (legacy GroupedMLP), off, dw or twin."""

    impl: str = "dw"
    ep: int = 2
    steps: int = 3
    micro_batches: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    distributed_optimizer: bool = False
    spec: dict[str, Any] = field(default_factory=dict)
    block: bool = False
    seed: int = 3
    one_batch: bool = False
    """The same tokens at every step, which a model can learn."""
    checkpoint: str = ""
    """A file of weights by global name; empty: random weights, the same for every implementation."""


def make_config(run: Run) -> Any:
    """The TransformerConfig of a run."""
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp, etp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    sizes = dict(
        expert_model_parallel_size=run.ep,
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
        activation_func=F.silu,
        gradient_accumulation_fusion=can_fuse(),
    )
    return TransformerConfig(**{**BASE, **sizes, **run.config})


def make_model(run: Run, config: Any) -> Any:
    """This rank's GPTModel, stock (SequentialMLP) or Fluid."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec, get_fluid_moe_layer_spec

    if run.impl in ("stock", "grouped"):
        if run.impl == "grouped":
            # Megatron's grouped experts need a CUDA package: they can be built here, not run.
            from megatron.core.transformer.moe import grouped_gemm_util

            grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
        grouped, config.moe_grouped_gemm = config.moe_grouped_gemm, run.impl == "grouped"
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        config.moe_grouped_gemm = grouped
    else:
        overlap = "off" if run.impl == "off" else "dw"
        make = get_fluid_moe_block_spec if run.block else get_fluid_moe_layer_spec
        spec = make(config, **{"overlap": overlap, **run.spec})
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return here(model)


def fill(model: Any, run: Run) -> None:
    """The same weights for every implementation and every rank that holds the parameter, by its global name."""
    import zlib

    from megatron.core import parallel_state

    from fluid_npu.mcore.convert import weights_by_name

    tp, etp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    etp_size = parallel_state.get_expert_tensor_parallel_world_size()
    with torch.no_grad():
        for name, value in weights_by_name(model).items():
            if value.is_floating_point() and value.dim() > 1:
                generator = torch.Generator().manual_seed(run.seed + zlib.crc32(name.encode()))
                rank, size = (etp, etp_size) if ".experts." in name else (tp, tp_size)
                dim = shard_dim(name)
                shape = list(value.shape)
                if dim is not None:
                    shape[dim] *= size
                value.copy_(shard(name, torch.randn(shape, generator=generator) * 0.1, rank, size))


def shard_dim(name: str) -> int | None:
    """The dimension that tensor parallelism splits, None for a whole parameter."""
    if any(part in name for part in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")):
        return 0
    return 1 if any(part in name for part in ("linear_proj", "linear_fc2")) else None


def shard(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A tensor rank's part: gated FC1 holds a part of the gate and a part of the value."""
    dim = shard_dim(name)
    if dim is None or size == 1:
        return whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank].contiguous()


def batch(rank: int, step: int, micro: int) -> dict[str, torch.Tensor]:
    """Random tokens of one micro-batch of a rank."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    # Positions that attend to the same token alone have the same hidden state, and which of them an expert with a
    # capacity drops would be a matter of the processor's last bit.
    tokens[1, 0] = (tokens[1, 0] + (tokens[1, 0] == tokens[0, 0])) % VOCAB
    tokens[:, 1] = (tokens[:, 1] + (tokens[:, 1] == tokens[:, 0])) % VOCAB
    made = {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, SEQUENCE),
        "attention_mask": torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE), diagonal=1).bool(),
    }
    return {name: here(value) for name, value in made.items()}


def train(run: Run) -> dict[str, Any]:
    """Trains and returns losses, the last step's gradients and the final weights, by global parameter name."""
    import contextlib

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from fluid_npu.mcore.convert import gradients_by_name, load_weights, weights_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    config = make_config(run)
    model = make_model(run, config)
    if run.checkpoint:
        load_weights(torch.load(run.checkpoint), model)
    else:
        fill(model, run)
    ddp_config = DistributedDataParallelConfig(
        **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": run.distributed_optimizer, **run.ddp}
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=run.optimizer,
            lr=0.05 if run.optimizer == "sgd" else 1e-2,
            weight_decay=0.0,
            clip_grad=1.0,
            use_distributed_optimizer=run.distributed_optimizer,
            sgd_momentum=0.0,
            **({"overlap_param_gather": True} if run.ddp.get("overlap_param_gather") else {}),
        ),
        [ddp],
    )
    scheduler = None if run.impl == "stock" else get_backward_scheduler(ddp)
    if scheduler is not None:
        scheduler.recorder.enabled = True
    data_rank = parallel_state.get_data_parallel_rank()
    losses, norms, grads = [], [], {}
    for step in range(run.steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for micro in range(run.micro_batches):
            last = micro == run.micro_batches - 1
            with contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(ddp.no_sync())
                if run.impl == "twin":
                    stack.enter_context(scheduler.serialise())
                loss = ddp(**batch(data_rank, 0 if run.one_batch else step, micro)).float().mean() / run.micro_batches
                loss.backward()
            if scheduler is not None:
                assert scheduler.pending == 0, "dW left over when backward() returned"
        finalize_model_grads([ddp])
        if not run.distributed_optimizer:
            grads = {name: grad.clone() for name, grad in gradients_by_name(ddp).items()}
        ok, norm, _ = optimizer.step()
        assert ok
        losses.append(loss.item())
        norms.append(float(norm))
    if run.ddp.get("overlap_param_gather"):
        ddp.start_param_sync(force_sync=True)
    records = scheduler.recorder.take() if scheduler else []
    return {
        "losses": losses,
        "norm": float(norm),
        "norms": norms,
        "grads": grads,
        "weights": {name: value.clone() for name, value in weights_by_name(ddp).items()},
        "regions": {r.name: r.detail["region"] for r in records if r.kind == "dw"},
        "order": [f"{r.kind} {r.name}" for r in records],
        "stats": scheduler.get_stats() if scheduler else {},
        "rank": dist.get_rank(),
    }


def train_all(runs: list[Run]) -> list[dict[str, Any]]:
    """Several runs one after the other in the same processes."""
    return [train(run) for run in runs]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors differ in any bit, or that only one side has."""
    names = sorted(set(a) | set(b))
    return [name for name in names if name not in a or name not in b or not torch.equal(a[name], b[name])]


def check_trained(ours: dict[str, Any], stock: dict[str, Any], twin: dict[str, Any], tolerance: float) -> None:
    """Losses, gradients and weights of a run are those of stock within the tolerance, and bit for bit its twin's."""
    import pytest

    assert ours["losses"] == pytest.approx(stock["losses"], rel=tolerance), (ours["losses"], stock["losses"])
    assert ours["losses"] == twin["losses"], (ours["losses"], twin["losses"])
    for name in ("grads", "weights"):
        far, differ = far_apart(ours[name], stock[name], tolerance), same_bits(ours[name], twin[name])
        assert not far and not differ, (name, far, differ)


def far_apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> dict[str, float]:
    """Names whose relative Frobenius difference exceeds the tolerance; b is the reference."""
    from tests.support.moe import relative

    names = sorted(set(a) | set(b))
    errors = {name: relative(a[name], b[name]) if name in a and name in b else float("inf") for name in names}
    return {name: error for name, error in errors.items() if error > tolerance}
