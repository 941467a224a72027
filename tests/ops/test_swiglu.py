"""SwiGLU with probabilities: float64 gradients, Megatron's rounding, empty input, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels import cpu_kernels
from fluid_npu.device.kernels.activations import FORMS, ActivationProbs
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.known_rows import kernels_for
from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.swiglu import activation_probs, swiglu_probs
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
    one, kernels = ActivationProbs(function=F.gelu, gated=gated), kernels_of(h)
    leaves = [h.clone().requires_grad_(), p.clone().requires_grad_()]
    with OpCount() as by_autograd:
        x, value = leaves[0].chunk(2, dim=-1) if gated else (leaves[0], None)
        plain = F.gelu(x) if value is None else F.gelu(x) * value
        a = (plain * leaves[1].unsqueeze(-1)).to(dtype)
        want = torch.autograd.grad(a, leaves, da)
    with OpCount() as count:
        found = kernels.activation_probs_grad(da, h, p, one)
    assert torch.equal(kernels.activation_probs(h, p, one), a)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, want, strict=True))
    assert count.ops["mul"] < by_autograd.ops["mul"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_float64(form: str, gated: bool):
    for rows, width in ((7, 19), (0, 19)):
        h, p, da = operands(rows, width, torch.float32)
        da = da if gated else torch.cat([da, da], 1)
        a = activation_probs(h, p, FORMS[form], gated)
        a.backward(da)
        h64, p64 = wide(h).requires_grad_(), wide(p).requires_grad_()
        a64 = reference.activation_probs(h64, p64, form, gated)
        a64.backward(wide(da))
        for got, wanted in ((a.detach(), a64.detach()), (h.grad, h64.grad), (p.grad, p64.grad)):
            assert relative_error(got, wanted) <= 1e-6


def test_rows_that_are_not_in_use_are_not_computed():
    """What the device alone knows has the bits of the rows in use by themselves; the function meets no others."""
    h, p, da = (x.detach() for x in operands(9, 18, torch.float32))
    da = torch.cat([da, da], 1)
    met: list[int] = []
    one = ActivationProbs(function=lambda x: met.append(x.shape[0]) or F.gelu(x))
    counts = DeviceRows(2, 9, 9)
    counts.settle(here(torch.tensor([2, 5])))
    kernels = kernels_for(h, counts)
    a, grads = kernels.activation_probs(h, p, one, counts), kernels.activation_probs_grad(da, h, p, one, counts)
    assert met == [5, 5]
    known = kernels_of(h)
    wanted = known.activation_probs(h[:5], p[:5], one), *known.activation_probs_grad(da[:5], h[:5], p[:5], one)
    for got, same in zip((a, *grads), wanted, strict=True):
        assert got.shape[0] == 9 and torch.equal(got[:5], same)


def test_misfits_are_refused_by_name():
    with pytest.raises(ValueError, match="activation_probs: h has width 7"):
        activation_probs(torch.zeros(3, 7), torch.zeros(3), F.gelu, gated=True)
    with pytest.raises(ValueError, match="h has width 7"):
        swiglu_probs(torch.zeros(3, 7), torch.zeros(3))
    with pytest.raises(ValueError, match=r"p has shape \(3, 1\)"):
        swiglu_probs(torch.zeros(3, 8), torch.zeros(3, 1))
