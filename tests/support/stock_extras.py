"""What else of stock Megatron the CPU patches are for, beside training: each part fails without the rows it needs.

Called on every rank of an expert-parallel group of two, under the patches of the caller.
"""

from __future__ import annotations

import inspect
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def fresh_start() -> None:
    """Forgets what Megatron keeps for the life of a process, so that each run meets it anew."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.utils import get_default_causal_mask

    getattr(get_default_causal_mask, "cache_clear", lambda: None)()
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None
    filesystem_async._results_queue = None
    _moe_losses().clear()
    for helper in multiprocessing.active_children():
        helper.terminate()
        helper.join()


def _moe_losses() -> Any:
    """Where the line keeps the losses of MoE layers for the log."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # 0.18 and later
        return moe_utils.get_moe_metrics_tracker().metrics
    home: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    return home.get_moe_layer_wise_logging_tracker()


def seed(value: int) -> None:
    """Megatron's random states with a new tracker; 0.12 has no argument for that and keeps the first."""
    from megatron.core.tensor_parallel import random

    options: dict[str, Any] = {"force_reset_rng": True}
    if "force_reset_rng" not in inspect.signature(random.model_parallel_cuda_manual_seed).parameters:
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED, options = False, {}
    random.model_parallel_cuda_manual_seed(value, **options)


def compiles_nothing() -> None:
    """What Megatron's jit_fuser marks runs eagerly: the first step would wait for a compiler."""
    compiled = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    torch._dynamo.reset()
    assert not compiled, "torch.compile has compiled"


def seeds_repeat() -> None:
    """The default generator is seeded with the named ones: what draws from it outside of them is reproducible."""
    draws = []
    for _ in range(2):
        seed(5)
        draws.append(torch.rand(4))
    assert torch.equal(*draws), "the default generator was not seeded"


def recompute_repeats_the_dropout() -> None:
    """The mask of the forward pass is drawn again when activations are recomputed, and nothing piles up in torch.cuda.

    Without CUDA torch keeps every call for a later initialisation, together with its stack.
    """
    from megatron.core.tensor_parallel.random import checkpoint

    queued = len(torch.cuda._queued_calls)
    x = torch.ones(64, requires_grad=True)
    y: Any = checkpoint(lambda value: torch.nn.functional.dropout(value, 0.5), False, x)
    y.sum().backward()
    assert torch.equal(x.grad, y), "the recomputed dropout has another mask than the forward pass"
    assert len(torch.cuda._queued_calls) == queued, "calls pile up in torch.cuda"


def broadcast_batch() -> None:
    """Megatron-LM's scripts hand the batch to the ranks of a tensor-parallel group so."""
    from megatron.core.tensor_parallel import broadcast_data

    data = {"text": torch.arange(4)}
    assert broadcast_data(["text"], data, torch.int64)["text"].tolist() == [0, 1, 2, 3]


def log_losses_of_a_stage_without_experts() -> None:
    """Megatron-LM's training log makes the tracker on every pipeline stage."""
    from megatron.core.transformer.moe import moe_utils

    _moe_losses().clear()
    moe_utils.track_moe_metrics(1.0, 0, None, force_initialize=True, track_names=["load_balancing_loss"], num_layers=1)


def causal_mask() -> None:
    """Attention without a mask makes its own."""
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


def rotary_table_of_a_rank() -> None:
    """The positions of a context-parallel rank's rows; of a group of one they are all."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils

    cut = rope_utils.get_pos_emb_on_this_cp_rank
    group = (
        {"cp_group": parallel_state.get_context_parallel_group()}
        if "cp_group" in inspect.signature(cut).parameters
        else {}
    )
    table = torch.arange(8.0).view(4, 1, 1, 2)
    assert torch.equal(cut(table, 0, **group), table)


def model_in_checkpoint() -> tuple[Any, str]:
    """A stock model and a folder with its checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.support.stock import SEQ, VOCAB, stock_config

    seed(1)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    model: Any = GPTModel(stock_config(torch.float32), spec, vocab_size=VOCAB, max_sequence_length=SEQ)
    folder = [tempfile.mkdtemp(prefix="fluid-stock-")]
    dist.broadcast_object_list(folder, src=0)
    dist_checkpointing.save(model.sharded_state_dict(), folder[0])
    return model, folder[0]


def saving_leaves_no_process() -> None:
    """A synchronous checkpoint is written by the process itself."""
    model_in_checkpoint()
    left = [helper.name for helper in multiprocessing.active_children()]
    assert not left, f"processes left behind: {left}"


def load_in_parallel() -> None:
    """``--ckpt-fully-parallel-load``: each rank reads a part and the rest comes from the others."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    model, folder = model_in_checkpoint()
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(folder), dist.group.WORLD)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder, strategy))


def buffer_for_a_shard() -> None:
    """The part of ``load_in_parallel`` that makes room for what another rank has read; alone, no rank waits for it."""
    from megatron.core.dist_checkpointing.exchange_utils import _get_empty_tensor_for_exchange
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    shard = ShardedTensor.from_rank_offsets("weight", torch.ones(2))
    loaded: dict[Any, torch.Tensor] = {}
    tensor, _device = _get_empty_tensor_for_exchange("weight", {"weight": shard}, {}, loaded)  # type: ignore[arg-type]
    assert tensor.shape == (2,)


def save_with_known_structure() -> None:
    """``--ckpt-assume-constant-structure`` after a resume: the plan of the loaded checkpoint is used again."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import verify_global_md_reuse
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.utils import _DistWrapper

    model, folder = model_in_checkpoint()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
    loading = get_default_load_sharded_strategy(folder)
    dist_checkpointing.load(model.sharded_state_dict(), folder, loading)
    strategy.cached_global_metadata = loading.cached_global_metadata
    for name in ("next", "after"):
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(), str(place), strategy)
    # From 0.18 on save() looks at the strategy's plan in fewer cases; this is what it does then.
    plans = [SavePlan([])] * dist.get_world_size()
    assert verify_global_md_reuse(plans, plans[0], dist.get_rank(), _DistWrapper(None, True, 0))


def latent_attention() -> None:
    """Multi-latent attention without Transformer Engine."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from fluid_npu.train.latent_attention import LatentDotProductAttention

    seed(1)
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=8,
        normalization="RMSNorm",
        add_bias_linear=False,
        rope_type="rope",
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    model: Any = GPTModel(config, spec, vocab_size=32, max_sequence_length=8, position_embedding_type="rope")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(tokens, torch.arange(8)[None], torch.ones(1, 1, 8, 8, dtype=torch.bool).triu_(1), labels=tokens)
