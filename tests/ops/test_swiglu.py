"""SwiGLU with probabilities: float64 gradients, Megatron's rounding, empty input, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.device.kernels import cpu_kernels
from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.swiglu import ActivationProbs, activation_probs, swiglu_probs
from tests.support.device import agree, here, wide
from tests.support.op_count import OpCount


def operands(rows: int, width: int, dtype: torch.dtype):
    torch.manual_seed(rows)
    h = here(torch.randn(rows, 2 * width).to(dtype)).requires_grad_()
    return h, here(torch.rand(rows)).requires_grad_(), here(torch.randn(rows, width).to(dtype))


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("block", [2**17, 64, 1])
def test_value_and_gradients_equal_float64(rows, block, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SWIGLU_BLOCK", block)
    h, p, da = operands(rows, 16, torch.float32)
    a = swiglu_probs(h, p)
    a.backward(da)
    h64, p64 = wide(h).requires_grad_(), wide(p).requires_grad_()
    a64 = reference.swiglu_probs(h64, p64)
    a64.backward(wide(da))
    assert relative_error(a.detach(), a64.detach()) <= 1e-6
    assert relative_error(h.grad, h64.grad) <= 1e-6
    assert relative_error(p.grad, p64.grad) <= 1e-6


def test_an_expanded_gradient_and_a_strided_input_are_accepted():
    h, p, _ = operands(9, 16, torch.float32)
    swiglu_probs(h.t().contiguous().t(), p).sum().backward()
    h64, p64 = wide(h).requires_grad_(), wide(p).requires_grad_()
    reference.swiglu_probs(h64, p64).sum().backward()
    assert relative_error(h.grad, h64.grad) <= 1e-6
    assert relative_error(p.grad, p64.grad) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_rounds_exactly_as_megatron(dtype):
    h, p, _ = operands(64, 32, dtype)
    h0, h1 = h.chunk(2, dim=-1)
    stock = (F.silu(h0) * h1 * p.unsqueeze(-1)).to(dtype)
    assert agree(swiglu_probs(h, p), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_not_worse_than_autograd(dtype):
    h, p, da = operands(64, 32, dtype)
    swiglu_probs(h, p).backward(da)
    h64, p64 = wide(h).requires_grad_(), wide(p).requires_grad_()
    reference.swiglu_probs(h64, p64).backward(wide(da))
    stock_h, stock_p = h.detach().clone().requires_grad_(), p.detach().clone().requires_grad_()
    h0, h1 = stock_h.chunk(2, dim=-1)
    (F.silu(h0) * h1 * stock_p.unsqueeze(-1)).to(dtype).backward(da)
    assert h.grad.dtype == dtype and p.grad.dtype == torch.float32
    assert relative_error(h.grad, h64.grad) <= relative_error(stock_h.grad, h64.grad)
    assert relative_error(p.grad, p64.grad) <= relative_error(stock_p.grad, p64.grad)


def test_other_activations_gated_or_not():
    h, p, _ = operands(5, 8, torch.float32)
    plain = activation_probs(h, p, F.gelu)
    gated = activation_probs(h, p, F.silu, gated=True)
    assert torch.equal(plain, F.gelu(h) * p.unsqueeze(-1))
    assert relative_error(gated.detach(), reference.swiglu_probs(wide(h), wide(p))) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_other_activations_are_autograd_s_bit_for_bit_without_its_forward(gated: bool, dtype: torch.dtype):
    h, p, da = (x.detach() for x in operands(5, 8, dtype))
    da = da if gated else torch.cat([da, da], 1)
    one = ActivationProbs(function=F.gelu, gated=gated)
    leaves = [h.clone().requires_grad_(), p.clone().requires_grad_()]
    with OpCount() as by_autograd:
        want = torch.autograd.grad(one(*leaves), leaves, da)
    with OpCount() as count:
        found = one.grads(da, h, p)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, want, strict=True))
    assert count.ops["mul"] < by_autograd.ops["mul"]


def test_misfits_are_refused_by_name():
    with pytest.raises(ValueError, match="h has width 7"):
        swiglu_probs(torch.zeros(3, 7), torch.zeros(3))
    with pytest.raises(ValueError, match=r"p has shape \(3, 1\)"):
        swiglu_probs(torch.zeros(3, 8), torch.zeros(3, 1))
