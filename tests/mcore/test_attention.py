"""Which attention the layer specs' core takes: the device's where it computes the same, else Megatron's, with why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from fluid_npu import device
from fluid_npu.device.kernels.attention_check import error_of, plain_products
from fluid_npu.device.kernels.cpu_kernels import CpuKernels
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.npu_kernels import NpuKernels
from fluid_npu.device.kernels.torch_attention import Form, TorchAttention
from fluid_npu.mcore.attention import FusedCore
from fluid_npu.mcore.context import RankDropout
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


@pytest.mark.parametrize("window", [(2, 0), (1, 3)])
def test_a_window_counts_alone_as_in_megatron_s_softmax(fake: FakeTorchNpu, window: tuple[int, int]) -> None:
    q, k, v = operands(7)
    out = Core(window_size=window).forward(q, k, v, torch.ones(1, 1, 7, 7, dtype=torch.bool))
    behind = torch.arange(7)[:, None] - torch.arange(7)[None]
    hidden = {"atten_mask": (behind > window[0]) | (behind < -window[1]), "sparse_mode": 1}
    wanted = plain_attention(*(x.flatten(2) for x in (q, k, v)), 4, 0.5, hidden)
    assert fake.calls[0][1]["sparse_mode"] == 4 and torch.allclose(out, wanted, atol=1e-6)


WITHOUT_SP = SimpleNamespace(sequence_parallel=False)
REFUSED: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    # reason: (settings of the layer, arguments behind the mask's type, named ones)
    "attention bias or packed": ({}, (None, torch.zeros(1)), {}),
    "attention bias or packed sequences": ({}, (), {"packed_seq_params": object()}),
    "a dropout below 1": ({"attention_dropout": torch.nn.Dropout(1.0), "config": WITHOUT_SP}, (), {}),
    "a sliding window of (-1, 0)": ({"window_size": (-1, 0)}, (), {}),
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


@pytest.fixture
def torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with FLUID_ATTENTION=torch."""
    monkeypatch.setenv("FLUID_ATTENTION", "torch")
    monkeypatch.setitem(device._kernels, "cpu", CpuKernels())


class Tracker:
    """Megatron's tracker of random states on a CPU: a fork draws from the state of this tensor rank."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(7).get_state()

    @contextmanager
    def fork(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    made = Tracker()
    monkeypatch.setattr("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: made)
    return made


def test_an_npu_draws_its_dropout_again_in_backward(fake: FakeTorchNpu, tracker: Tracker) -> None:
    q, k, v = (x.requires_grad_() for x in operands(16))
    identity = torch.eye(16)[:, None, None].expand(16, 2, 2, 16).contiguous()
    inside = tracker.state
    kept = (
        dropped(p=0.3).forward(torch.cat([q, q], -1), torch.cat([k, 0 * k], -1), identity, None).unflatten(2, (4, -1))
    )
    tracker.state = inside
    out = dropped(p=0.3).forward(q, k, v, None)
    dy = torch.randn(out.shape)
    found = torch.autograd.grad(out, (q, k, v), dy)
    call = AttentionCall(heads=4, scale=0.5, causal=True, dropout=0.3)
    mask = kept.detach().permute(1, 2, 0, 3) != 0
    wanted = plain_products(q, k, v, call, mask)
    assert torch.allclose(out, wanted, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(wanted, (q, k, v), dy), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert [options["keep_prob"] for _, options in fake.calls] == [0.7] * 3


def dropped(sequence_parallel: bool = False, rank: int | None = None, p: float = 0.4) -> Core:
    made = torch.nn.Dropout(p) if rank is None else RankDropout(p, rank)
    return Core(attention_dropout=made, config=SimpleNamespace(sequence_parallel=sequence_parallel))


def test_dropout_drops_its_share_of_probabilities_and_scales_the_others(torch_s: None, tracker: Tracker) -> None:
    """Values that are the identity show the probabilities."""
    q, k = torch.randn(32, 2, 4, 32), torch.randn(32, 2, 2, 32)
    v = torch.eye(32)[:, None, None].expand(32, 2, 2, 32).contiguous()
    whole, some = (core.forward(q, k, v, None).unflatten(2, (4, -1)) for core in (Core(), dropped()))
    kept = some != 0
    assert torch.allclose(some[kept], whole[kept] / 0.6, rtol=1e-4)
    assert abs(float(kept.sum() / (whole != 0).sum()) - 0.6) < 0.05


def test_dropout_draws_from_the_states_that_megatron_s_forward_draws_from(torch_s: None, tracker: Tracker) -> None:
    """The tensor rank's own, or with sequence parallelism the common one, whose rows differ; each call draws others."""
    qkv = operands(16)
    outside, inside = torch.get_rng_state(), tracker.state
    first = dropped().forward(*qkv, None)
    assert torch.equal(torch.get_rng_state(), outside)
    moved = tracker.state
    assert not torch.equal(moved, inside) and not torch.equal(dropped().forward(*qkv, None), first)
    tracker.state = inside
    assert torch.equal(dropped().forward(*qkv, None), first)
    tracker.state = moved
    dropped(sequence_parallel=True).forward(*qkv, None)
    assert torch.equal(tracker.state, moved)
    assert not torch.equal(torch.get_rng_state(), outside)


def test_ranks_that_hold_other_heads_of_a_sequence_drop_others(torch_s: None, tracker: Tracker) -> None:
    qkv, inside = operands(16), tracker.state
    found = []
    for rank in (0, 1, 0):
        tracker.state = inside
        found.append(dropped(rank=rank).forward(*qkv, None))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert not torch.equal(tracker.state, inside)


def test_the_check_of_dropout_leaves_random_states_alone_and_sees_a_wrong_share(torch_s: None) -> None:
    qkv, call = operands(16), AttentionCall(heads=4, scale=0.5, causal=True, dropout=0.4)
    before = torch.get_rng_state()
    chosen = TorchAttention("torch").accepts(*qkv, call)
    assert chosen.value and torch.equal(torch.get_rng_state(), before)
    form = Form(kernel="torch", repeats=True)

    def without(q: Any, k: Any, v: Any, asked: AttentionCall) -> torch.Tensor:
        return form.compute(q, k, v, replace(asked, dropout=0.0))

    def unscaled(q: Any, k: Any, v: Any, asked: AttentionCall) -> torch.Tensor:
        return form.compute(q, k, v, asked) * (1 - asked.dropout)

    assert "kept other than half" in str(error_of(without, qkv[0], (4, 2, 8, 8), call))
    assert error_of(unscaled, qkv[0], (4, 2, 8, 8), call) == pytest.approx(0.5, abs=1e-3)
