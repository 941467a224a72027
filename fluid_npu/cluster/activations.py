"""Bytes that a layer keeps for its backward, operator by operator, and what its backward needs on top.

Each term names the tensor. Attention follows Korthikanti et al. 2022, table of section 4 ("Reducing Activation
Recomputation in Large Transformer Models"); experts are the tensors that ``fluid_npu/ops/expert_mlp.py`` saves. With
--use-flash-attn scores are not kept (npu_fusion_attention keeps its output and 64 bytes of softmax statistics for
each head and row); without it Megatron's DotProductAttention keeps the probabilities.

Shapes: T tokens of a rank, R rows after dispatch, S sequence, H hidden, F expert ffn, E experts, K top-k.
"""

from __future__ import annotations

from math import ceil

from fluid_npu.cluster.parameters import padded_vocabulary
from fluid_npu.cluster.plan import Plan

_SOFTMAX_STATISTICS = 64  # bytes: maximum and sum, 8 fp32 each (npu_fusion_attention)


def width(plan: Plan) -> int:
    """Bytes of one element of activations and weights."""
    return 2 if {"--bf16", "--fp16"} & set(plan.args.values) else 4


def tokens_in_attention(plan: Plan) -> int:
    """Tokens that a rank attends with: TP cuts heads there, not tokens."""
    return plan.micro_batch * plan.sequence // plan.cp


def tokens(plan: Plan) -> int:
    """Tokens of a rank outside attention: sequence parallelism cuts them by TP."""
    return tokens_in_attention(plan) // (plan.tp if "--sequence-parallel" in plan.args else 1)


def rows(plan: Plan) -> int:
    """Rows that the busiest rank computes: T x K is the mean, times --imbalance; ETP ranks see each other's rows."""
    imbalance = plan.cluster.imbalance if plan.ep > 1 else 1.0
    return ceil(tokens(plan) * plan.size("--moe-router-topk", 2) * plan.etp * imbalance)


def kept_by_layer(plan: Plan, layer: int, index: int) -> int:
    """Bytes that layer number ``layer``, at place ``index`` of its stage, keeps with the recompute that is set."""
    moe = layer >= plan.model.first_dense_layers
    args = plan.args
    if args.get("--recompute-granularity") == "full":
        number = plan.size("--recompute-num-layers")
        if args.get("--recompute-method") == "uniform":
            return _hidden(plan) if index % number == 0 else 0
        per_chunk = max(1, ceil(len(max(plan.stages, key=len)) / plan.vpp))
        return _hidden(plan) if index % per_chunk < number else full_layer(plan, moe)
    return full_layer(plan, moe) - _selectively_dropped(plan, moe)


def full_layer(plan: Plan, moe: bool) -> int:
    """Bytes of one layer without recompute."""
    attention = mla(plan) if plan.model.mla is not None else attention_heads(plan)
    return attention + (experts(plan) if moe else dense_mlp(plan))


def _hidden(plan: Plan) -> int:
    return tokens(plan) * plan.model.hidden * width(plan)


def _selectively_dropped(plan: Plan, moe: bool) -> int:
    args = plan.args
    if args.get("--recompute-granularity") != "selective":
        return 0
    modules = args.get("--recompute-modules") or ["core_attn"]
    dropped = _scores(plan) if "core_attn" in modules else 0
    if moe and "moe" in modules:
        return dropped + experts(plan) - _hidden(plan)
    if moe and "moe_act" in modules:
        dropped += rows(plan) * plan.model.moe_ffn // plan.etp * width(plan)
    return dropped


def _norm(plan: Plan, elements: int) -> int:
    """What torch's norms keep: their input and the normalised input, both in fp32. MindSpeed's fused one: its input."""
    return elements * (width(plan) if "--use-fused-rmsnorm" in plan.args else 8)


def attention_heads(plan: Plan) -> int:
    """Norm and its output, q, k, v, output of attention, and what keeps the scores."""
    model, inside = plan.model, tokens_in_attention(plan)
    q, kv = model.heads * model.channels // plan.tp, model.kv_heads * model.channels // plan.tp
    if "--use-flash-attn" not in plan.args:
        kv = q  # Megatron's DotProductAttention repeats k and v for every head
    norms = _norm(plan, tokens(plan) * model.hidden) + (_norm(plan, inside * (q + kv)) if model.qk_layernorm else 0)
    return norms + _hidden(plan) + inside * (2 * q + 2 * kv) * width(plan) + _scores(plan) + _statistics(plan)


def mla(plan: Plan) -> int:
    """As ``attention_heads``, with the latents, their norms, and q, k, v of all heads."""
    model, inside = plan.model, tokens_in_attention(plan)
    sizes = model.mla
    assert sizes is not None
    head = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    heads = model.heads // plan.tp
    latents = (sizes.q_lora_rank or 0) + sizes.kv_lora_rank
    norms = _norm(plan, tokens(plan) * model.hidden + inside * latents)
    elements = inside * (heads * (2 * head + 2 * sizes.v_head_dim) + latents + sizes.qk_rope_head_dim)
    return norms + _hidden(plan) + elements * width(plan) + _scores(plan) + _statistics(plan)


def _scores(plan: Plan) -> int:
    """Probabilities in the model's dtype, in fp32 too with --attention-softmax-in-fp32; none with fused attention."""
    if "--use-flash-attn" in plan.args:
        return 0
    pairs = tokens_in_attention(plan) * plan.sequence // plan.cp * plan.model.heads // plan.tp
    softmax = 4 if "--attention-softmax-in-fp32" in plan.args and width(plan) == 2 else 0
    dropout = width(plan) + 1 if plan.args.get("--attention-dropout", 0.1) > 0 else 0
    return pairs * (width(plan) + softmax + dropout)


def _statistics(plan: Plan) -> int:
    if "--use-flash-attn" not in plan.args:
        return 0
    return tokens_in_attention(plan) * plan.model.heads // plan.tp * _SOFTMAX_STATISTICS


def dense_mlp(plan: Plan) -> int:
    """Norm and its output, FC1's output, activation."""
    inner = tokens_in_attention(plan) * 3 * plan.model.ffn // plan.tp * width(plan)
    return _norm(plan, tokens(plan) * plan.model.hidden) + _hidden(plan) + inner


def experts(plan: Plan) -> int:
    """Norm, router, dispatched rows, FC1's output, activation, and the shared experts with their input."""
    model, count = plan.model, tokens(plan)
    router = count * (model.hidden * 4 + model.experts * 4 + model.topk * 28)  # fp32 input and logits; index, scores
    routed = rows(plan) * ((model.hidden + 3 * model.moe_ffn // plan.etp) * width(plan) + 4)
    shared = tokens_in_attention(plan) * 3 * (model.shared_expert_ffn or 0) // plan.tp * width(plan)
    shared += _hidden(plan) if model.shared_expert_ffn else 0
    return _norm(plan, count * model.hidden) + router + routed + shared


def backward_peak(plan: Plan, moe: bool) -> int:
    """Gradients alive at the widest point of a layer's backward, and the rows in both AllToAll buffers."""
    model = plan.model
    if not moe:
        return 2 * _hidden(plan) + tokens_in_attention(plan) * 3 * model.ffn // plan.tp * width(plan)
    ffn = 3 * model.moe_ffn // plan.etp
    return rows(plan) * (3 * model.hidden + ffn) * width(plan) + 2 * _hidden(plan)


def loss_peak(plan: Plan) -> int:
    """Logits in the model's dtype and twice in fp32 (Megatron's vocab-parallel cross entropy)."""
    return tokens_in_attention(plan) * padded_vocabulary(plan) // plan.tp * (width(plan) + 8)
