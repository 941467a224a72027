"""Parameters of one device: what tensor, expert and pipeline parallelism leave of the model.

Split as Megatron does it (paths below megatron/core of tag core_v0.16.1): attention, dense MLP, shared experts,
embedding and head by TP; routed experts by EP and ETP; norms and router on every rank. ``presets.Preset`` has the
sizes of the parts, and its totals are compared with the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluid_npu.cluster.plan import Plan
from fluid_npu.train.presets import MLA, Preset


@dataclass(frozen=True)
class Held:
    """Parameters of one device. ``dense`` has copies on the data-parallel ranks, ``expert`` on the expert ones."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def held_by_stage(plan: Plan, stage: int) -> Held:
    """What a device of pipeline rank ``stage`` holds."""
    model, tp = plan.model, plan.tp
    layers = plan.stages[stage]
    moe = sum(layer >= model.first_dense_layers for layer in layers)
    dense = len(layers) * _block(model, tp) + (len(layers) - moe) * 3 * model.hidden * model.ffn // tp
    dense += moe * (model.experts * model.hidden + 3 * model.hidden * (model.shared_expert_ffn or 0) // tp)
    dense += _ends(plan, stage)
    return Held(dense, moe * (model.experts // plan.ep) * model.expert_params() // plan.etp)


def padded_vocabulary(plan: Plan) -> int:
    """Entries after padding to a multiple of --make-vocab-size-divisible-by x TP (training/tokenizer/tokenizer.py)."""
    multiple = plan.size("--make-vocab-size-divisible-by", 128) * plan.tp
    return -(-plan.model.vocab_size // multiple) * multiple


def _norm(model: Preset) -> int:
    return model.hidden * (2 if model.normalization == "LayerNorm" else 1)


def _block(model: Preset, tp: int) -> int:
    """Attention and the two norms of a layer."""
    return 2 * _norm(model) + (_mla(model, model.mla, tp) if model.mla is not None else _attention(model, tp))


def _attention(model: Preset, tp: int) -> int:
    q, kv = model.heads * model.channels, model.kv_heads * model.channels
    bias = q + 2 * kv if model.qkv_bias else 0
    return (model.hidden * (2 * q + 2 * kv) + bias) // tp + (2 * model.channels if model.qk_layernorm else 0)


def _mla(model: Preset, mla: MLA, tp: int) -> int:
    """All linears are cut by TP: without Transformer Engine the down projections too (multi_latent_attention.py)."""
    norms = (mla.q_lora_rank or 0) + mla.kv_lora_rank
    return (model.attention_params() - norms) // tp + norms


def _ends(plan: Plan, stage: int) -> int:
    """Embedding on the first stage, final norm and head on the last."""
    table = padded_vocabulary(plan) * plan.model.hidden // plan.tp
    count = table if stage == 0 else 0
    if stage == plan.pp - 1:
        shared = plan.model.tie_embeddings and plan.pp == 1
        count += _norm(plan.model) + (0 if shared else table)
    return count
