"""Transformer layers under context and expert parallelism, and the same in float64 on one process, whole sequences."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.device import can_fuse, here
from tests.support.moe import relative

HIDDEN, SIZE, FFN, EXPERTS, TOPK, BATCH = 32, 8, 24, 8, 2, 2
EPS, BASE = 1e-5, 10000


@dataclass(frozen=True, kw_only=True)
class Case:
    """Layers whose gradients are looked at. ``rows`` of the whole sequence."""

    cp: int = 2
    ep: int = 2
    heads: int = 8
    key_heads: int = 2
    layers: int = 1
    micro_batches: int = 1
    rows: int = 16
    window: tuple[int, int] | None = None
    qk_norm: bool = False
    overlap: str = "dw"
    twin: bool = False
    recompute: bool = False
    chunks: int | str = 1
    carry: bool = False
    shared: bool = False
    """Whether each layer has a shared expert, of the width of the others."""
    seed: int = 7
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """The fewest processes."""
        return max(self.cp, self.ep)

    @property
    def sizes(self) -> dict[str, int]:
        """For ``run_ranks``."""
        return {"context_parallel_size": self.cp, "expert_model_parallel_size": self.ep}


class Stack(torch.nn.Module):
    """The layers alone, without embedding and loss."""

    def __init__(self, case: Case, attention: Any = None) -> None:
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.spec_utils import build_module

        from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

        super().__init__()
        config = make_config(case)
        spec = get_fluid_moe_layer_spec(
            config, overlap=case.overlap, carry_over=case.carry, backend="local", attention_chunks=case.chunks
        )
        if attention is not None:
            spec.submodules.self_attention.module = attention
            spec.submodules.self_attention.submodules.core_attention = DotProductAttention
        layers = [build_module(spec, config=config, layer_number=number + 1) for number in range(case.layers)]
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x_TBH: torch.Tensor, rotary: torch.Tensor, packed: Any = None) -> torch.Tensor:
        """Each layer after the other; ``packed`` are Megatron's PackedSeqParams."""
        for layer in self.layers:
            x_TBH = layer(x_TBH, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)[0]
        return x_TBH


def make_config(case: Case) -> Any:
    """Their TransformerConfig."""
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    recompute = {"recompute_granularity": "selective"} if case.recompute else {}
    window: dict[str, Any] = {"window_size": case.window} if case.window else {}
    if case.shared:
        window["moe_shared_expert_intermediate_size"] = FFN
    settings: dict[str, Any] = dict(
        num_layers=case.layers,
        hidden_size=HIDDEN,
        num_attention_heads=case.heads,
        num_query_groups=case.key_heads,
        kv_channels=SIZE,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        qk_layernorm=case.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=can_fuse(),
    )
    return TransformerConfig(**{**settings, **recompute, **window, **case.config})


def weight(name: str, shape: Any, seed: int) -> torch.Tensor:
    """The weight of that name: the same on every rank, and in the reference."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if len(shape) == 1 else 0.2 * noise


def sample(case: Case, replica: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole input ``[S, B, H]`` of a data-parallel replica, and the weights of its loss."""
    generator = torch.Generator().manual_seed(1000 * case.seed + 10 * replica + micro)
    return tuple(torch.randn(case.rows, BATCH, HIDDEN, generator=generator) for _ in range(2))  # type: ignore[return-value]


def held_rows(case: Case, rank: int) -> list[int]:
    """Numbers of the rows of a context-parallel rank, in Megatron's load-balanced order, spelled out."""
    chunk = case.rows // (2 * case.cp)
    first, second = rank, 2 * case.cp - 1 - rank
    if case.cp == 1:
        return list(range(case.rows))
    return [*range(first * chunk, (first + 1) * chunk), *range(second * chunk, (second + 1) * chunk)]


def run_stack(case: Case, attention: Any = None) -> dict[str, Any]:
    """Outputs, input gradients and weight gradients of this rank, and where it stands.

    ``attention`` is a user's module, in the spec beside Megatron's own core; None takes what our spec has.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from fluid_npu.mcore.convert import gradients_by_name, weights_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    stack = here(Stack(case, attention))
    with torch.no_grad():
        for name, value in weights_by_name(stack).items():
            value.copy_(weight(name, value.shape, case.seed))
    for parameter in stack.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    rotary = RotaryEmbedding(SIZE, 1.0, rotary_base=BASE)(case.rows)
    scheduler = get_backward_scheduler(stack)
    scheduler.recorder.enabled = True
    cp, replica = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
    mine = held_rows(case, cp)
    if case.config.get("sequence_parallel"):
        tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        part = len(mine) // tensor_ranks
        mine = mine[parallel_state.get_tensor_model_parallel_rank() * part :][:part]
    result: dict[str, Any] = {"cp": cp, "replica": replica, "out": [], "dx": []}
    for micro in range(case.micro_batches):
        x, g = (here(value[mine]) for value in sample(case, replica, micro))
        x.requires_grad_()
        if case.twin:
            with scheduler.serialise():
                out = stack(x, rotary)
                (out * g).sum().backward()
        else:
            out = stack(x, rotary)
            (out * g).sum().backward()
        result["out"].append(out.detach())
        result["dx"].append(x.grad)
    for parameter in stack.parameters():
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
    result["weights"] = {name: value.clone() for name, value in gradients_by_name(stack).items()}
    result["stats"] = scheduler.get_stats()
    record = scheduler.recorder.take()
    result["regions"] = {item.name: item.detail["region"] for item in record if item.kind == "dw"}
    result["launches"] = [item.name for item in record if item.kind == "launch"]
    return result


def reference(case: Case, replicas: int) -> dict[str, Any]:
    """Outputs and input gradients by replica and micro-batch, and weight gradients of all together, in float64."""
    numbers = [(replica, micro) for replica in range(replicas) for micro in range(case.micro_batches)]
    found = reference_of(case, [sample(case, *number) for number in numbers])
    by_number = {kind: dict(zip(numbers, found[kind], strict=True)) for kind in ("out", "dx")}
    return {**by_number, "weights": found["weights"]}


def reference_of(case: Case, samples: Sequence[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """The same of some (input, weights of the loss) pairs, lists in their order."""
    weights = {name: weight(name, shape, case.seed).double().requires_grad_() for name, shape in _shapes(case).items()}
    found: dict[str, Any] = {"out": [], "dx": []}
    for pair in samples:
        x, g = (value.double() for value in pair)
        x.requires_grad_()
        out = x
        for layer in range(case.layers):
            out = _layer(out, weights, f"layers.{layer}.", case)
        (out * g).sum().backward()
        found["out"].append(out.detach())
        found["dx"].append(x.grad)
    found["weights"] = {name: value.grad for name, value in weights.items()}
    return found


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(case.layers):
        at = f"layers.{layer}."
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}pre_mlp_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}self_attention.linear_qkv.weight"] = ((case.heads + 2 * case.key_heads) * SIZE, HIDDEN)
        shapes[f"{at}self_attention.linear_proj.weight"] = (HIDDEN, case.heads * SIZE)
        if case.qk_norm:
            shapes[f"{at}self_attention.q_layernorm.weight"] = (SIZE,)
            shapes[f"{at}self_attention.k_layernorm.weight"] = (SIZE,)
        shapes[f"{at}mlp.router.weight"] = (EXPERTS, HIDDEN)
        if case.shared:
            shapes[f"{at}mlp.shared_experts.linear_fc1.weight"] = (2 * FFN, HIDDEN)
            shapes[f"{at}mlp.shared_experts.linear_fc2.weight"] = (HIDDEN, FFN)
        for expert in range(EXPERTS):
            shapes[f"{at}mlp.experts.{expert}.linear_fc1.weight"] = (2 * FFN, HIDDEN)
            shapes[f"{at}mlp.experts.{expert}.linear_fc2.weight"] = (HIDDEN, FFN)
    return shapes


def _norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gamma


def _layer(x: torch.Tensor, w: dict[str, torch.Tensor], at: str, case: Case) -> torch.Tensor:
    x = x + _attention(_norm(x, w[f"{at}input_layernorm.weight"]), w, f"{at}self_attention.", case)
    return x + _experts(_norm(x, w[f"{at}pre_mlp_layernorm.weight"]), w, f"{at}mlp.")


def _attention(x: torch.Tensor, w: dict[str, torch.Tensor], at: str, case: Case) -> torch.Tensor:
    """Head by head; query heads of a group follow one another."""
    shared = case.heads // case.key_heads
    groups = (x @ w[f"{at}linear_qkv.weight"].t()).unflatten(-1, (case.key_heads, shared + 2, SIZE))
    rows = torch.arange(x.shape[0])
    distance = rows[:, None] - rows[None]
    left, right = case.window or (len(rows), 0)
    hidden = (distance > left) | (distance < -right)
    heads = []
    for head in range(case.heads):
        q, k, v = (groups[:, :, head // shared, part] for part in (head % shared, shared, shared + 1))
        if case.qk_norm:
            q, k = _norm(q, w[f"{at}q_layernorm.weight"]), _norm(k, w[f"{at}k_layernorm.weight"])
        q, k = turn(q), turn(k)
        scores = torch.einsum("sbd,tbd->bst", q, k) / SIZE**0.5
        heads.append(torch.einsum("bst,tbd->sbd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(heads, -1) @ w[f"{at}linear_proj.weight"].t()


def turn(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[S, B, D]``: pairs (i, i + D/2) turn by position / base^(2i/D)."""
    half = x.shape[-1] // 2
    speed = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None] * speed
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _experts(x: torch.Tensor, w: dict[str, torch.Tensor], at: str) -> torch.Tensor:
    logits = x @ w[f"{at}router.weight"].t()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(TOPK, -1).indices, True)
    probs = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        out = out + probs[..., expert : expert + 1] * _expert(x, w, f"{at}experts.{expert}.")
    return out + _expert(x, w, f"{at}shared_experts.") if f"{at}shared_experts.linear_fc1.weight" in w else out


def _expert(x: torch.Tensor, w: dict[str, torch.Tensor], at: str) -> torch.Tensor:
    gate, value = (x @ w[f"{at}linear_fc1.weight"].t()).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * value) @ w[f"{at}linear_fc2.weight"].t()


def worst_error(case: Case, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative Frobenius error of outputs and input gradients, and that of each weight's gradient."""
    want = reference(case, 1 + max(rank["replica"] for rank in ranks))
    errors = {"out": 0.0, "dx": 0.0}
    for rank in ranks:
        mine = held_rows(case, rank["cp"])
        for micro in range(case.micro_batches):
            for kind in ("out", "dx"):
                whole = want[kind][rank["replica"], micro]
                errors[kind] = max(errors[kind], relative(rank[kind][micro], whole[mine]))
    for name, whole in want["weights"].items():
        parts = [rank["weights"][name].double() for rank in ranks if name in rank["weights"]]
        errors[name] = relative(torch.stack(parts).sum(0), whole)
    assert set(errors) - {"out", "dx"} == {name for rank in ranks for name in rank["weights"]}
    return errors
