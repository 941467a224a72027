"""The Baseline of ``bench layer``: a whole layer of plain torch operations in one autograd function.

Attention is recomputed in backward; everything else keeps what its backward needs. Experts are a loop, AllToAlls block,
weight gradients are added to main_grad within backward. It computes what Megatron's layer computes, on that layer's
own parameters. The layer is a list of segments, each of one part ('norms', 'linear', 'attention', 'router_permute',
'a2a', 'experts') and each with a graph of its own, so that every part can be timed in both directions.

S sequence, B batch, H hidden, T = S*B tokens, N = T*K rows before dispatch, R rows after, G key-value heads, D head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
Timer = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Segment:
    """A function of the state and the weights whose gradients it gives; ``recompute`` runs it again in backward."""

    part: str
    run: Callable[..., State]
    weights: tuple[torch.nn.Parameter, ...] = ()
    recompute: bool = False


class _Plain(torch.autograd.Function):
    """A blocking AllToAll of rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
        ctx.way = (sent, got, group)
        out = rows.new_empty((sum(got), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, got, group = ctx.way
        out = grad.new_empty((sum(sent), *grad.shape[1:]))
        dist.all_to_all_single(out, grad.contiguous(), sent, got, group=group)
        return out, None, None, None


class Baseline:
    """The layer over the parameters of a stock one.

    Args:
        layer: Megatron's TransformerLayer with SequentialMLP.
        config: its TransformerConfig.
        whole: the transformer layer, or only its MoE part (without norm and residual).
        rope: rotary angles ``[S, 1, 1, D]``, of a whole layer.
        routing: gives the bool map ``[T, E]`` of the step.
        timer: a context around each part.
    """

    def __init__(
        self, layer: Any, config: Any, *, whole: bool, rope: Tensor | None, routing: Callable[[], Tensor], timer: Timer
    ) -> None:
        self.layer, self.config, self.rope, self.routing, self.timer = layer, config, rope, routing, timer
        self.moe = layer.mlp
        self.group = self.moe.experts.ep_group if hasattr(self.moe.experts, "ep_group") else self.moe.ep_group
        self.segments = [*(self._attention() if whole else ()), *self._moe(residual=whole)]

    def __call__(self, x_SBH: Tensor) -> Tensor:
        """The layer's output; differentiable."""
        y_SBH: Tensor = _Whole.apply(x_SBH, self)
        return y_SBH

    # ---- attention: norm, qkv, attention, projection

    def _attention(self) -> list[Segment]:
        attention, config = self.layer.self_attention, self.config
        norm, qkv, proj = self.layer.input_layernorm, attention.linear_qkv, attention.linear_proj
        biases = (qkv.bias,) if qkv.bias is not None else ()
        norms = [m.weight for m in (attention.q_layernorm, attention.k_layernorm) if hasattr(m, "weight")]

        def project(h: Tensor, x: Tensor, weight: Tensor, *bias: Tensor) -> State:
            return F.linear(h, weight, *bias), x

        def attend(qkv_SB: Tensor, x: Tensor, *weights: Tensor) -> State:
            return self._attend(qkv_SB, weights), x

        return [
            Segment("norms", lambda x, w: (_rms(x, w, config.layernorm_epsilon), x), (norm.weight,)),
            Segment("linear", project, (qkv.weight, *biases)),
            Segment("attention", attend, tuple(norms), recompute=True),
            Segment("linear", lambda context, x, w: (x + F.linear(context, w),), (proj.weight,)),
        ]

    def _attend(self, qkv_SB: Tensor, norms: Sequence[Tensor]) -> Tensor:
        config = self.config
        length, batch, _ = qkv_SB.shape
        groups, width = config.num_query_groups, config.kv_channels
        each = config.num_attention_heads // groups
        q, k, v = qkv_SB.view(length, batch, groups, -1).split([each * width, width, width], dim=-1)
        q = q.reshape(length, batch, -1, width)
        if norms:
            q, k = (_rms(t, w, config.layernorm_epsilon) for t, w in zip((q, k), norms, strict=True))
        assert self.rope is not None
        q, k = (_rotate(t, self.rope) for t in (q, k))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        k, v = (t.repeat_interleave(each, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)

    # ---- MoE: norm, router, permute, dispatch, experts, combine, unpermute

    def _moe(self, residual: bool) -> list[Segment]:
        moe, config = self.moe, self.config
        experts = [e for e in moe.experts.local_experts]
        weights = tuple(w for e in experts for w in (e.linear_fc1.weight, e.linear_fc2.weight))
        shared = moe.shared_experts
        extra = (shared.linear_fc1.weight, shared.linear_fc2.weight) if shared is not None else ()
        segments = [Segment("router_permute", self._route, (moe.router.weight,))]
        segments += [
            Segment("a2a", self._dispatch),
            Segment("experts", self._experts, (*weights, *extra)),
            Segment("a2a", self._combine),
            Segment("router_permute", self._unpermute),
        ]
        if not residual:
            return segments
        norm = self.layer.pre_mlp_layernorm
        first = Segment("norms", lambda x, w: (_rms(x, w, config.layernorm_epsilon), x), (norm.weight,))
        return [first, *segments]

    def _route(self, h: Tensor, *rest: Tensor) -> State:
        """Rows by expert and their probabilities; remembers the plan for the segments that follow."""
        *residual, weight = rest
        map_TE = self.routing()
        flat_TH = h.reshape(-1, h.shape[-1])
        logits_TE = F.linear(flat_TH.float(), weight.float())
        probs_TE = torch.softmax(logits_TE.masked_fill(~map_TE, float("-inf")), dim=-1)
        expert, token = map_TE.t().nonzero(as_tuple=True)
        self._plan(map_TE, token)
        return flat_TH[token], probs_TE[token, expert], h, *residual

    def _plan(self, map_TE: Tensor, token: Tensor) -> None:
        ranks = dist.get_world_size(self.group)
        sent_E = map_TE.sum(0)
        got_E = torch.empty_like(sent_E)
        dist.all_to_all_single(got_E, sent_E, group=self.group)
        self.token = token
        self.sent = sent_E.view(ranks, -1).sum(1).tolist()
        chunks_PL = got_E.view(ranks, -1).cpu()
        self.got, self.chunks = chunks_PL.sum(1).tolist(), chunks_PL

    def _dispatch(self, rows: Tensor, probs: Tensor, *rest: Tensor) -> State:
        sent = [_Plain.apply(t, self.sent, self.got, self.group) for t in (rows, probs)]
        return (*sent, *rest)

    def _experts(self, rows_RH: Tensor, probs_R: Tensor, h: Tensor, *rest: Tensor) -> State:
        moe, chunks_PL = self.moe, self.chunks
        shared = 2 if moe.shared_experts is not None else 0
        local = len(moe.experts.local_experts)
        count = 2 * local + shared
        residual, weights = rest[: len(rest) - count], rest[len(rest) - count :]
        parts = [list(p.split(chunks_PL.reshape(-1).tolist())) for p in (rows_RH, probs_R)]
        out: list[Tensor] = [rows_RH] * len(parts[0])
        for expert in range(local):
            numbers = range(expert, len(out), local)
            x, p = (torch.cat([part[n] for n in numbers]) for part in parts)
            y = _mlp(x, weights[2 * expert], weights[2 * expert + 1], p)
            for n, piece in zip(numbers, y.split([len(parts[0][n]) for n in numbers]), strict=True):
                out[n] = piece
        if shared:
            residual = (*residual, _mlp(h, weights[-2], weights[-1]))
        return (torch.cat(out), h, *residual)

    def _combine(self, rows: Tensor, *rest: Tensor) -> State:
        return (_Plain.apply(rows, self.got, self.sent, self.group), *rest)

    def _unpermute(self, rows: Tensor, h: Tensor, *rest: Tensor) -> State:
        out_TH = rows.new_zeros(h.numel() // h.shape[-1], h.shape[-1]).index_add(0, self.token, rows)
        y = out_TH.view_as(h)
        for other in rest:
            y = y + other
        return (y,)


class _Whole(torch.autograd.Function):
    """All segments as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Baseline) -> Tensor:
        ctx.layer, ctx.saved = layer, []
        state: State = (x,)
        for segment in layer.segments:
            with layer.timer(segment.part):
                inputs = tuple(t.detach().requires_grad_() for t in state)
                with torch.enable_grad() if not segment.recompute else torch.no_grad():
                    outputs = segment.run(*inputs, *segment.weights)
                ctx.saved.append((inputs, None if segment.recompute else outputs))
                state = tuple(t.detach() for t in outputs)
        return state[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: Baseline = ctx.layer
        grads: State = (grad,)
        for segment, (inputs, outputs) in zip(reversed(layer.segments), reversed(ctx.saved), strict=True):
            with layer.timer(segment.part):
                with torch.enable_grad():
                    outputs = segment.run(*inputs, *segment.weights) if outputs is None else outputs
                found = torch.autograd.grad(outputs, (*inputs, *segment.weights), grads, allow_unused=True)
            grads = tuple(
                torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found[: len(inputs)], strict=True)
            )
            with layer.timer("grad_accumulation"):
                for weight, dw in zip(segment.weights, found[len(inputs) :], strict=True):
                    if dw is not None:
                        weight.main_grad.add_(dw)
        ctx.saved = []
        return grads[0], None


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(t_SBHD: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of the first columns, halves and not pairs; angles in fp32, product in the tensor's type."""
    width = rope.shape[-1]
    turned, kept = t_SBHD[..., :width], t_SBHD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat((-second, first), dim=-1)
    angles = rope[: t_SBHD.shape[0]]
    turned = turned * angles.cos().to(t_SBHD.dtype) + other * angles.sin().to(t_SBHD.dtype)
    return torch.cat((turned, kept), dim=-1)


def _mlp(x: Tensor, fc1: Tensor, fc2: Tensor, probs: Tensor | None = None) -> Tensor:
    """SwiGLU; probabilities weigh the activation, as Megatron's."""
    gate, value = F.linear(x, fc1).chunk(2, dim=-1)
    a = F.silu(gate) * value
    if probs is not None:
        a = (a * probs.unsqueeze(-1)).to(x.dtype)
    return F.linear(a, fc2)
