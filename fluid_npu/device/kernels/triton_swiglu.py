"""SwiGLU times probability, and its gradients, as one launch each: fp32 in registers, nothing but operands in memory.

Shapes: R rows, F ffn; h is [R, 2F], gate then value.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def swiglu_probs(h_R2F: Tensor, p_R: Tensor, ends_L: Tensor | None = None) -> Tensor:
    """[R, F] in the dtype of h: silu(h[:, :F]) * h[:, F:] * p, rounded once. h has unit stride along its rows.

    With ``ends_L``, on the device, the rows from its last entry on are neither read nor written.
    """
    rows, width = h_R2F.shape[0], h_R2F.shape[1] // 2
    a_RF = h_R2F.new_empty(rows, width)
    if a_RF.numel():
        block = min(triton.next_power_of_2(width), _BLOCK)
        grid = (rows, triton.cdiv(width, block))
        _forward[grid](
            h_R2F, p_R, a_RF, p_R if ends_L is None else ends_L, 0 if ends_L is None else ends_L.shape[0] - 1,
            width, h_R2F.stride(0), p_R.stride(0), BOUNDED=ends_L is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return a_RF


def swiglu_probs_grad(da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, ends_L: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients (dh in the dtype of h, dp in the dtype of p); da and h have unit stride along their rows.

    ``ends_L`` as ``swiglu_probs``.
    """
    rows, width = da_RF.shape
    dh_R2F = torch.empty(h_R2F.shape, dtype=h_R2F.dtype, device=h_R2F.device)
    dp_R = torch.empty(rows, dtype=p_R.dtype, device=p_R.device)
    if dh_R2F.numel() == 0:
        return dh_R2F, dp_R.zero_()
    block = min(triton.next_power_of_2(width), _BLOCK)
    _backward[(rows,)](
        da_RF, h_R2F, p_R, dh_R2F, dp_R,
        p_R if ends_L is None else ends_L, 0 if ends_L is None else ends_L.shape[0] - 1,
        width, da_RF.stride(0), h_R2F.stride(0), p_R.stride(0), BOUNDED=ends_L is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return dh_R2F, dp_R


@triton.jit
def _forward(h, p, a, ends, last, width, stride_h, stride_p, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if BOUNDED:  # noqa: SIM102 (decided when it is compiled)
        if row >= tl.load(ends + last):
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(h + row * stride_h + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(h + row * stride_h + width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(p + row * stride_p).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value * scale
    tl.store(a + row * width + columns, out.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    da, h, p, dh, dp, ends, last, width, stride_da, stride_h, stride_p, BOUNDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if BOUNDED:  # noqa: SIM102 (decided when it is compiled)
        if row >= tl.load(ends + last):
            return
    scale = tl.load(p + row * stride_p).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        pull = tl.load(da + row * stride_da + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(h + row * stride_h + columns, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(h + row * stride_h + width + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += pull * silu * value
        pull *= scale
        d_gate = pull * value * (sigmoid + silu * (1.0 - sigmoid))
        at = dh + row * (2 * width) + columns
        tl.store(at, d_gate.to(dh.dtype.element_ty), mask=inside)
        tl.store(at + width, (pull * silu).to(dh.dtype.element_ty), mask=inside)
    tl.store(dp + row, tl.sum(total).to(dp.dtype.element_ty))
