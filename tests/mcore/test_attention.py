"""Which attention the layer specs' core takes: the device's where it computes the same, else Megatron's, with why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from fluid_npu import device
from fluid_npu.device.kernels.npu_kernels import NpuKernels
from fluid_npu.mcore.attention import FusedCore
from tests.support.fake_torch_npu import FakeTorchNpu, plain_attention


class Plain:
    """What FusedCore reads of a DotProductAttention."""

    def __init__(self, **changes: Any) -> None:
        softmax = SimpleNamespace(attn_mask_type=AttnMaskType.causal, scale=None, window_size=None)
        settings = {"softmax_scale": 0.5, "softmax_offset": None, "attention_dropout": torch.nn.Dropout(0.0)}
        settings["scale_mask_softmax"] = softmax
        for name, value in {**settings, **changes}.items():
            setattr(softmax if hasattr(softmax, name) else self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> str:
        return "Megatron's"


class Core(FusedCore, Plain):
    """As FluidDotProductAttention, without its parallel state."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTorchNpu:
    """Tensors of the CPU take the NPU's kernels, with a stand-in for torch_npu."""
    made = FakeTorchNpu()
    monkeypatch.setitem(device._kernels, "cpu", NpuKernels(torch_npu=made))
    return made


def operands(length: int = 5) -> list[torch.Tensor]:
    return [torch.randn(length, 2, heads, 8) for heads in (4, 2, 2)]


def test_a_device_without_a_fused_attention_takes_megatron_s_forward() -> None:
    assert Core().forward(*operands(), None) == "Megatron's"


def test_causal_attention_is_fused_and_reads_no_mask(fake: FakeTorchNpu) -> None:
    q, k, v = operands()
    out = Core().forward(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=None)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = plain_attention(*(x.flatten(2) for x in (q, k, v)), 4, 0.5, {"atten_mask": hidden, "sparse_mode": 1})
    assert fake.names() == ["npu_fusion_attention"] and torch.allclose(out, wanted, atol=1e-6)


def test_a_given_mask_counts_alone_as_in_megatron_s_softmax(fake: FakeTorchNpu) -> None:
    q, k, v = operands()
    hidden = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    hidden[..., 3] = True
    out = Core().forward(q, k, v, hidden)
    wanted = plain_attention(*(x.flatten(2) for x in (q, k, v)), 4, 0.5, {"atten_mask": hidden, "sparse_mode": 1})
    assert fake.calls[0][1]["sparse_mode"] == 1 and torch.allclose(out, wanted, atol=1e-6)


def test_query_key_layer_scaling_cancels(fake: FakeTorchNpu) -> None:
    q, k, v = operands()
    scaled = Core(softmax_scale=0.5 / 3, scale=3).forward(q, k, v, None)
    assert torch.allclose(scaled, Core().forward(q, k, v, None), atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    # reason: (settings of the layer, arguments behind the mask's type, named ones)
    "attention bias or packed": ({}, (None, torch.zeros(1)), {}),
    "attention bias or packed sequences": ({}, (), {"packed_seq_params": object()}),
    "dropout draws from Megatron's random states": ({"attention_dropout": torch.nn.Dropout(0.1)}, (), {}),
    "a sliding window": ({"window_size": (2, 0)}, (), {}),
    "softmax has an offset": ({"softmax_offset": torch.zeros(4)}, (), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_operator_does_not_compute_takes_megatron_s_forward(
    fake: FakeTorchNpu, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.choice, "_announced", {})
    settings, args, kwargs = REFUSED[reason]
    assert Core(**settings).forward(*operands(), None, *args, **kwargs) == "Megatron's"
    assert fake.calls == [] and "attention: Megatron's (" in (said := capsys.readouterr().out) and reason in said


def test_dropout_that_is_off_does_not_matter(fake: FakeTorchNpu) -> None:
    core = Core(attention_dropout=torch.nn.Dropout(0.1).eval())
    core.forward(*operands(), None)
    assert fake.names() == ["npu_fusion_attention"]
