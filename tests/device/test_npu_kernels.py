"""NpuKernels against a stand-in for torch_npu that enforces the documented contracts and computes on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from fluid_npu import device
from fluid_npu.device.kernels.fused import AttentionCall
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.npu_kernels import NpuKernels
from fluid_npu.ops import reference
from fluid_npu.ops.attention import fused_attention, fuses_attention
from fluid_npu.ops.permute import PermuteLayout
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.ring_attention import RingCall, ring_attention, ring_block
from fluid_npu.ops.rotary import fused_rotary
from tests.support.fake_torch_npu import FakeTorchNpu, plain_attention


@pytest.fixture
def fake():
    return FakeTorchNpu()


@pytest.fixture
def kernels(fake):
    return NpuKernels(torch_npu=fake)


@pytest.fixture
def npu_is_the_cpu(kernels, monkeypatch):
    """Tensors of the CPU take the NPU's kernels."""
    monkeypatch.setitem(device._kernels, "cpu", kernels)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 4], [7, 0]], ids=str)
def test_grouped_mm_passes_running_totals_and_weight_views(kernels, fake, counts):
    x, weight = torch.randn(sum(counts), 8), torch.randn(len(counts), 12, 8)
    y = kernels.grouped_mm(x, weight, counts, trans_w=True)
    assert relative_error(y, reference.grouped_matmul(x, weight.transpose(1, 2), counts)) <= 1e-6
    ((_, call),) = fake.calls
    assert call["group_list"].tolist() == list(accumulate(counts))
    assert call["weight"][0].data_ptr() == weight.data_ptr()  # a view, not a copy


@pytest.mark.parametrize("counts", [[5], [0, 0, 0], [0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_group_or_no_rows_never_reach_the_grouped_operators(kernels, fake, counts, dtype):
    x, weight = torch.randn(sum(counts), 8).to(dtype), torch.randn(len(counts), 8, 12).to(dtype)
    dy, main_grad = torch.randn(sum(counts), 12).to(dtype), torch.zeros(len(counts), 8, 12)
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    assert (
        relative_error(kernels.grouped_mm(x, weight, counts), reference.grouped_matmul(x, weight, counts)) <= tolerance
    )
    kernels.grouped_dw_add_(main_grad, x, dy, counts)
    assert relative_error(main_grad, reference.grouped_dw(x, dy, counts)) <= tolerance
    assert fake.calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_dw_uses_the_adding_operator_with_running_totals(kernels, fake, dtype):
    counts = [4, 0, 1, 6]
    x, dy, main_grad = torch.randn(11, 8).to(dtype), torch.randn(11, 12).to(dtype), torch.zeros(4, 8, 12)
    for _ in range(2):
        kernels.grouped_dw_add_(main_grad, x, dy, counts)
    assert fake.names() == ["npu_grouped_matmul_add_"] * 2
    assert fake.calls[0][1]["group_list"].tolist() == [4, 4, 5, 11]
    assert relative_error(main_grad, 2 * reference.grouped_dw(x, dy, counts)) <= 1e-6


def test_fp32_dw_is_outside_the_adding_contract(kernels, fake):
    counts = [4, 0, 1, 6]
    x, dy, main_grad = torch.randn(11, 8), torch.randn(11, 12), torch.ones(4, 8, 12)
    kernels.grouped_dw_add_(main_grad, x, dy, counts)
    assert fake.names() == ["npu_grouped_matmul"] and fake.calls[0][1]["group_type"] == 2
    assert relative_error(main_grad, 1 + reference.grouped_dw(x, dy, counts)) <= 1e-6


def test_a_strided_main_grad_is_outside_the_adding_contract(kernels, fake):
    x, dy = torch.randn(5, 8).bfloat16(), torch.randn(5, 12).bfloat16()
    main_grad = torch.zeros(2, 12, 8).transpose(1, 2)
    kernels.grouped_dw_add_(main_grad, x, dy, [2, 3])
    assert fake.names() == ["npu_grouped_matmul"]
    assert relative_error(main_grad, reference.grouped_dw(x, dy, [2, 3])) <= 6e-3


def routing_map(tokens: int, experts: int, topk: int) -> torch.Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_permute_and_unpermute_use_the_fused_operators_when_topk_is_uniform(kernels, fake, topk):
    layout = PermuteLayout.from_routing_map(routing_map(9, 5, topk), topk)
    x = torch.randn(9, 8)
    rows = kernels.permute(x, layout)
    assert torch.equal(rows, x[layout.token_of_row])
    assert torch.allclose(kernels.unpermute(rows, layout), topk * x)
    expected = ["npu_moe_token_permute"] + ["npu_moe_token_unpermute"] * (topk > 1)
    assert fake.names() == expected
    # What the permute operator would return as sorted_indices is what the layout already holds.
    order = fake.npu_moe_token_permute(x, layout.experts_TK)[1]
    assert torch.equal(order.long(), layout.row_of_pair)


@pytest.mark.parametrize("kind", ["ragged", "capacity", "empty"])
def test_other_layouts_are_summed_row_by_row_without_the_fused_operators(kernels, fake, kind):
    mask = routing_map(9, 5, 2)
    if kind == "capacity":
        layout = PermuteLayout.from_capacity(mask, 3)
    else:
        mask[2] = False
        layout = PermuteLayout.from_routing_map(mask if kind == "ragged" else mask[:0])
    x = torch.randn(layout.num_tokens, 8)
    rows = kernels.permute(x, layout) * torch.rand(layout.num_rows, 1)
    wanted = torch.zeros_like(x).index_add_(0, layout.token_of_row, rows)
    assert torch.equal(kernels.unpermute(rows, layout), wanted)
    assert fake.calls == []


@pytest.mark.parametrize("tokens", [9, 0])
def test_a_known_bound_of_rows_gives_the_same_sums(kernels, fake, tokens):
    mask = routing_map(9, 5, 3)[:tokens]
    mask[2:4, :3] = False
    bounded = PermuteLayout.from_routing_map(mask, num_rows=int(mask.sum()), most_rows=3)
    rows = torch.randn(bounded.num_rows, 8)
    unbounded = kernels.unpermute(rows, PermuteLayout.from_routing_map(mask))
    assert torch.equal(kernels.unpermute(rows, bounded), unbounded)
    assert fake.calls == []


@pytest.mark.parametrize("rows", [0, 6])
def test_swiglu_is_scaled_by_the_probabilities_and_avoids_empty_tensors(kernels, fake, rows):
    h, p, da = torch.randn(rows, 16), torch.rand(rows), torch.randn(rows, 8)
    a, (dh, dp) = kernels.swiglu_probs(h, p), kernels.swiglu_probs_grad(da, h, p)
    h64, p64 = h.double().requires_grad_(), p.double().requires_grad_()
    a64 = reference.swiglu_probs(h64, p64)
    a64.backward(da.double())
    for got, wanted in ((a, a64.detach()), (dh, h64.grad), (dp, p64.grad)):
        assert relative_error(got, wanted) <= 1e-6
    assert fake.names() == ([] if rows == 0 else ["npu_swiglu", "npu_swiglu", "npu_swiglu_backward"])


@pytest.mark.parametrize("gamma_dtype, fused", [(torch.bfloat16, True), (torch.float32, True), (torch.float16, False)])
def test_rms_norm_is_fused_for_the_documented_dtype_pairs(kernels, fake, gamma_dtype, fused):
    x, gamma = torch.randn(4, 8).bfloat16(), torch.rand(8).to(gamma_dtype)
    y, rstd = kernels.rms_norm(x, gamma, 1e-5)
    dx, dgamma = kernels.rms_norm_grad(torch.ones_like(y), x, gamma, rstd)
    assert (y.dtype, rstd.dtype, dx.dtype, dgamma.dtype) == (x.dtype, torch.float32, x.dtype, gamma_dtype)
    assert fake.names() == (["npu_rms_norm", "npu_rms_norm_backward"] if fused else [])


def test_counts_of_the_device_are_summed_there_once(kernels, fake):
    counts = GroupRows([4, 0, 1, 6], on_device=torch.tensor([4, 0, 1, 6]))
    x, dy, weight = torch.randn(11, 8).bfloat16(), torch.randn(11, 12).bfloat16(), torch.randn(4, 8, 12).bfloat16()
    kernels.grouped_mm(x, weight, counts)
    kernels.grouped_dw(x, dy, counts)
    kernels.grouped_dw_add_(torch.zeros(4, 8, 12), x, dy, counts)
    lists = [call["group_list"] for _, call in fake.calls]
    assert len(lists) == 3 and all(given is lists[0] for given in lists)
    assert lists[0].tolist() == [4, 4, 5, 11] and lists[0].dtype == torch.int64


def attention_operands(heads: int = 4, shared: int = 2, queries: int = 5, keys: int = 5) -> list[torch.Tensor]:
    return [torch.randn(s, 2, n, 8, requires_grad=True) for s, n in ((queries, heads), (keys, shared), (keys, shared))]


@pytest.mark.parametrize("kind", ["causal", "mask", "none"])
def test_attention_passes_the_mask_that_each_mode_wants(npu_is_the_cpu, fake, kind):
    q, k, v = attention_operands()
    hidden = torch.rand(2, 1, 5, 5) < 0.3
    hidden[..., 0] = False  # every query sees a key
    call = AttentionCall(heads=4, scale=0.3, causal=kind == "causal", mask=hidden if kind == "mask" else None)
    out = fused_attention(q, k, v, call)
    out.square().sum().backward()
    got = [out, *(x.grad for x in (q, k, v))]
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    full = torch.ones(5, 5, dtype=torch.bool).triu(1) if kind == "causal" else call.mask
    heads_first = [x.permute(1, 2, 0, 3) for x in doubles]
    seen = None if full is None else ~full
    wanted = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=0.3, enable_gqa=True)
    wanted = wanted.permute(2, 0, 1, 3).flatten(2)
    wanted.square().sum().backward()
    for one, other in zip(got, [wanted, *(x.grad for x in doubles)], strict=True):
        assert relative_error(one.detach(), other.detach()) <= 1e-6
    assert fake.names() == ["npu_fusion_attention", "npu_fusion_attention_grad"]
    assert fake.calls[0][1].get("sparse_mode") == {"causal": 2, "mask": 1, "none": None}[kind]
    assert fake.calls[0][1].keys() == fake.calls[1][1].keys()


ATTENTION_RULES = {
    "fp16, bf16 or fp32": lambda q, k, v: (q.double(), k.double(), v.double(), {}),
    "one dtype": lambda q, k, v: (q, k, v.bfloat16(), {}),
    "wants tokens": lambda q, k, v: (q[:0], k, v, {}),
    "at most 256 heads": lambda q, k, v: (q[:, :, :3], k, v, {}),
    "head sizes to 768": lambda q, k, v: (q, k, torch.randn(5, 2, 2, 16), {}),
    "S = T": lambda q, k, v: (q[:3], k, v, dict(causal=True)),
    "a bool mask": lambda q, k, v: (q, k, v, dict(mask=torch.zeros(5, 5))),
}


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_attention_outside_the_contract_is_refused_by_rule(npu_is_the_cpu, fake, rule):
    q, k, v, options = ATTENTION_RULES[rule](*attention_operands())
    call = AttentionCall(heads=q.shape[2], scale=1.0, **options)
    chosen = fuses_attention(q, k, v, call)
    assert not chosen.value and rule in chosen.reason
    with pytest.raises(ValueError, match=f"fused_attention: .*{rule}"):
        fused_attention(q, k, v, call)
    assert fake.calls == []


def test_rotary_gives_megatron_s_embedding_and_keeps_no_input(npu_is_the_cpu, fake):
    x, angle = torch.randn(5, 2, 3, 8, requires_grad=True), torch.randn(5, 1, 1, 8)
    y = fused_rotary(x, angle.cos(), angle.sin())
    dy = torch.randn_like(y)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    a, b = x64.chunk(2, -1)
    y64 = x64 * angle.double().cos() + torch.cat((-b, a), -1) * angle.double().sin()
    y64.backward(dy.double())
    assert relative_error(y.detach(), y64.detach()) <= 1e-6 and relative_error(x.grad, x64.grad) <= 1e-6
    assert fake.names() == ["npu_rotary_mul", "npu_rotary_mul_backward"]
    assert torch.equal(fake.calls[1][1]["x"], dy)  # the gradient of x needs no x


ROTARY_RULES = {
    "fp16, bf16 or fp32": (torch.double, (5, 2, 3, 8), (5, 1, 1, 8), False),
    "in 4-D": (torch.float, (5, 3, 8), (5, 1, 8), False),
    "to broadcast": (torch.float, (5, 2, 3, 8), (4, 1, 1, 8), False),
    "an even size": (torch.float, (5, 2, 3, 7), (5, 1, 1, 7), False),
    "batch and heads below 1000": (torch.float, (1, 1, 1000, 2), (1, 1, 1, 2), False),
    "B \\* N below 1000": (torch.float, (1, 40, 40, 2), (1, 1, 1, 2), True),
}


@pytest.mark.parametrize("rule", ROTARY_RULES)
def test_rotary_outside_the_contract_is_refused_by_rule(npu_is_the_cpu, fake, rule):
    dtype, shape, of_cos, interleaved = ROTARY_RULES[rule]
    x, cos = torch.zeros(shape, dtype=dtype), torch.zeros(of_cos, dtype=dtype)
    with pytest.raises(ValueError, match=f"fused_rotary: .*{rule}"):
        fused_rotary(x, cos, cos, interleaved)
    assert fake.calls == []


def test_a_ring_s_blocks_pass_the_log_sum_exp_of_all_keys_as_largest_score_with_a_sum_of_one(npu_is_the_cpu, fake):
    heads, shared, keys = 4, 2, 6
    q, k, v = (torch.randn(6, 2, n, 8) for n in (heads, shared, shared))
    more = [torch.randn(keys, 2, shared, 8) for _ in range(2)]
    call = RingCall(scale=0.3, ranks=2, rank=1, pass_on=lambda rows, back: lambda: travelling(rows), right=0)

    def travelling(rows):
        """What the other rank sends: its keys and values; of what was for home, nothing more."""
        return torch.cat([x.flatten(2) for x in more], -1) if rows.dtype == q.dtype and len(fake.calls) != 4 else rows

    block = ring_block(q, k, v, call)
    assert block.value is not None and block.reason == "npu_fusion_attention takes it"
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*leaves, replace(call, block=block.value))
    out.square().sum().backward()
    # The second rank of two sees its own keys by causality, and the first half of the other's.
    hidden = torch.cat([torch.ones(6, 6, dtype=torch.bool).triu(1), torch.zeros(6, 3, dtype=torch.bool)], 1)
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    whole = [doubles[0], *(torch.cat([x, y[:3].double()]) for x, y in zip(doubles[1:], more, strict=True))]
    wanted = plain_attention(*(x.flatten(2) for x in whole), heads, 0.3, {"atten_mask": hidden, "sparse_mode": 1})
    wanted.square().sum().backward()
    assert relative_error(out.detach(), wanted.detach()) <= 1e-6
    assert relative_error(leaves[0].grad, doubles[0].grad) <= 1e-6
    assert fake.names() == ["npu_fusion_attention"] * 2 + ["npu_fusion_attention_grad"] * 2
    assert [options.get("sparse_mode") for _, options in fake.calls] == [2, None, 2, None]
