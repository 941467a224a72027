"""Tokens coded in fp8: how far they come back from what they were, and that only bits are moved in between."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluid_npu.device.base import DeviceUnavailable
from fluid_npu.device.kernels.e4m3_rows import DTYPES, LARGEST, SMALLEST_SCALE, coded_width, from_e4m3, to_e4m3
from fluid_npu.device.kernels.npu_kernels import NpuKernels
from fluid_npu.mcore.dispatch_rows import OnceRows, PlainRows
from fluid_npu.ops.once import once_counts
from fluid_npu.ops.payload_fp8 import Fp8Payload, PayloadError, payload_of
from fluid_npu.ops.payload_once import Arrival
from fluid_npu.ops.permute import PermuteLayout
from tests.support.fake_torch_npu import FakeTorchNpu

#: Half a unit in the last place: e4m3 has 4 significant bits.
E4M3 = 2.0**-4
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tokens(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, with columns of very different size."""
    generator = torch.Generator().manual_seed(hidden)
    sizes = torch.logspace(-3, 3, rows).view(-1, 1) * torch.logspace(0, -4, hidden)
    return (torch.randn(rows, hidden, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 48, 130])
def test_each_number_comes_back_within_the_rounding_of_e4m3(dtype: torch.dtype, hidden: int) -> None:
    x = tokens(40, hidden, dtype)
    coded = to_e4m3(x)
    assert coded.dtype == dtype and coded.shape == (40, coded_width(hidden, dtype))
    assert coded.shape[1] * dtype.itemsize <= hidden + 3 + 16 and coded.stride(0) * dtype.itemsize % 16 == 0
    got, wanted = from_e4m3(coded, hidden).double(), x.double()
    scale = wanted.abs().amax(1, keepdim=True) / LARGEST * (1 + 2.0**-7)
    # Two roundings of normal numbers, of e4m3 and of dtype; below 2^-6 scales the step of e4m3 is 2^-9 scales.
    tiny = 2.0**-10 * scale + (2.0**-25 if dtype == torch.float16 else 0.0)
    bound = wanted.abs() * ((1 + E4M3 + 1e-6) * (1 + UNIT[dtype]) - 1) + tiny * (1 + UNIT[dtype])
    assert torch.all((got - wanted).abs() <= bound)
    assert torch.equal(got.sign()[wanted.abs() > 2 * tiny], wanted.sign()[wanted.abs() > 2 * tiny])


def test_rows_without_a_scale_follow_the_rules() -> None:
    x = torch.ones(7, 5)
    x[1] = 0.0
    x[2, 3] = float("nan")
    x[3, 0] = float("-inf")
    x[4] = torch.tensor([3e38, -3e38, 1.0, 0.0, 2e38])
    x[5] = 1e-44
    x[6] = SMALLEST_SCALE
    got = from_e4m3(to_e4m3(x), 5)
    assert torch.all((got[0] - 1).abs() <= E4M3) and torch.equal(got[1], torch.zeros(5))
    assert got[2].isnan().all() and got[3].isnan().all()
    assert got[4].isfinite().all() and got[4, 0] == pytest.approx(3e38, rel=E4M3)
    assert torch.all(got[5].abs() <= 2.0**-10 * SMALLEST_SCALE + 1e-44)
    assert torch.all((got[6] - x[6]).abs() <= 2.0**-10 * SMALLEST_SCALE)


def test_all_codes_and_all_ties_between_them() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat([numbers, -numbers, halves, -halves]).view(1, -1)
    got = from_e4m3(to_e4m3(row), row.shape[1])
    even = numbers[0::2]  # ties go to the even code
    expected = torch.where(torch.arange(126) % 2 == 0, numbers[:-1], numbers[1:])
    assert torch.equal(got[0, :127], numbers) and torch.equal(got[0, 127:254], -numbers)
    assert torch.equal(got[0, 254:380], expected) and set(expected.tolist()) <= set(even.tolist())


def test_another_dtype_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fp8 payload of torch.float64: tokens must be of torch.float32"):
        to_e4m3(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"--a2a-payload-dtype 'fp4': allowed are same, fp8"):
        payload_of("fp4")
    assert payload_of("same") is None


def test_an_npu_refuses_it_by_name() -> None:
    with pytest.raises(DeviceUnavailable, match="--a2a-payload-dtype fp8: this NPU has no e4m3 numbers"):
        NpuKernels(torch_npu=FakeTorchNpu()).to_e4m3(torch.ones(2, 2))


def _routing(count: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, experts, generator=generator) < 0.4


@pytest.mark.parametrize("form", ["plain", "once-per-rank"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [13, 0])
def test_decoded_tokens_arrive_as_if_they_had_been_sent_themselves(form: str, dtype: torch.dtype, count: int) -> None:
    """One rank with all experts: what is unpacked is bit for bit what a dispatch of the decoded tokens unpacks."""
    hidden, experts, routed = 10, 6, _routing(count, 6)
    x, probs = (
        tokens(count, hidden, dtype) if count else torch.zeros(0, hidden, dtype=dtype),
        torch.rand(count, experts),
    )
    payload = Fp8Payload()

    def rows() -> PlainRows | OnceRows:
        if form == "plain":
            return PlainRows(layout=PermuteLayout.from_routing_map(routed, None), order=None)
        counts, layout_of = once_counts(routed, experts, 1)
        return OnceRows(layout=layout_of(int(counts[:, 0].sum())), arrival=Arrival(expert_rows=int(routed.sum())))

    ours, other = rows(), rows()
    loading, unloading = payload.cargo(ours, hidden, torch.float32, dtype)
    coded = loading.load(x, probs)
    got_x, got_p = unloading.unload(coded)
    decoded = from_e4m3(to_e4m3(x), hidden)
    full = other.pack(hidden, torch.float32).load(decoded, probs)
    want_x, want_p = other.unpack(hidden, torch.float32).unload(full)
    assert torch.equal(got_x, want_x) and torch.equal(got_p, want_p)
    assert coded.shape[1] < full.shape[1] or dtype != torch.float32
    # Gradients travel in full, as without the payload.
    grads = torch.randn(got_x.shape).to(dtype), torch.randn(got_p.shape)
    sent = unloading.load_grad(*grads)
    as_before = other.unpack(hidden, torch.float32).load_grad(*grads)
    assert torch.equal(sent.view(torch.uint8), as_before.view(torch.uint8))
    wanted = other.pack(hidden, torch.float32).unload_grad(sent)
    assert all(map(torch.equal, loading.unload_grad(sent), wanted))


def test_the_error_is_measured_once_and_leaves_out_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    x = tokens(30, 64, torch.bfloat16)
    x[3, 0] = float("inf")
    payload = Fp8Payload()
    payload.code(x[:0])
    assert payload.error is None
    payload.code(x)
    first = payload.error
    payload.code(torch.ones(4, 64, dtype=torch.bfloat16))
    assert first is not None and payload.error is first
    good = torch.cat([x[:3], x[4:]]).double()
    lost = from_e4m3(to_e4m3(x), 64).double()[[*range(3), *range(4, 30)]] - good
    assert first.frobenius == pytest.approx(float(lost.norm() / good.norm()))
    assert first.worst_row == pytest.approx(float((lost.norm(dim=1) / good.norm(dim=1)).max()))
    assert 0.01 < first.frobenius <= first.worst_row < E4M3 + 2.0**-8
    said = capsys.readouterr().out
    assert said.count("payload of dispatch: fp8") == 1 and "% (Frobenius)" in said
    assert not math.isnan(PayloadError.of(x * float("nan"), x).frobenius)
