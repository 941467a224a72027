"""What the documentation forbids is refused, with the operator's name, the rule and where it is written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.sim.npu import clibrary


def npu(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype).npu()


def groups(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).npu()


def gmm(x=None, weight=None, group_list=None, **changes: Any) -> Callable[[Any], Any]:
    """A call of npu_grouped_matmul that is right but for the changes."""
    x = npu(6, 4) if x is None else x
    weight = npu(2, 4, 3, dtype=x.dtype) if weight is None else weight
    group_list = groups(2, 6) if group_list is None else group_list
    options = {"split_item": 3, "group_type": 0, "group_list_type": 0, **changes}
    return lambda module: module.npu_grouped_matmul([x], [weight], group_list=group_list, **options)


def gmm_add(total=None, x=None, weight=None, group_list=None, **changes: Any) -> Callable[[Any], Any]:
    total = npu(2, 4, 3, dtype=torch.float32) if total is None else total
    x = npu(6, 4) if x is None else x
    weight = npu(6, 3) if weight is None else weight
    group_list = groups(2, 6) if group_list is None else group_list
    return lambda module: module.npu_grouped_matmul_add_(total, x, weight, group_list, **changes)


def attention(q=None, k=None, v=None, heads: int = 2, layout: str = "BNSD", **changes: Any) -> Callable[[Any], Any]:
    q = npu(1, 2, 4, 8) if q is None else q
    k = npu(1, 2, 4, 8, dtype=torch.float16) if k is None else k
    return lambda module: module.npu_fusion_attention(q, k, k if v is None else v, heads, layout, **changes)


def dropped_attention_grad(numbers: int) -> Callable[[Any], Any]:
    """The gradient of attention with dropout, told to make a mask of so many numbers; it has 512."""

    def call(module: Any) -> Any:
        q = npu(1, 2, 16, 8)
        out, largest, total, _, seed, offset, _ = module.npu_fusion_attention(q, q, q, 2, "BNSD", keep_prob=0.5)
        rows = {"softmax_max": largest, "softmax_sum": total, "attention_in": out}
        mask = {"keep_prob": 0.5, "seed": seed, "offset": offset, "numels": numbers}
        return module.npu_fusion_attention_grad(q, q, q, out, 2, "BNSD", **rows, **mask)

    return call


def unpermute(indices, probs=None) -> Callable[[Any], Any]:
    return lambda module: module.npu_moe_token_unpermute(npu(8, 4), indices, probs)


def gmm_lists(x: list[Any], weight: list[Any], **options: Any) -> Callable[[Any], Any]:
    return lambda module: module.npu_grouped_matmul(x, weight, split_item=3, group_type=0, **options)


def rotary(x: tuple[int, ...], cos: tuple[int, ...], dtype: torch.dtype = torch.float16, mode: str = "half") -> Any:
    given = [npu(*shape, dtype=dtype) for shape in (x, cos, cos)]
    return lambda module: module.npu_rotary_mul(*given, rotary_mode=mode)


def rotary_gradient_of_cos(module: Any) -> None:
    cos = npu(1, 1, 1, 8).requires_grad_()
    module.npu_rotary_mul(npu(33, 32, 1, 8), cos, npu(1, 1, 1, 8)).sum().backward()


F32, F64, BF16, I32 = torch.float32, torch.float64, torch.bfloat16, torch.int32

CASES: dict[str, tuple[Callable[[], Callable[[Any], Any]], str, str]] = {
    # name: (the wrong call, the operator that refuses, the rule)
    "gmm dtypes differ": (lambda: gmm(weight=npu(2, 4, 3, dtype=torch.bfloat16)), "GroupedMatmulV5", "have one dtype"),
    "gmm of integers": (
        lambda: gmm(x=npu(6, 4, dtype=torch.int8)),
        "GroupedMatmulV5",
        "is fp32, fp16 or bf16 (quantised",
    ),
    "gmm list on int32": (
        lambda: gmm(group_list=groups(2, 6, dtype=torch.int32)),
        "GroupedMatmulV5",
        "1-D int64 tensor",
    ),
    "gmm one group": (
        lambda: gmm(weight=npu(1, 4, 3), group_list=groups(6)),
        "GroupedMatmulV5",
        "length of group_list is not 1",
    ),
    "gmm groups and weights differ": (
        lambda: gmm(group_list=groups(2, 4, 6)),
        "GroupedMatmulV5",
        "a weight for each group",
    ),
    "gmm too many groups": (
        lambda: gmm(weight=npu(1025, 4, 3), group_list=groups(*[0] * 1024, 6)),
        "GroupedMatmulV5",
        "at most 1024 groups",
    ),
    "gmm list type 2": (lambda: gmm(group_list_type=2), "GroupedMatmulV5", "group_list_type is 0 or 1"),
    "gmm wide x": (
        lambda: gmm(x=npu(2, 65536), weight=npu(2, 65536, 1), group_list=groups(1, 2)),
        "GroupedMatmulV5",
        "below 65536",
    ),
    "gmm totals decrease": (lambda: gmm(group_list=groups(7, 6)), "GroupedMatmulV5", "does not decrease"),
    "gmm totals end early": (lambda: gmm(group_list=groups(2, 5)), "GroupedMatmulV5", "ends at the number of rows"),
    "gmm counts sum wrongly": (
        lambda: gmm(group_list=groups(2, 5), group_list_type=1),
        "GroupedMatmulV5",
        "sums to the rows",
    ),
    "gmm counts negative": (
        lambda: gmm(group_list=groups(-1, 7), group_list_type=1),
        "GroupedMatmulV5",
        "is not negative",
    ),
    "gmm counts read as totals": (lambda: gmm(group_list=groups(4, 2)), "GroupedMatmulV5", "does not decrease"),
    "gmm list does not increase": (
        lambda: (
            lambda module: module.npu_grouped_matmul([npu(6, 4)], [npu(4, 3)] * 3, group_list=[2, 2, 6], split_item=3)
        ),
        "GroupedMatmul",
        "increases strictly",
    ),
    "gmm_add in fp32": (
        lambda: gmm_add(x=npu(6, 4, dtype=torch.float32), weight=npu(6, 3, dtype=torch.float32)),
        "GroupedMatmulAdd",
        "both fp16 or both bf16",
    ),
    "gmm_add into bf16": (
        lambda: gmm_add(total=npu(2, 4, 3, dtype=torch.bfloat16)),
        "GroupedMatmulAdd",
        "self is fp32",
    ),
    "gmm_add without rows": (lambda: gmm_add(x=npu(0, 4), weight=npu(0, 3)), "GroupedMatmulAdd", "no tensor is empty"),
    "gmm_add untransposed": (lambda: gmm_add(transpose_x=False), "GroupedMatmulAdd", "the only ones allowed"),
    "gmm_add with counts": (
        lambda: gmm_add(group_list=groups(4, 2), group_list_type=1),
        "GroupedMatmulAdd",
        "does not decrease",
    ),
    "gmm wide weight": (lambda: gmm(weight=npu(2, 4, 65536)), "GroupedMatmulV5", "below 65536"),
    "gmm inner sizes": (
        lambda: gmm(weight=npu(2, 5, 3)),
        "GroupedMatmulV5",
        "the last dimension of x is weight's next to last",
    ),
    "gmm fp32 lists": (
        lambda: gmm_lists([npu(6, 4, dtype=F32)], [npu(4, 3, dtype=F32)] * 2, group_list=groups(2, 6)),
        "GroupedMatmulV5",
        "fp32 wants a single x and weight",
    ),
    "gmm 129 weights": (
        lambda: gmm_lists([npu(6, 4)], [npu(4, 3)] * 129, group_list=groups(*[0] * 128, 6)),
        "GroupedMatmulV5",
        "lists of at most 128",
    ),
    "gmm bias": (
        lambda: gmm(x=npu(6, 4, dtype=BF16), bias=[npu(2, 3, dtype=BF16)]),
        "GroupedMatmulV5",
        "fp32 for bf16",
    ),
    "gmm without groups": (
        lambda: lambda module: module.npu_grouped_matmul([npu(6, 4)], [npu(4, 3)] * 2, split_item=3, group_type=-1),
        "GroupedMatmulV5",
        "a weight for each x",
    ),
    "gmm list of one": (
        lambda: lambda module: module.npu_grouped_matmul([npu(6, 4)], [npu(4, 3)], group_list=[6], split_item=3),
        "GroupedMatmul",
        "length of group_list is not 1",
    ),
    "gmm_add dtypes differ": (
        lambda: gmm_add(weight=npu(6, 3, dtype=BF16)),
        "GroupedMatmulAdd",
        "both fp16 or both bf16",
    ),
    "gmm_add of rows that differ": (lambda: gmm_add(weight=npu(5, 3)), "GroupedMatmulAdd", "x is [M, K]"),
    "gmm_add list on int32": (
        lambda: gmm_add(group_list=groups(2, 6, dtype=torch.int32)),
        "GroupedMatmulAdd",
        "1-D int64 tensor",
    ),
    "gmm_add other sizes": (
        lambda: gmm_add(total=npu(2, 4, 4, dtype=F32)),
        "GroupedMatmulAdd",
        "E * K * N elements",
    ),
    "gmm_add strided": (
        lambda: gmm_add(total=npu(2, 3, 4, dtype=F32).transpose(1, 2)),
        "GroupedMatmulAdd",
        "self is contiguous",
    ),
    "gmm_add totals end early": (
        lambda: gmm_add(group_list=groups(2, 5)),
        "GroupedMatmulAdd",
        "ends at the number of rows",
    ),
    "swiglu of doubles": (
        lambda: lambda module: module.npu_swiglu(npu(2, 8, dtype=F64)),
        "SwiGlu",
        "the input is fp32",
    ),
    "swiglu in 9-D": (
        lambda: lambda module: module.npu_swiglu(npu(*[1] * 8, 2)),
        "SwiGlu",
        "1 to 8 dimensions",
    ),
    "swiglu gradient's dtype": (
        lambda: lambda module: module.npu_swiglu_backward(npu(2, 4, dtype=F32), npu(2, 8)),
        "SwiGluGrad",
        "the gradient has the input's dtype",
    ),
    "swiglu gradient strided": (
        lambda: lambda module: module.npu_swiglu_backward(npu(4, 2).t(), npu(2, 8)),
        "SwiGluGrad",
        "the gradient is contiguous",
    ),
    "swiglu of nothing": (lambda: lambda module: module.npu_swiglu(npu(0, 8)), "SwiGlu", "not empty"),
    "swiglu strided": (lambda: lambda module: module.npu_swiglu(npu(8, 6).t()), "SwiGlu", "is contiguous"),
    "swiglu odd": (lambda: lambda module: module.npu_swiglu(npu(2, 7)), "SwiGlu", "is even"),
    "rms_norm of a vector": (
        lambda: lambda module: module.npu_rms_norm(npu(8), npu(8)),
        "RmsNorm",
        "2 to 8 dimensions",
    ),
    "rms_norm dtypes": (
        lambda: lambda module: module.npu_rms_norm(npu(2, 8), npu(8, dtype=torch.bfloat16)),
        "RmsNorm",
        "gamma has the input's dtype or fp32",
    ),
    "rms_norm of doubles": (
        lambda: lambda module: module.npu_rms_norm(npu(2, 8, dtype=F64), npu(8, dtype=F64)),
        "RmsNorm",
        "the input is fp32",
    ),
    "rms_norm sizes": (
        lambda: lambda module: module.npu_rms_norm(npu(2, 8), npu(7)),
        "RmsNorm",
        "the input's trailing sizes",
    ),
    "rms_norm gradient's rstd": (
        lambda: lambda module: module.npu_rms_norm_backward(npu(2, 8), npu(2, 8), npu(8), npu(2, 1)),
        "RmsNormGrad",
        "rstd is fp32",
    ),
    "permute doubles": (
        lambda: lambda module: module.npu_moe_token_permute(npu(2, 4, dtype=F64), groups(0, 1)),
        "MoeTokenPermute",
        "tokens are [T, H] in fp32",
    ),
    "permute by floats": (
        lambda: lambda module: module.npu_moe_token_permute(npu(2, 4), npu(2, 2)),
        "MoeTokenPermute",
        "indices are int32 or int64",
    ),
    "permute other tokens": (
        lambda: lambda module: module.npu_moe_token_permute(npu(2, 4), groups(0, 1, 2)),
        "MoeTokenPermute",
        "indices are [T] or [T, K]",
    ),
    "permute 2^24 pairs": (
        lambda: (
            lambda module: module.npu_moe_token_permute(npu(32768, 1), torch.zeros(32768, 512, dtype=torch.int32).npu())
        ),
        "MoeTokenPermute",
        "fewer than 16777215 indices",
    ),
    "permute gradient with int64": (
        lambda: lambda module: module.npu_moe_token_permute_grad_v2(npu(2, 4), groups(0, 1), 2, torch.float16, 1),
        "MoeTokenPermuteGrad",
        "sorted_indices are int32",
    ),
    "unpermute doubles": (
        lambda: lambda module: module.npu_moe_token_unpermute(npu(2, 4, dtype=F64), groups(0, 1, dtype=I32)),
        "MoeTokenUnpermute",
        "permuted tokens are fp32",
    ),
    "unpermute integer probs": (
        lambda: unpermute(groups(*range(8), dtype=I32), npu(4, 2, dtype=I32)),
        "MoeTokenUnpermute",
        "probs are fp32",
    ),
    "unpermute top 513": (
        lambda: lambda module: module.npu_moe_token_unpermute(npu(513, 4), groups(*range(513), dtype=I32), npu(1, 513)),
        "MoeTokenUnpermute",
        "K is at most 512",
    ),
    "unpermute gradient without rows": (
        lambda: (
            lambda module: module.npu_moe_token_unpermute_grad_v2(
                npu(1, 4), groups(0, 1, dtype=I32), 2, torch.float16, probs=npu(1, 2)
            )
        ),
        "MoeTokenUnpermuteGrad",
        "with probs the permuted tokens are given",
    ),
    "permute top 513": (
        lambda: lambda module: module.npu_moe_token_permute(npu(2, 4), torch.zeros(2, 513).int().npu()),
        "MoeTokenPermute",
        "K is at most 512",
    ),
    "permute padded": (
        lambda: lambda module: module.npu_moe_token_permute(npu(2, 4), torch.zeros(2, 2).int().npu(), padded_mode=True),
        "MoeTokenPermute",
        "padded_mode is not supported",
    ),
    "unpermute with int64": (lambda: unpermute(groups(*range(8))), "MoeTokenUnpermute", "sorted_indices are int32"),
    "unpermute probs": (
        lambda: unpermute(groups(*range(8), dtype=torch.int32), npu(3, 2)),
        "MoeTokenUnpermute",
        "probs are [T, K]",
    ),
    "rotary odd": (
        lambda: lambda module: module.npu_rotary_mul(npu(1, 1, 2, 7), npu(1, 1, 2, 7), npu(1, 1, 2, 7)),
        "RotaryPositionEmbedding",
        "D is even and below 896",
    ),
    "rotary shapes": (
        lambda: lambda module: module.npu_rotary_mul(npu(1, 2, 4, 8), npu(1, 1, 3, 8), npu(1, 1, 3, 8)),
        "RotaryPositionEmbedding",
        "each of x's size or 1",
    ),
    "rotary many heads": (
        lambda: lambda module: module.npu_rotary_mul(npu(1, 1000, 1, 8), npu(1, 1, 1, 8), npu(1, 1, 1, 8)),
        "RotaryPositionEmbedding",
        "B and N are below 1000",
    ),
    "rotary of doubles": (lambda: rotary((1, 1, 2, 8), (1, 1, 2, 8), F64), "RotaryPositionEmbedding", "x is fp32"),
    "rotary in 5-D": (
        lambda: rotary((1, 1, 1, 2, 8), (1, 1, 1, 2, 8)),
        "RotaryPositionEmbedding",
        "x is [B, N, S, D]",
    ),
    "rotary wide": (lambda: rotary((1, 1, 2, 896), (1, 1, 2, 896)), "RotaryPositionEmbedding", "below 896"),
    "rotary cos and sin": (
        lambda: lambda module: module.npu_rotary_mul(npu(1, 1, 2, 8), npu(1, 1, 2, 8), npu(1, 1, 1, 8)),
        "RotaryPositionEmbedding",
        "cos and sin have one shape",
    ),
    "rotary interleaved heads": (
        lambda: rotary((40, 40, 1, 8), (1, 1, 1, 8), mode="interleave"),
        "RotaryPositionEmbedding",
        "interleave wants B * N below 1000",
    ),
    "rotary gradient of cos": (
        lambda: rotary_gradient_of_cos,
        "RotaryPositionEmbeddingGrad",
        "B * N is at most 1024",
    ),
    "attention of doubles": (
        lambda: attention(*[npu(1, 2, 4, 8, dtype=F64) for _ in range(3)]),
        "FlashAttentionScore",
        "query is fp32",
    ),
    "attention 257 heads": (
        lambda: attention(*[npu(1, 257, 1, 8) for _ in range(3)], heads=257),
        "FlashAttentionScore",
        "at most 256",
    ),
    "attention head sizes differ": (
        lambda: attention(k=npu(1, 2, 4, 16)),
        "FlashAttentionScore",
        "one head size",
    ),
    "attention wide heads": (
        lambda: attention(*[npu(1, 2, 4, 769) for _ in range(3)]),
        "FlashAttentionScore",
        "at most 768",
    ),
    "attention wide values": (
        lambda: attention(v=npu(1, 2, 4, 16)),
        "FlashAttentionScore",
        "the value's no larger",
    ),
    "attention long": (
        lambda: attention(q=npu(1, 2, (1 << 20) + 1, 8)),
        "FlashAttentionScore",
        "S is at most 1M",
    ),
    "attention dtypes": (
        lambda: attention(k=npu(1, 2, 4, 8, dtype=torch.bfloat16)),
        "FlashAttentionScore",
        "have one dtype",
    ),
    "attention heads": (
        lambda: attention(q=npu(1, 3, 4, 8), heads=3),
        "FlashAttentionScore",
        "a multiple of key heads",
    ),
    "attention mask shape": (
        lambda: attention(atten_mask=npu(3, 4, dtype=torch.bool)),
        "FlashAttentionScore",
        "atten_mask is [B, N, S, T]",
    ),
    "attention mask dtype": (lambda: attention(atten_mask=npu(4, 4)), "FlashAttentionScore", "bool or uint8"),
    "attention causal mask not compressed": (
        lambda: attention(atten_mask=torch.ones(4, 4, dtype=torch.bool).triu(1).npu(), sparse_mode=2),
        "FlashAttentionScore",
        "want the compressed mask [2048, 2048]",
    ),
    "attention mask inverted": (
        lambda: attention(atten_mask=torch.ones(2048, 2048, dtype=torch.bool).tril().npu(), sparse_mode=2),
        "FlashAttentionScore",
        "1 above the diagonal",
    ),
    "attention dropout mask": (
        lambda: dropped_attention_grad(128),
        "FlashAttentionScoreGrad",
        "a bit for each of [B, N, S, T]",
    ),
}

#: Rules of the simulator that torch_npu itself checks first, so that no call through it can reach them.
CHECKED_BEFORE: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "group_type is -1, 0 or 2": lambda: gmm(group_type=1),
    "group_list is on the NPU": lambda: gmm(group_list=torch.tensor([2, 6])),
    "group_list of the adding operator is on the NPU": lambda: gmm_add(group_list=torch.tensor([2, 6])),
    "keep_prob is above 0 and at most 1": lambda: attention(keep_prob=1.5),
    "rotary_mode is half or interleave": lambda: rotary((1, 1, 2, 8), (1, 1, 2, 8), mode="quarter"),
    "dim is one of the input's": lambda: lambda module: module.npu_swiglu(npu(2, 8), dim=2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_forbidden_is_refused(torch_npu, name):
    make, operator, rule = CASES[name]
    call = make()
    with pytest.raises(RuntimeError) as caught:
        call(torch_npu)
        torch.npu.synchronize()
    text = str(caught.value)
    assert f"aclnn{operator} refuses: " in text and rule in text and "docs" in text


@pytest.mark.parametrize("rule", CHECKED_BEFORE)
def test_what_torch_npu_checks_itself_does_not_reach_the_operator(torch_npu, rule):
    call = CHECKED_BEFORE[rule]()
    with pytest.raises((RuntimeError, IndexError)) as caught:
        call(torch_npu)
    assert "aclnn" not in str(caught.value)
    torch.npu.synchronize()


def test_memory_of_the_host_is_refused_where_torch_npu_does_not_look(torch_npu):
    on_host, out = torch.ones(2, 8), torch.empty(2, 4, device="npu")
    assert clibrary.run("SwiGlu", clibrary.handle(on_host), ctypes.c_int64(-1), clibrary.handle(out)) != 0


def test_the_device_works_on_after_a_refusal(torch_npu):
    assert torch.equal((npu(3) + npu(3)).cpu(), torch.full((3,), 2.0).half())
    torch.npu.synchronize()
