"""Attention by torch's fused kernels against float64: masks, shared key heads, latent head sizes, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluid_npu import device
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.cpu_kernels import CpuKernels
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.torch_attention import Form, TorchAttention, plain_attention, torch_attention
from fluid_npu.ops.attention import fused_attention, fuses_attention
from tests.support.attention import CASES, check, operands

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with FLUID_ATTENTION=torch, which the CPU's kernels read when they are made."""
    monkeypatch.setenv("FLUID_ATTENTION", "torch")
    monkeypatch.setitem(device._kernels, "cpu", CpuKernels())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)], ids=str)
def test_values_and_gradients_are_those_of_float64(name: str, dtype: torch.dtype, limit: float) -> None:
    check(name, dtype, limit, torch.device("cpu"))


@pytest.mark.parametrize("form", [Form(kernel="torch", repeats=True), Form(kernel="torch", repeats=True, pads=True)])
def test_each_form_computes_the_same(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluid_npu.device.kernels.torch_attention._forms", lambda *_: [form])
    check("latent, key heads shared", torch.float32, 2e-6, torch.device("cpu"))


def test_a_form_that_is_wrong_or_missing_is_passed_over_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Form.compute

    def broken(self: Form, q: Any, k: Any, v: Any, call: AttentionCall) -> torch.Tensor:
        if not self.repeats:
            raise RuntimeError("no such kernel\nand more")
        return compute(self, q, k, v, call) * (1.5 if not self.pads else 1.0)

    monkeypatch.setattr(Form, "compute", broken)
    q, k, v = operands((4, 2, 8, 6), torch.float32, torch.device("cpu"))
    chosen = fuses_attention(q, k, v, AttentionCall(heads=4, scale=0.3, causal=True))
    assert chosen.value and chosen.reason.startswith("torch, key heads repeated, values padded; off by")
    assert "torch: no such kernel" in chosen.reason and "torch, key heads repeated: off by 5e-01" in chosen.reason


def test_comparisons_with_stock_take_megatron_s_products() -> None:
    q, k, v = operands((4, 2, 8, 8), torch.float32, torch.device("cpu"))
    call = AttentionCall(heads=4, scale=0.3, causal=True)
    with plain_attention():
        assert fuses_attention(q, k, v, call) == Choice(False, "a comparison asks for them")
    assert fuses_attention(q, k, v, call).value


def test_decisions_do_not_grow_with_lengths() -> None:
    made = TorchAttention("torch")
    for rows in (2, 3, 5, 9):
        q, k, v = (x[:rows] for x in operands((4, 2, 8, 8), torch.float32, torch.device("cpu")))
        assert made.accepts(q, k, v, AttentionCall(heads=4, scale=0.3, causal=True)).value
    assert len(made._chosen) == 1


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "more than one row": (lambda q, k, v: (q[:1], k[:1], v[:1]), {}),
    "one floating dtype": (lambda q, k, v: (q, k.double(), v), {}),
    "heads that share keys": (lambda q, k, v: (q[:, :, :3], k, v), {}),
    "no wider than queries": (lambda q, k, v: (q, k, torch.cat([v, v], -1)), {}),
    "S = T, no mask": (lambda q, k, v: (q[:3], k, v), {"causal": True}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_kernel_takes_is_refused_with_the_rule(reason: str) -> None:
    change, settings = REFUSED[reason]
    q, k, v = change(*operands((4, 2, 8, 8), torch.float32, torch.device("cpu")))
    call = AttentionCall(heads=q.shape[2], scale=0.3, **settings)
    assert reason in fuses_attention(q, k, v, call).reason
    with pytest.raises(ValueError, match="fused_attention: .*use Megatron's DotProductAttention"):
        fused_attention(q, k, v, call)


def test_megatron_s_is_the_cpu_s_default_and_other_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_ATTENTION", "flash")
    with pytest.raises(ValueError, match="FLUID_ATTENTION='flash': allowed are megatron, torch"):
        CpuKernels()
    assert torch_attention(("auto", "flash")) is not None
    monkeypatch.delenv("FLUID_ATTENTION")
    assert CpuKernels().attention is None
