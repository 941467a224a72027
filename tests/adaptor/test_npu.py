"""The rotary embedding of the feature ``npu``: the device's operator gives what Megatron's function gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as megatron

from fluid_npu import device
from fluid_npu.adaptor.npu import rotary_by_the_device
from fluid_npu.device.kernels.npu_kernels import NpuKernels
from tests.support.fake_torch_npu import FakeTorchNpu


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTorchNpu:
    """Tensors of the CPU take the NPU's kernels, with a stand-in for torch_npu."""
    made = FakeTorchNpu()
    monkeypatch.setitem(device._kernels, "cpu", NpuKernels(torch_npu=made))
    return made


def angles(width: int) -> torch.Tensor:
    half = torch.randn(5, 1, 1, width // 2)
    return torch.cat((half, half), -1)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (8, {}),
    "part of the head": (4, {}),
    "scaled": (8, {"mscale": 1.3}),
    "pairs of latent attention": (8, {"multi_latent_attention": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fused_embedding_is_megatron_s(fake: FakeTorchNpu, name: str) -> None:
    width, options = CASES[name]
    t, freqs = torch.randn(5, 2, 3, 8, requires_grad=True), angles(width)
    got, wanted = rotary_by_the_device(megatron)(t, freqs, **options), megatron(t, freqs, **options)
    assert torch.allclose(got, wanted, atol=1e-6) and fake.names() == ["npu_rotary_mul"]
    dy = torch.randn_like(got)
    grads = [torch.autograd.grad(out, t, dy)[0] for out in (got, wanted)]
    assert torch.allclose(*grads, atol=1e-6)


def test_what_the_operator_refuses_is_megatron_s_own(
    fake: FakeTorchNpu, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.choice, "_announced", {})
    t, freqs = torch.randn(5, 2, 3, 8, dtype=torch.float64), angles(8).double()
    assert torch.equal(rotary_by_the_device(megatron)(t, freqs), megatron(t, freqs)) and fake.calls == []
    assert "rotary embedding: Megatron's (npu_rotary_mul wants rows in fp16, bf16 or fp32)" in capsys.readouterr().out


def test_without_a_fused_embedding_it_is_megatron_s_own() -> None:
    t, freqs = torch.randn(5, 2, 3, 8), angles(8)
    assert torch.equal(rotary_by_the_device(megatron)(t, freqs), megatron(t, freqs))
