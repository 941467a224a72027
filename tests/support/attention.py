"""Attention cases, and the same computed in float64 head by head."""

from __future__ import annotations

import torch

from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.ops.attention import fused_attention, fuses_attention
from fluid_npu.ops.reference import relative_error

ROWS, BATCH, SCALE = 48, 2, 0.3
#: Name: (query heads, key heads, head size, head size of values), whether causal by type, whether a mask is given.
CASES: dict[str, tuple[tuple[int, int, int, int], bool, bool]] = {
    "causal": ((4, 4, 16, 16), True, False),
    "causal, key heads shared": ((8, 2, 32, 32), True, False),
    "everything seen": ((4, 1, 16, 16), False, False),
    "a mask": ((4, 2, 16, 16), False, True),
    "latent": ((4, 4, 24, 16), True, False),
    "latent, key heads shared": ((4, 2, 24, 16), True, False),
}


def operands(sizes: tuple[int, int, int, int], dtype: torch.dtype, where: torch.device) -> list[torch.Tensor]:
    """q, k, v ``[S, B, heads, size]``, leaves."""
    heads, shared, size, values = sizes
    generator = torch.Generator().manual_seed(heads)
    shapes = ((heads, size), (shared, size), (shared, values))
    made = (torch.randn(ROWS, BATCH, *shape, generator=generator).to(dtype) for shape in shapes)
    return [x.to(where).requires_grad_() for x in made]


def check(name: str, dtype: torch.dtype, limit: float, where: torch.device) -> str:
    """Output and gradients of a case against float64; the reason of the choice."""
    sizes, causal, masked = CASES[name]
    hidden = torch.ones(ROWS, ROWS, dtype=torch.bool).triu_(3) if masked else torch.ones(ROWS, ROWS).bool().triu_(1)
    call = AttentionCall(
        heads=sizes[0], scale=SCALE, causal=causal, mask=hidden[None, None].to(where) if masked else None
    )
    mine = operands(sizes, dtype, where)
    chosen = fuses_attention(*mine, call)
    assert chosen.value, chosen.reason
    out = fused_attention(*mine, call)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out.backward(dy.to(where))
    whole = [x.detach().cpu().double().requires_grad_() for x in mine]
    wanted = _by_heads(*whole, hidden if causal or masked else None)
    wanted.backward(dy.double())
    pairs = {"out": (out, wanted), **{n: (x.grad, w.grad) for n, x, w in zip("qkv", mine, whole, strict=True)}}
    for what, (got, want) in pairs.items():
        error = relative_error(got.detach().cpu(), want.detach())
        assert error <= limit, (name, what, error, chosen.reason)
    return chosen.reason


def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    outs = []
    for head in range(q.shape[2]):
        key, value = (x[:, :, head * k.shape[2] // q.shape[2]] for x in (k, v))
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head], key) * SCALE
        scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("bst,tbd->sbd", scores.softmax(-1), value))
    return torch.cat(outs, -1)
