"""Which operators our kernels take on an NPU, by the operator log, with the values of each branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch

from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.mcore.norm import FusedRMSNorm
from fluid_npu.ops import reference
from fluid_npu.ops.attention import fused_attention
from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, expert_mlp
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.rotary import fused_rotary

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def aclnn(ran: Counter[tuple[str, str]]) -> Counter[str]:
    """The NPU operators in a log, without 'aclnn'; nothing was refused, missing or computed on the host."""
    assert not [name for kind, name in ran if kind in ("fallback", "missing", "refused")]
    return Counter({name.removeprefix("aclnn"): count for (kind, name), count in ran.items() if kind == "aclnn"})


def experts(counts: list[int], dtype: torch.dtype) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Inputs of two experts' layers on the NPU with main_grad, and a check of their gradients against float64."""
    width, ffn = 16, 8
    x, p = torch.randn(sum(counts), width).to(dtype), torch.rand(sum(counts))
    w1, w2 = (torch.randn(len(counts), *size).to(dtype) for size in ((width, 2 * ffn), (ffn, width)))
    dy = torch.randn(sum(counts), width).to(dtype)
    leaves = [tensor.npu().requires_grad_() for tensor in (x, p, w1, w2)]
    for weight in leaves[2:]:
        weight.main_grad = torch.ones(weight.shape, device="npu")
    rows = GroupRows(counts, on_device=torch.tensor(counts).npu())
    mlp = ExpertMLP(
        counts=rows,
        activation=None,
        fc1=WeightGradTarget(fuse_into=leaves[2]),
        fc2=WeightGradTarget(fuse_into=leaves[3]),
    )
    expert_mlp(*leaves, mlp).backward(dy.npu())

    def check() -> None:
        x64, p64, w1_64, w2_64 = (tensor.double().requires_grad_() for tensor in (x, p, w1, w2))
        h = reference.grouped_matmul(x64, w1_64, counts)
        reference.grouped_matmul(reference.swiglu_probs(h, p64), w2_64, counts).backward(dy.double())
        for got, wanted in ((leaves[0].grad, x64.grad), (leaves[1].grad, p64.grad)):
            assert relative_error(got.cpu(), wanted) <= 2 * TOLERANCE[dtype]
        for weight, wanted in ((leaves[2], w1_64.grad), (leaves[3], w2_64.grad)):
            assert relative_error(weight.main_grad.cpu() - 1, wanted) <= 2 * TOLERANCE[dtype]

    return leaves, check


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adds_dw_in_the_operator(operator_log, dtype):
    with operator_log() as ran:
        _, check = experts([3, 0, 5, 2], dtype)
    assert aclnn(ran) == {"GroupedMatmulV5": 4, "GroupedMatmulAdd": 2, "SwiGlu": 2, "SwiGluGrad": 1}
    check()


def test_fp32_adds_what_the_grouped_matmul_returns(operator_log):
    with operator_log() as ran:
        _, check = experts([3, 0, 5, 2], torch.float32)
    assert aclnn(ran) == {"GroupedMatmulV5": 6, "SwiGlu": 2, "SwiGluGrad": 1}
    check()


def test_a_single_local_expert_takes_plain_matmuls(operator_log):
    with operator_log() as ran:
        _, check = experts([7], torch.bfloat16)
    assert aclnn(ran) == {"SwiGlu": 2, "SwiGluGrad": 1}
    check()


def test_without_rows_no_operator_runs_and_main_grad_stays(operator_log):
    with operator_log() as ran:
        leaves, _ = experts([0, 0], torch.bfloat16)
    assert aclnn(ran) == {}
    assert all(torch.equal(weight.main_grad.cpu(), torch.ones(weight.shape)) for weight in leaves[2:])


def test_counts_of_the_device_cost_no_copy_from_the_host(operator_log):
    """A copy from the host waits for the device; one layer's four grouped matmuls share one running total."""
    on_device = torch.tensor([3, 0, 5, 2]).npu()
    with operator_log() as ran:
        rows = GroupRows([3, 0, 5, 2], on_device=on_device)
        ends = [rows.ends(on_device.device, torch.int64) for _ in range(4)]
    assert all(total is ends[0] for total in ends) and ends[0].tolist() == list(accumulate([3, 0, 5, 2]))
    names = [name for kind, name in ran if kind.startswith("aten")]
    assert any("cumsum" in name for name in names) and not any("copy" in name for name in names)


@DTYPES
def test_the_norm_of_the_layer_spec(operator_log, dtype):
    norm = FusedRMSNorm(16, eps=1e-5).to(device="npu", dtype=dtype)
    x = torch.randn(3, 2, 16).to(dtype)
    given, x64 = x.npu().requires_grad_(), x.double().requires_grad_()
    with operator_log() as ran:
        y = norm(given)
        y.backward(torch.ones_like(y))
    assert aclnn(ran) == {"RmsNorm": 1, "RmsNormGrad": 1}
    y64 = reference.rms_norm(x64, torch.ones(16, dtype=torch.float64), 1e-5)
    y64.sum().backward()
    assert relative_error(y.detach().cpu(), y64.detach()) <= TOLERANCE[dtype]
    assert relative_error(given.grad.cpu(), x64.grad) <= 2 * TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("kind", ["causal", "mask", "none"])
@pytest.mark.parametrize("value_width", [8, 4])
def test_the_core_attention(operator_log, dtype, kind, value_width):
    sizes = ((4, 8), (2, 8), (2, value_width))
    plain = [torch.randn(6, 2, heads, width).to(dtype) for heads, width in sizes]
    given = [x.npu().requires_grad_() for x in plain]
    wide = [x.double().requires_grad_() for x in plain]
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) if kind == "causal" else torch.rand(2, 1, 6, 6) < 0.3
    hidden[..., 0] = False
    hidden = None if kind == "none" else hidden
    call = AttentionCall(heads=4, scale=0.3, causal=kind == "causal", mask=hidden.npu() if kind == "mask" else None)
    dy = torch.randn(6, 2, 4 * value_width).to(dtype)
    with operator_log() as ran:
        out = fused_attention(*given, call)
        out.backward(dy.npu())
    assert aclnn(ran) == {"FlashAttentionScore": 1, "FlashAttentionScoreGrad": 1}
    out64 = attention_in_float64(*wide, 0.3, hidden)
    out64.backward(dy.double())
    assert relative_error(out.detach().cpu(), out64.detach()) <= TOLERANCE[dtype]
    for x, x64 in zip(given, wide, strict=True):
        assert relative_error(x.grad.cpu(), x64.grad) <= 2 * TOLERANCE[dtype]


def attention_in_float64(q: Any, k: Any, v: Any, scale: float, hidden: Any) -> torch.Tensor:
    """[S, B, N * V], one head after the other."""
    heads, group = [], q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        scores = scale * torch.einsum("sbd,tbd->bst", q[:, :, head], k[:, :, head // group])
        if hidden is not None:
            scores = scores.masked_fill(hidden.view(-1, *scores.shape[1:]), -torch.inf)
        heads.append(torch.einsum("bst,tbv->sbv", scores.softmax(-1), v[:, :, head // group]))
    return torch.cat(heads, -1)


@DTYPES
def test_the_rotary_embedding(operator_log, dtype):
    x, angle = torch.randn(5, 2, 3, 8).to(dtype), torch.randn(5, 1, 1, 8)
    given, x64 = x.npu().requires_grad_(), x.double().requires_grad_()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    with operator_log() as ran:
        y = fused_rotary(given, cos.npu(), sin.npu())
        y.backward(torch.ones_like(y))
    assert aclnn(ran) == {"RotaryPositionEmbedding": 1, "RotaryPositionEmbeddingGrad": 1}
    a, b = x64.chunk(2, -1)
    y64 = x64 * cos.double() + torch.cat((-b, a), -1) * sin.double()
    y64.sum().backward()
    assert relative_error(y.detach().cpu(), y64.detach()) <= TOLERANCE[dtype]
    assert relative_error(given.grad.cpu(), x64.grad) <= TOLERANCE[dtype]
