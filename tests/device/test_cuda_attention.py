"""Attention of an NVIDIA GPU against float64: kernels, windows, dropout, a ring's blocks; deselected without one."""

from __future__ import annotations

import pytest
import torch

from fluid_npu import device
from fluid_npu.device.kernels.attention_check import plain_products, with_gradients
from fluid_npu.device.kernels.cuda_kernels import CudaKernels
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.torch_attention import repeatable_attention
from fluid_npu.device.kernels.torch_attention_blocks import TorchBlocks
from fluid_npu.ops.attention import fused_attention, fuses_attention
from fluid_npu.ops.reference import relative_error
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


def errors(call: AttentionCall, sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """Output and gradients of bf16 on the GPU against plain products in float64."""
    q, k, v = operands(sizes, torch.bfloat16, torch.device("cuda"))
    chosen = fuses_attention(q, k, v, call)
    assert chosen.value, chosen.reason
    out = fused_attention(q, k, v, call)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to("cuda", torch.bfloat16)
    found = (out.detach(), *torch.autograd.grad(out, (q, k, v), dy))
    wanted = with_gradients(plain_products, [x.detach().double() for x in (q, k, v)], dy.double(), call)
    print(chosen.reason)
    return {name: relative_error(a, b) for name, a, b in zip(("out", "q", "k", "v"), found, wanted, strict=True)}


@pytest.mark.parametrize("window", [(9, 0), (5, 3), (1000, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 2, 64, 64), (4, 4, 24, 16)], ids=str)
def test_windows_have_float64_s_values_and_gradients(sizes, window, monkeypatch):
    take(monkeypatch, "auto")
    found = errors(AttentionCall(heads=sizes[0], scale=0.3, window=window), sizes)
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("window", [None, (9, 0)], ids=str)
def test_dropout_repeats_with_the_state_and_differs_with_another(window, monkeypatch):
    take(monkeypatch, "auto")
    qkv = operands((8, 2, 64, 64), torch.bfloat16, torch.device("cuda"))
    call = AttentionCall(heads=8, scale=0.1, causal=window is None, window=window, dropout=0.3)
    chosen = fuses_attention(*qkv, call)  # its check recovers what was dropped, and compares values and gradients
    print(f"dropout, window {window}: {chosen.reason}")
    assert chosen.value, chosen.reason
    found = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        found.append(fused_attention(*qkv, call))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(8, 2, 128, 128), (4, 4, 64, 64), (4, 4, 192, 128)], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash"])
def test_blocks_of_a_ring(kernel, sizes, dtype):
    """``choose`` computes two blocks and compares; here what it says, and that a GPU has a form for each of these."""
    q, k, v = operands(sizes, dtype, torch.device("cuda"))
    block, reason = TorchBlocks(kernel).choose(q, k, v, 0.1)
    print(f"block, {kernel}, {sizes}, {dtype}: {reason}")
    assert block is not None or kernel == "cudnn", reason
    with repeatable_attention():
        again, why = TorchBlocks("auto").choose(q, k, v, 0.1)
    assert again is not None and again.kernel == "flash", why
    out, lse, kept = again.forward(q, k, v, 0.1, True)
    first, second = (again.backward(out, q, k, v, out, lse, kept, 0.1, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
