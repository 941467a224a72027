"""RMSNorm: float64 gradients, half precision, rows of zeros."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.rms_norm import rms_norm
from tests.support.device import here, wide


@pytest.mark.parametrize("shape", [(0, 8), (1, 16), (33, 64), (3, 5, 24)], ids=str)
def test_value_and_gradients_equal_float64(shape):
    torch.manual_seed(0)
    x, dy = here(torch.randn(shape)).requires_grad_(), here(torch.randn(shape))
    gamma = here(torch.randn(shape[-1])).requires_grad_()
    y = rms_norm(x, gamma, 1e-5)
    y.backward(dy)
    x64, g64 = wide(x).requires_grad_(), wide(gamma).requires_grad_()
    y64 = reference.rms_norm(x64, g64, 1e-5)
    y64.backward(wide(dy))
    assert relative_error(y.detach(), y64.detach()) <= 1e-6
    assert relative_error(x.grad, x64.grad) <= 1e-6
    assert relative_error(gamma.grad, g64.grad) <= 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_half_precision_is_computed_in_fp32(dtype, tolerance):
    torch.manual_seed(0)
    x = here(torch.randn(16, 32).to(dtype)).requires_grad_()
    gamma = here(torch.randn(32).to(dtype)).requires_grad_()
    y = rms_norm(x, gamma)
    y.backward(torch.ones_like(y))
    x64, g64 = wide(x).requires_grad_(), wide(gamma).requires_grad_()
    reference.rms_norm(x64, g64, 1e-5).sum().backward()
    assert y.dtype == x.grad.dtype == gamma.grad.dtype == dtype
    assert relative_error(x.grad, x64.grad) <= tolerance
    assert relative_error(gamma.grad, g64.grad) <= tolerance


def test_a_row_of_zeros_stays_finite():
    x = here(torch.zeros(2, 8)).requires_grad_()
    rms_norm(x, here(torch.ones(8))).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_gamma_of_another_width_is_refused():
    with pytest.raises(ValueError, match="gamma has shape"):
        rms_norm(torch.zeros(2, 8), torch.ones(7))
