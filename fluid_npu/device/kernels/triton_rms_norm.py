"""RMSNorm and its gradients: one launch forward, one and a sum over partial sums of gamma backward.

Rows are split over a fixed number of programs, so that sums have the same order on every run. R rows, H hidden.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HIDDEN = 16384  # a row is held in registers
_PROGRAMS = 256


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y in the dtype of x, rstd [..., 1] in fp32) over the last dimension of a contiguous x."""
    hidden = x.shape[-1]
    y = torch.empty_like(x)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(hidden)
        _forward[(x.numel() // hidden,)](x, gamma, y, rstd, hidden, eps, BLOCK=block, num_warps=_warps(block))
    return y, rstd


def rms_norm_grad(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dx in the dtype of x, dgamma in the dtype of gamma); dy and x are contiguous."""
    hidden = x.shape[-1]
    dx = torch.empty_like(x)
    rows = x.numel() // max(hidden, 1)
    if rows == 0:
        return dx, torch.zeros_like(gamma)
    programs = min(rows, _PROGRAMS)
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    _backward[(programs,)](dy, x, gamma, rstd, dx, partial, rows, hidden, BLOCK=block, num_warps=_warps(block))
    return dx, partial.sum(0).to(gamma.dtype)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _forward(x, gamma, y, rstd, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    wide = tl.load(x + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide) / hidden + eps)
    tl.store(y + row * hidden + columns, (wide * inverse * scale).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, inverse)


@triton.jit
def _backward(dy, x, gamma, rstd, dx, partial, rows, hidden, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    scale = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(program, rows, tl.num_programs(0)):
        start = number * tl.cast(hidden, tl.int64)
        wide = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        pull = tl.load(dy + start + columns, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + number).to(tl.float32)
        normal = wide * inverse
        total += pull * normal
        pull *= scale
        mean = tl.sum(pull * normal) / hidden
        tl.store(dx + start + columns, ((pull - normal * mean) * inverse).to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + program * hidden + columns, total, mask=inside)
