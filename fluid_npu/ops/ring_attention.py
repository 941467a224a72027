"""Attention whose keys and values travel around the ranks of a sequence, with an online softmax (ring attention).

Each rank keeps its queries and sees the keys and values of one rank after the other; while one block is computed the
next is on its way. The softmax is carried as output and log-sum-exp, in fp32 or wider. The backward sends keys and
values around again, and behind them their gradients, which arrive at home after P steps. Sums are taken in the order of
the ring, so results repeat; between ranks they differ from a whole softmax by rounding.

Every rank holds two chunks of the sequence, r and 2P - 1 - r (Megatron's load-balanced split), and pairs of chunks of
which no query sees a key are left out. Shapes: T rows of this rank, c rows of a chunk, B batch, N query heads, M key
heads, G = N / M, D head size of queries and keys, V of values, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Starts sending rows to the next rank (True in backward); what it returns gives those of the rank before.
PassOn = Callable[[Tensor, bool], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class RingCall:
    """What a ring attention computes, besides its tensors."""

    scale: float
    """The scores are multiplied by it before the softmax."""
    ranks: int
    """P."""
    rank: int
    """This rank's place in the sequence."""
    pass_on: PassOn
    left: int | None = None
    """Keys further back than this are hidden; None: none."""
    right: int | None = None
    """Keys further ahead than this are hidden: 0 is causal; None: none."""
    beside: Callable[[], None] = lambda: None
    """Runs once in backward, while the first rows are on their way."""


def ring_attention(q_TBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: RingCall) -> Tensor:
    """``[T, B, N * V]`` in the dtype of q: softmax(scale * q k^T) v over the keys of all ranks, for these queries.

    Every rank calls it with the same shapes; 2P chunks make the sequence, so T is even unless P is 1. Every query must
    see its own position. Raises ValueError for shapes that do not fit.
    """
    if call.ranks > 1 and q_TBND.shape[0] % 2:
        raise ValueError(f"{q_TBND.shape[0]} rows: a rank holds two chunks of a sequence; an even number is needed")
    if q_TBND.shape[2] % k_TBMD.shape[2] or k_TBMD.shape[:3] != v_TBMV.shape[:3]:
        raise ValueError(
            f"q {tuple(q_TBND.shape)}, k {tuple(k_TBMD.shape)}, v {tuple(v_TBMV.shape)}: keys and values need the same "
            "heads, a divisor of the queries'"
        )
    out: Tensor = _RingAttention.apply(q_TBND, k_TBMD, v_TBMV, call)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: RingCall) -> Tensor:
        q_BMGTD = _grouped(q, k.shape[2])
        kv = torch.cat([k.flatten(2), v.flatten(2)], -1)
        out_BMGTV = q_BMGTD.new_zeros(*q_BMGTD.shape[:-1], v.shape[-1])
        lse_BMGT = q_BMGTD.new_full(q_BMGTD.shape[:-1], float("-inf"))
        travelling = kv
        for step in range(call.ranks):
            arriving = call.pass_on(travelling, False) if step < call.ranks - 1 else None
            k_BMTD, v_BMTV = _opened(travelling, k, v)
            for block in _blocks(call, step, q.shape[0], q.device):
                _add_block(q_BMGTD, k_BMTD, v_BMTV, out_BMGTV, lse_BMGT, block, call.scale)
            travelling = arriving() if arriving is not None else travelling
        out = out_BMGTV.permute(3, 0, 1, 2, 4).flatten(2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_BMGT)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_BMGT = ctx.saved_tensors
        call: RingCall = ctx.call
        q_BMGTD, dy_BMGTV = _grouped(q, k.shape[2]), _grouped(dy.view(*q.shape[:3], -1), k.shape[2])
        delta_BMGT = (dy_BMGTV * _grouped(out.view(*q.shape[:3], -1), k.shape[2])).sum(-1)
        dq_BMGTD = torch.zeros_like(q_BMGTD)
        travelling = torch.cat([k.flatten(2), v.flatten(2)], -1)
        behind: Callable[[], Tensor] | None = None
        for step in range(call.ranks):
            arriving = call.pass_on(travelling, True) if step < call.ranks - 1 else None
            if step == 0:
                call.beside()
            k_BMTD, v_BMTV = _opened(travelling, k, v)
            dk_BMTD, dv_BMTV = torch.zeros_like(k_BMTD), torch.zeros_like(v_BMTV)
            for block in _blocks(call, step, q.shape[0], q.device):
                rows, keys, _ = block
                p, ds = _scores_grad(q_BMGTD, k_BMTD, v_BMTV, dy_BMGTV, delta_BMGT, lse_BMGT, block, call.scale)
                dq_BMGTD[..., rows, :] += ds @ k_BMTD[:, :, None, keys]
                dk_BMTD[:, :, keys] += (ds.transpose(-1, -2) @ q_BMGTD[..., rows, :]).sum(2)
                dv_BMTV[:, :, keys] += (p.transpose(-1, -2) @ dy_BMGTV[..., rows, :]).sum(2)
            mine = torch.cat([_rows(dk_BMTD), _rows(dv_BMTV)], -1)
            mine = mine if behind is None else behind() + mine
            behind = call.pass_on(mine, True) if call.ranks > 1 else lambda mine=mine: mine
            travelling = arriving() if arriving is not None else travelling
        assert behind is not None
        dk, dv = behind().split([k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]], -1)
        dq = dq_BMGTD.permute(3, 0, 1, 2, 4).flatten(2, 3).to(q.dtype)
        return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), None


Block = tuple[slice, slice, Tensor | None]


def _blocks(call: RingCall, step: int, rows: int, device: torch.device) -> Iterator[Block]:
    """(query rows, key rows, True where a key is hidden or None) of the chunk pairs that see something in this step."""
    source = (call.rank - step) % call.ranks
    mine, theirs = (_chunks(rank, call.ranks) for rank in (call.rank, source))
    size = rows // len(mine)
    for i, query_chunk in enumerate(mine):
        # A query's own chunk comes first: from then on its log-sum-exp is finite.
        for j, key_chunk in sorted(enumerate(theirs), key=lambda pair: abs(query_chunk - pair[1])):
            ahead = (query_chunk - key_chunk) * size  # how far the first query is behind the first key
            hides_left = call.left is not None and ahead + size - 1 > call.left
            hides_right = call.right is not None and ahead - size + 1 < -call.right
            if (call.left is not None and ahead - size + 1 > call.left) or (
                call.right is not None and ahead + size - 1 < -call.right
            ):
                continue
            hidden = _hidden(call, ahead, size, device) if hides_left or hides_right else None
            yield slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size), hidden


def _chunks(rank: int, ranks: int) -> tuple[int, ...]:
    return (0,) if ranks == 1 else (rank, 2 * ranks - 1 - rank)


def _hidden(call: RingCall, ahead: int, size: int, device: torch.device) -> Tensor:
    """``[c, c]``: which keys a query does not see."""
    at = torch.arange(size, device=device)
    distance = ahead + at[:, None] - at[None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if call.left is not None:
        hidden |= distance > call.left
    if call.right is not None:
        hidden |= distance < -call.right
    return hidden


def _scores(q_BMGTD: Tensor, k_BMTD: Tensor, block: Block, scale: float) -> Tensor:
    rows, keys, hidden = block
    scores = (q_BMGTD[..., rows, :] @ k_BMTD[:, :, None, keys].transpose(-1, -2)) * scale
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))


def _add_block(
    q: Tensor, k: Tensor, v: Tensor, out_BMGTV: Tensor, lse_BMGT: Tensor, block: Block, scale: float
) -> None:
    """In place: the softmax over one block more."""
    rows, keys, _ = block
    scores = _scores(q, k, block, scale)
    before = lse_BMGT[..., rows]
    after = torch.logaddexp(before, scores.logsumexp(-1))
    p = torch.exp(scores - after[..., None])
    out_BMGTV[..., rows, :] *= torch.exp(before - after)[..., None]
    out_BMGTV[..., rows, :] += p @ v[:, :, None, keys]
    lse_BMGT[..., rows] = after


def _scores_grad(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, delta: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """Probabilities of a block, and the gradient of its products of queries and keys."""
    rows, keys, _ = block
    p = torch.exp(_scores(q, k, block, scale) - lse[..., rows, None])
    dp = dy[..., rows, :] @ v[:, :, None, keys].transpose(-1, -2)
    return p, p * (dp - delta[..., rows, None]) * scale


def _grouped(x_TBND: Tensor, key_heads: int) -> Tensor:
    """``[B, M, G, T, D]``, at least in fp32."""
    return _wide(x_TBND.unflatten(2, (key_heads, -1)).permute(1, 2, 3, 0, 4))


def _opened(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[B, M, T, D]`` and values ``[B, M, T, V]`` of rows that travel, at least in fp32."""
    keys, values = kv.split([k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]], -1)
    return _wide(keys.view(k.shape).permute(1, 2, 0, 3)), _wide(values.view(v.shape).permute(1, 2, 0, 3))


def _rows(x_BMTD: Tensor) -> Tensor:
    """``[T, B, M * D]``."""
    return x_BMTD.permute(2, 0, 1, 3).flatten(2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
