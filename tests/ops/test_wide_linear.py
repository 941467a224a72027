"""A linear layer above its input's dtype: the bits of casts around torch's own, without wide copies in the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.device.kernels.gemm_forms import bf16_terms
from fluid_npu.ops.wide_linear import wide_linear
from tests.support.device import here


@pytest.mark.parametrize("narrow, wide", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("shape", [(7, 3, 16), (5, 16), (0, 1, 16)])
def test_values_and_gradients_have_the_bits_of_casts_around_torch(shape, narrow, wide):
    torch.manual_seed(0)
    x, w = here(torch.randn(shape).to(narrow)), here(torch.randn(6, 16).to(narrow))
    dy = here(torch.randn(*shape[:-1], 6).to(wide))
    results = []
    for run in (lambda a, b: F.linear(a.to(wide), b.to(wide)), lambda a, b: wide_linear(a, b, wide)):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = run(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_the_graph_keeps_the_narrow_tensors():
    x, w = here(torch.randn(8, 16).bfloat16()).requires_grad_(), here(torch.randn(4, 16).bfloat16()).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide_linear(x, w, torch.float32)
    assert [t.dtype for t in kept] == [torch.bfloat16, torch.bfloat16]


def test_only_what_is_wanted_gets_a_gradient():
    x, w = here(torch.randn(3, 16).bfloat16()), here(torch.randn(4, 16).bfloat16()).requires_grad_()
    wide_linear(x, w, torch.float32).sum().backward()
    assert x.grad is None and w.grad is not None and w.grad.shape == (4, 16)


def test_three_numbers_of_bf16_add_up_to_one_of_fp32():
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 20, 40)
    terms = bf16_terms(x)
    assert terms.shape == (50, 3, 40) and torch.equal(terms.double().sum(1).float(), x)
    assert not torch.equal(terms[:, :2].double().sum(1).float(), x)


@pytest.mark.cuda
def test_on_a_gpu_it_is_as_near_to_float64_as_casts_are():
    torch.manual_seed(0)
    x, w, dy = torch.randn(64, 512).bfloat16(), torch.randn(8, 512).bfloat16(), torch.randn(64, 8)
    wanted = x.double() @ w.double().t()
    leaves = [x.cuda().requires_grad_(), w.cuda().requires_grad_()]
    got = wide_linear(*leaves, torch.float32)
    assert got.dtype == torch.float32 and float((got.cpu() - wanted).abs().max() / wanted.abs().max()) <= 1e-6
    got.backward(dy.cuda())
    for leaf, exact in zip(leaves, (dy.double() @ w.double(), dy.double().t() @ x.double()), strict=True):
        # Rounded once to bf16: half of the last place, and what fp32 may move over its edge.
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
        torch.testing.assert_close(leaf.grad.cpu().double(), exact, rtol=2**-8 * 1.001, atol=1e-5)
