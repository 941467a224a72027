"""dense_linear with and without deferred dW, and dense dW into main_grad."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.ops.dense_linear import add_dense_dw_, dense_linear
from fluid_npu.ops.reference import relative_error
from tests.support.device import here, wide


@pytest.mark.parametrize("shape", [(7, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_deferred_dw_accumulates_to_the_float64_gradient(shape, with_bias, needs_dx):
    torch.manual_seed(0)
    x, weight = here(torch.randn(shape)).requires_grad_(needs_dx), here(torch.randn(12, 8)).requires_grad_()
    bias = here(torch.randn(12)).requires_grad_() if with_bias else None
    dy, main_grad = here(torch.randn(*shape[:-1], 12)), here(torch.zeros(12, 8))
    for _ in range(2):
        dense_linear(x, weight, bias, defer_dw=lambda x, dy: add_dense_dw_(main_grad, x, dy)).backward(dy)
    x64, dy64 = wide(x).view(-1, 8), wide(dy).view(-1, 12)
    assert weight.grad is None
    assert relative_error(main_grad, 2 * dy64.t() @ x64) <= 1e-6
    if needs_dx:
        assert relative_error(x.grad.view(-1, 8), 2 * dy64 @ wide(weight)) <= 1e-6
    if bias is not None:
        assert relative_error(bias.grad, 2 * dy64.sum(0)) <= 1e-6


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_a_router_may_compute_above_its_dtype(deferred, out_dtype):
    torch.manual_seed(0)
    x, weight = here(torch.randn(6, 16).bfloat16()).requires_grad_(), here(torch.randn(4, 16)).requires_grad_()
    main_grad = here(torch.zeros(4, 16))
    defer = (lambda x, dy: add_dense_dw_(main_grad, x, dy)) if deferred else None
    y = dense_linear(x, weight, defer_dw=defer, out_dtype=out_dtype)
    dy = here(torch.randn(6, 4).to(out_dtype))
    y.backward(dy)
    got = main_grad if deferred else weight.grad
    assert y.dtype == out_dtype and x.grad.dtype == torch.bfloat16
    assert relative_error(y.detach(), wide(x) @ wide(weight).t()) <= 1e-6
    assert relative_error(got, wide(dy).t() @ wide(x)) <= 1e-6
    assert relative_error(x.grad, wide(dy) @ wide(weight)) <= 4e-3


def test_half_precision_dw_is_added_in_fp32():
    x, dy = here(torch.randn(9, 8).bfloat16()), here(torch.randn(9, 4).bfloat16())
    main_grad = here(torch.ones(4, 8))
    add_dense_dw_(main_grad, x, dy)
    assert relative_error(main_grad, 1 + wide(dy).t() @ wide(x)) <= 4e-3
