"""An activation times probability, and its gradients, as one launch each: fp32 in registers, only operands in memory.

Shapes: R rows, F ffn; h is [R, F], or [R, 2F], gate then value, where ``gated``. ``form`` is a name in
``activations.FORMS``.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def activation_probs(h: Tensor, p_R: Tensor, form: str, gated: bool, ends_L: Tensor | None = None) -> Tensor:
    """[R, F] in the dtype of h: f(h) * p or f(gate) * value * p, rounded once. h has unit stride along its rows.

    With ``ends_L``, on the device, the rows from its last entry on are neither read nor written.
    """
    rows, width = h.shape[0], h.shape[1] // (2 if gated else 1)
    a_RF = h.new_empty(rows, width)
    if a_RF.numel():
        block = min(triton.next_power_of_2(width), _BLOCK)
        grid = (rows, triton.cdiv(width, block))
        _forward[grid](
            h, p_R, a_RF, p_R if ends_L is None else ends_L, 0 if ends_L is None else ends_L.shape[0] - 1,
            width, h.stride(0), p_R.stride(0),
            FORM=form, GATED=gated, BOUNDED=ends_L is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return a_RF


def activation_probs_grad(
    da_RF: Tensor, h: Tensor, p_R: Tensor, form: str, gated: bool, ends_L: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (dh in the dtype of h, dp in the dtype of p); da and h have unit stride along their rows.

    ``ends_L`` as ``activation_probs``.
    """
    rows, width = da_RF.shape
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dp_R = torch.empty(rows, dtype=p_R.dtype, device=p_R.device)
    if dh.numel() == 0:
        return dh, dp_R.zero_()
    block = min(triton.next_power_of_2(width), _BLOCK)
    _backward[(rows,)](
        da_RF, h, p_R, dh, dp_R,
        p_R if ends_L is None else ends_L, 0 if ends_L is None else ends_L.shape[0] - 1,
        width, da_RF.stride(0), h.stride(0), p_R.stride(0),
        FORM=form, GATED=gated, BOUNDED=ends_L is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return dh, dp_R


@triton.jit
def _applied(x, FORM: tl.constexpr):
    """(f(x), f'(x)); what a caller drops is not computed. NaN stays NaN."""
    if FORM == "relu":
        y = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif FORM == "squared relu":
        positive = tl.where(x <= 0, 0.0, x)
        y = positive * positive
        slope = 2.0 * positive
    elif FORM == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x times the sigmoid of z
        if FORM == "gelu tanh":  # 1 + tanh(u) is twice the sigmoid of 2u
            z = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            dz = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        elif FORM == "quick gelu":
            z = 1.702 * x
            dz = 1.702
        else:  # silu
            z = x
            dz = 1.0
        sigmoid = tl.sigmoid(z)
        y = x * sigmoid
        slope = sigmoid + y * (1.0 - sigmoid) * dz
    return y, slope


@triton.jit
def _forward(
    h, p, a, ends, last, width, stride_h, stride_p,
    FORM: tl.constexpr, GATED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if BOUNDED:  # noqa: SIM102 (decided when it is compiled)
        if row >= tl.load(ends + last):
            return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(h + row * stride_h + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(p + row * stride_p).to(tl.float32)
    out, _ = _applied(x, FORM)
    if GATED:
        out *= tl.load(h + row * stride_h + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(a + row * width + columns, (out * scale).to(a.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    da, h, p, dh, dp, ends, last, width, stride_da, stride_h, stride_p,
    FORM: tl.constexpr, GATED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
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
        x = tl.load(h + row * stride_h + columns, mask=inside, other=0.0).to(tl.float32)
        y, slope = _applied(x, FORM)
        if GATED:
            value = tl.load(h + row * stride_h + width + columns, mask=inside, other=0.0).to(tl.float32)
            total += pull * y * value
            pull *= scale
            at = dh + row * (2 * width) + columns
            tl.store(at, (pull * value * slope).to(dh.dtype.element_ty), mask=inside)
            tl.store(at + width, (pull * y).to(dh.dtype.element_ty), mask=inside)
        else:
            total += pull * y
            tl.store(dh + row * width + columns, (pull * scale * slope).to(dh.dtype.element_ty), mask=inside)
    tl.store(dp + row, tl.sum(total).to(dp.dtype.element_ty))
