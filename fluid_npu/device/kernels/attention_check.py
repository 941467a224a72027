"""A small case of attention, computed by an operator that is to be taken and by plain products in fp32.

Dropout is checked by what it dropped: with values that are the identity the output is the probabilities, and the same
random state drops the same of them for other values. Shapes as ``fused``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.fused import AttentionCall

#: Rows of the small case.
SMALL_ROWS = 64
#: Largest relative error in it. Halves are rounded three times on the way.
LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
#: What an operator that torch lacks, or whose signature is another, raises.
REFUSALS = (RuntimeError, TypeError, AttributeError, ValueError)
_WINDOW = 9
_DROPOUT, _SEED = 0.5, 11

Attend = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
F = TypeVar("F")


def first_that_agrees(
    forms: Iterable[F], error_of_form: Callable[[F], float | str], dtype: torch.dtype
) -> Choice[F | None]:
    """The first form whose error in its small case is small enough, and why those before it were refused; None with
    the refusals alone, '' where there were no forms."""
    refused: list[str] = []
    for form in forms:
        error = error_of_form(form)
        if isinstance(error, float) and error <= LARGEST_ERROR[dtype]:
            why = f"{form}; off by {error:.0e} in its check"
            return Choice(form, f"{why}; refused: {'; '.join(refused)}" if refused else why)
        refused.append(f"{form}: {error if isinstance(error, str) else f'off by {error:.0e}'}")
    return Choice(None, "; ".join(refused))


def error_of(attend: Attend, like: Tensor, sizes: tuple[int, int, int, int], call: AttentionCall) -> float | str:
    """The largest relative error of output and gradients in a small case, or why there are none.

    ``sizes`` are N, M, D, V; random states are left as they were.
    """
    heads, shared, size, values = sizes
    rows = SMALL_ROWS if call.dropout == 0 else min(SMALL_ROWS, values)
    shapes = ((heads, size), (shared, size), (shared, values), (heads * values,))
    small = _small_call(heads, rows, call, like.device)
    devices = [like.device] if like.is_cuda else []
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")  # torch says why each kernel cannot be
        *qkv, dy = small_case(shapes, like, rows)
        try:
            kept = None if call.dropout == 0 else _kept(attend, qkv, small)
            torch.manual_seed(_SEED)
            found = with_gradients(attend, qkv, dy, small)
        except REFUSALS as error:
            return first_line(error)
        if (
            kept is not None
            and not 0.3 < float(kept.float().sum() / _plain_probabilities(qkv, small).ne(0).sum()) < 0.7
        ):
            return f"kept other than half of the probabilities with dropout {_DROPOUT}"
        wanted = with_gradients(
            lambda q, k, v, asked: plain_products(q, k, v, asked, kept), [x.float() for x in qkv], dy.float(), small
        )
    return largest_error(found, wanted)


def small_case(shapes: Sequence[Sequence[int]], like: Tensor, rows: int = SMALL_ROWS) -> list[Tensor]:
    """``[S, 2, *shape]`` of the same normal numbers each time, in the dtype and on the device of ``like``."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    made = (torch.randn(rows, 2, *shape, device=like.device, generator=generator) for shape in shapes)
    return [x.to(like.dtype) for x in made]


def with_gradients(attend: Attend, qkv: Sequence[Tensor], dy: Tensor, call: AttentionCall) -> tuple[Tensor, ...]:
    """Output, and gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    out = attend(q, k, v, call)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dy))


def plain_products(
    q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall, kept_BNST: Tensor | None = None
) -> Tensor:
    """``[S, B, N * V]`` by products and a softmax; of its probabilities only those that are kept by dropout."""
    weights = _plain_probabilities((q_SBND, k_TBMD), call)
    if kept_BNST is not None:
        weights = weights * kept_BNST / (1 - call.dropout)
    v = v_TBMV.permute(1, 2, 0, 3).repeat_interleave(q_SBND.shape[2] // v_TBMV.shape[2], 1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative, of the worst of them."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()[:80] or type(error).__name__


def _small_call(heads: int, rows: int, call: AttentionCall, device: torch.device) -> AttentionCall:
    """The same kind of call for so many rows; a mask, and a window, hide some keys, never a query's own."""
    mask = None if call.mask is None else torch.ones(1, 1, rows, rows, dtype=torch.bool, device=device).triu_(1)
    window = None if call.window is None else (min(_WINDOW, call.window[0]), min(_WINDOW, call.window[1]))
    return replace(call, heads=heads, mask=mask, window=window, dropout=_DROPOUT if call.dropout else 0.0)


def _plain_probabilities(qk: Sequence[Tensor], call: AttentionCall) -> Tensor:
    """``[B, N, S, T]`` in fp32 or wider."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)).permute(1, 2, 0, 3) for x in qk[:2])
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * call.scale
    hidden = hidden_keys(call, scores.shape[-2], scores.shape[-1], scores.device)
    return (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))).softmax(-1)


def hidden_keys(call: AttentionCall, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """True where a key is hidden from a query; None: nowhere."""
    if call.window is None and not call.causal:
        return call.mask
    left, right = call.window if call.window is not None else (queries, 0)
    behind = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (behind > left) | (behind < -right)


def _kept(attend: Attend, qkv: Sequence[Tensor], call: AttentionCall) -> Tensor:
    """``[B, N, S, T]``: which probabilities the random state keeps."""
    q, k, v = qkv
    rows = torch.eye(v.shape[0], v.shape[3], dtype=v.dtype, device=v.device)
    torch.manual_seed(_SEED)
    out = attend(q, k, rows[:, None, None].expand(v.shape).contiguous(), call)
    return out.detach().unflatten(2, (q.shape[2], -1)).permute(1, 2, 0, 3)[..., : v.shape[0]].ne(0)
