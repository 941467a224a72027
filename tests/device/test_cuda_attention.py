"""Attention of an NVIDIA GPU against float64, each kernel and what auto takes; deselected where there is none."""

from __future__ import annotations

import pytest
import torch

from fluid_npu import device
from fluid_npu.device.kernels.cuda_kernels import CudaKernels
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.torch_attention import repeatable_attention
from fluid_npu.ops.attention import fused_attention, fuses_attention
from tests.support.attention import CASES, check, operands

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def take(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """As in a process that was started with FLUID_ATTENTION."""
    monkeypatch.setenv("FLUID_ATTENTION", asked)
    monkeypatch.setitem(device._kernels, "cuda", CudaKernels())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_auto_takes_has_float64_s_values_and_gradients(name, dtype, monkeypatch):
    take(monkeypatch, "auto")
    print(f"{name}, {dtype}: {check(name, dtype, TOLERANCE[dtype], torch.device('cuda'))}")


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "torch"])
@pytest.mark.parametrize("name", ["causal", "causal, key heads shared", "latent"])
def test_each_kernel_that_torch_has_here(name, kernel, monkeypatch):
    take(monkeypatch, kernel)
    q, k, v = operands(CASES[name][0], torch.bfloat16, torch.device("cuda"))
    chosen = fuses_attention(q, k, v, AttentionCall(heads=q.shape[2], scale=0.3, causal=True))
    print(f"{kernel}, {name}: {chosen.reason}")
    if chosen.value:
        check(name, torch.bfloat16, TOLERANCE[torch.bfloat16], torch.device("cuda"))
    else:
        assert kernel != "flash", chosen.reason  # every GPU from Ampere on has it


def test_single_precision_is_left_to_megatron(monkeypatch):
    take(monkeypatch, "auto")
    q, k, v = operands((4, 2, 16, 16), torch.float32, torch.device("cuda"))
    assert "bf16 and fp16" in fuses_attention(q, k, v, AttentionCall(heads=4, scale=0.3, causal=True)).reason


@pytest.mark.parametrize("sizes", [(16, 4, 128, 128), (16, 16, 192, 128)], ids=str)
def test_repeatable_attention_repeats_its_bits_and_leaves_torch_s_flag(sizes, monkeypatch):
    take(monkeypatch, "auto")
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((sizes[0], sizes[2]), (sizes[1], sizes[2]), (sizes[1], sizes[3]))
    qkv = [torch.randn(2048, 1, *s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    call = AttentionCall(heads=sizes[0], scale=0.1, causal=True)
    found = []
    for _ in range(4):
        with repeatable_attention():
            out = fused_attention(*qkv, call)
        found.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), qkv)))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()
