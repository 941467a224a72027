"""The blocks of a ring attention by plain products: any window, any dtype; the reference of the fused ones.

Pairs of chunks of which no query sees a key are left out. Shapes as ``ring_attention``; c rows of a chunk, G = N / M.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fluid_npu.ops.ring_call import RingCall


class PlainSums:
    """Output and log-sum-exp of this rank's queries over the keys that came so far, at least in fp32."""

    kept: tuple[Tensor, ...] = ()

    def __init__(self, q_TBND: Tensor, key_heads: int, values: int, call: RingCall) -> None:
        self._q, self._call = q_TBND, call
        self._q_BMGTD = _grouped(q_TBND, key_heads)
        self._out_BMGTV = self._q_BMGTD.new_zeros(*self._q_BMGTD.shape[:-1], values)
        self._lse_BMGT = self._q_BMGTD.new_full(self._q_BMGTD.shape[:-1], float("-inf"))

    def add(self, number: int, k_TBMD: Tensor, v_TBMV: Tensor) -> None:
        """The keys and values of step ``number``."""
        k, v, scale = _heads_first(k_TBMD), _heads_first(v_TBMV), self._call.scale
        for block in _blocks(self._call, number, self._q.shape[0], self._q.device):
            _add_block(self._q_BMGTD, k, v, self._out_BMGTV, self._lse_BMGT, block, scale)

    def result(self) -> tuple[Tensor, Tensor]:
        """([T, B, N * V] in the dtype of q, what the gradients need)."""
        return self._out_BMGTV.permute(3, 0, 1, 2, 4).flatten(2).to(self._q.dtype), self._lse_BMGT


class PlainGradients:
    """Gradients of this rank's queries, and of the keys and values that arrive."""

    def __init__(self, q: Tensor, out_TBNV: Tensor, dy_TBNV: Tensor, lse: Tensor, heads: int, call: RingCall) -> None:
        self._q, self._call, self._lse_BMGT = q, call, lse
        self._q_BMGTD, self._dy_BMGTV = _grouped(q, heads), _grouped(dy_TBNV, heads)
        self._delta_BMGT = (self._dy_BMGTV * _grouped(out_TBNV, heads)).sum(-1)
        self._dq_BMGTD = torch.zeros_like(self._q_BMGTD)

    def add(self, number: int, k_TBMD: Tensor, v_TBMV: Tensor) -> Tensor:
        """``[T, B, M * (D + V)]``: gradients of these keys, then of these values, at least in fp32."""
        q, dy, delta, lse, scale = self._q_BMGTD, self._dy_BMGTV, self._delta_BMGT, self._lse_BMGT, self._call.scale
        k, v = _heads_first(k_TBMD), _heads_first(v_TBMV)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(self._call, number, self._q.shape[0], q.device):
            rows, keys, _ = block
            p, ds = _scores_grad(q, k, v, dy, delta, lse, block, scale)
            self._dq_BMGTD[..., rows, :] += ds @ k[:, :, None, keys]
            dk[:, :, keys] += (ds.transpose(-1, -2) @ q[..., rows, :]).sum(2)
            dv[:, :, keys] += (p.transpose(-1, -2) @ dy[..., rows, :]).sum(2)
        return torch.cat([_rows(dk), _rows(dv)], -1)

    def dq(self) -> Tensor:
        """In the shape and dtype of q."""
        return self._dq_BMGTD.permute(3, 0, 1, 2, 4).flatten(2, 3).to(self._q.dtype)


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


def _heads_first(x_TBMD: Tensor) -> Tensor:
    """``[B, M, T, D]``, at least in fp32."""
    return _wide(x_TBMD.permute(1, 2, 0, 3))


def _rows(x_BMTD: Tensor) -> Tensor:
    """``[T, B, M * D]``."""
    return x_BMTD.permute(2, 0, 1, 3).flatten(2)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
