"""Blocks of attention by torch's operators: the check before their use, and the signatures of the installed torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.torch_attention import Form, plain_attention, repeatable_attention
from fluid_npu.device.kernels.torch_attention_blocks import TorchBlock, TorchBlocks, torch_attention_blocks

pytestmark = pytest.mark.host


def operands(heads: int = 4, shared: int = 2, size: int = 8, values: int = 8) -> list[torch.Tensor]:
    return [torch.zeros(6, 2, n, d) for n, d in ((heads, size), (shared, size), (shared, values))]


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_gpu_s_operators_have_the_signatures_that_are_called(kernel: str, repeats: bool) -> None:
    """Shapes alone are computed; numbers are checked on a GPU, and there before use."""
    q, k, v = (x.to("meta", torch.bfloat16) for x in operands(shared=2 if repeats else 4, size=16, values=16))
    block = TorchBlock(kernel=kernel, repeats=repeats)
    out, lse, kept = block.forward(q, k, v, 0.3, True)
    assert out.shape == q.shape and lse.shape == (2, 4, 6) and len(kept) == 2
    grads = block.backward(out, q, k, v, out, lse, kept, 0.3, True)
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("values", [16, 8])
def test_windows_reach_the_operator_under_the_flash_kernel(values: int) -> None:
    qkv = [x.to("meta", torch.bfloat16).requires_grad_() for x in operands(size=16, values=values)]
    form = Form(kernel="flash", repeats=True, pads=values < 16)
    out = form.compute(*qkv, AttentionCall(heads=4, scale=0.3, window=(2, 0), dropout=0.1))
    assert out.shape == (6, 2, 4 * values)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in qkv)


def broken(part: str) -> Any:
    """A block of which one result is wrong."""
    forward, backward = TorchBlock.forward, TorchBlock.backward

    class Broken(TorchBlock):
        def forward(self, *args: Any) -> Any:
            out, lse, kept = forward(self, *args)
            if part == "missing":
                raise RuntimeError("no such kernel\nand more")
            return (out * 1.1 if part == "out" else out), (lse + 0.1 * args[-1] if part == "lse" else lse), kept

        def backward(self, *args: Any) -> Any:
            return tuple(x * (1.1 if part == name else 1) for name, x in zip("qkv", backward(self, *args), strict=True))

    return Broken


@pytest.mark.parametrize("part", ["out", "lse", "q", "k", "v", "missing"])
def test_a_form_that_is_wrong_or_missing_is_not_taken(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TorchBlocks("torch")
    monkeypatch.setattr("fluid_npu.device.kernels.torch_attention_blocks.TorchBlock", broken(part))
    block, reason = made.choose(*operands(), 0.3)
    assert block is None and ("no such kernel" if part == "missing" else "off by") in reason
    assert "and more" not in reason and "FLUID_ATTENTION=torch" in reason


def test_a_cpu_repeats_key_heads_and_pads_values() -> None:
    made = TorchBlocks("torch")
    assert made.choose(*operands(), 0.3).reason.startswith("cpu, key heads repeated; off by")
    assert made.choose(*operands(values=6), 0.3).reason.startswith("cpu, key heads repeated, values padded; off by")
    assert str(made.choose(*operands(shared=4), 0.3).value) == "cpu"


def test_decisions_do_not_grow_with_lengths_and_scales() -> None:
    made = TorchBlocks("torch")
    for rows in (2, 3, 6):
        made.choose(*(x[:rows] for x in operands()), 0.1 * rows)
    assert len(made._chosen) == 1


def test_comparisons_are_respected() -> None:
    made = TorchBlocks("torch")
    with plain_attention():
        assert made.choose(*operands(), 0.3).reason == "a comparison asks for them"
    with repeatable_attention():
        block = made.choose(*operands(), 0.3).value
    assert isinstance(block, TorchBlock) and block.repeatable
    assert not torch.are_deterministic_algorithms_enabled()


def test_words_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ("auto", "megatron", "efficient")
    monkeypatch.setenv("FLUID_ATTENTION", "megatron")
    assert torch_attention_blocks(allowed) is None
    monkeypatch.setenv("FLUID_ATTENTION", "efficient")
    made = torch_attention_blocks(allowed)
    assert made is not None
    assert list(made._forms(*(x.to("meta") for x in operands()), False)) == []
    kernels = {form.kernel for form in TorchBlocks("auto")._forms(*(x.to("meta") for x in operands()), True)}
    assert kernels == {"flash"}  # cuDNN's does not repeat its bits
