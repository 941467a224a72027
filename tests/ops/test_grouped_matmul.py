"""npu_gmm and npu_gmm_v2 against a float64 loop, and the contract's errors."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_npu.device.kernels import torch_kernels
from fluid_npu.ops import reference
from fluid_npu.ops.grouped_matmul import npu_gmm, npu_gmm_v2
from fluid_npu.ops.reference import relative_error
from tests.support.device import here, wide

SPLITS = [[3, 5, 2, 6], [0, 7, 0, 1], [5, 0, 0, 0], [0, 0, 4], [0, 0, 0], [9], [0], [1, 1]]
TOLERANCE = 1e-6


def operands(counts: list[int], inner: int = 8, outer: int = 12, dtype: torch.dtype = torch.float32):
    torch.manual_seed(sum(counts) + 31 * len(counts))
    x = here(torch.randn(sum(counts), inner).to(dtype)).requires_grad_()
    weight = here(torch.randn(len(counts), inner, outer).to(dtype)).requires_grad_()
    return x, weight, here(torch.randn(sum(counts), outer).to(dtype))


def ends(counts: list[int]) -> list[int]:
    return list(accumulate(counts))


def reference_gradients(x, weight, dy, counts):
    x64, w64 = wide(x).requires_grad_(), wide(weight).requires_grad_()
    y64 = reference.grouped_matmul(x64, w64, counts)
    y64.backward(wide(dy))
    return y64.detach(), x64.grad, w64.grad


@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("form", ["list", "tensor", "v2"])
def test_value_and_gradients_equal_the_float64_loop(counts, form):
    x, weight, dy = operands(counts)
    if form == "list":
        y = npu_gmm(x, weight, group_list=ends(counts))
    elif form == "tensor":
        y = npu_gmm(x, weight, group_list=here(torch.tensor(ends(counts))))
    else:
        y = npu_gmm_v2(x, weight, group_list=here(torch.tensor(counts)))
    y.backward(dy)
    y64, dx64, dw64 = reference_gradients(x, weight, dy, counts)
    assert relative_error(y.detach(), y64) <= TOLERANCE
    assert relative_error(x.grad, dx64) <= TOLERANCE
    assert relative_error(weight.grad, dw64) <= TOLERANCE


@pytest.mark.parametrize("counts", SPLITS, ids=str)
def test_older_torch_without_grouped_mm_gives_the_same(counts, monkeypatch):
    x, weight, dy = operands(counts)
    monkeypatch.setattr(torch_kernels, "_native_grouped_mm", None)
    y = npu_gmm(x, weight, group_list=ends(counts))
    y.backward(dy)
    y64, dx64, dw64 = reference_gradients(x, weight, dy, counts)
    assert relative_error(y.detach(), y64) <= TOLERANCE
    assert relative_error(x.grad, dx64) <= TOLERANCE
    assert relative_error(weight.grad, dw64) <= TOLERANCE


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    inner=st.sampled_from([1, 3, 4, 16]),
    outer=st.sampled_from([1, 2, 5, 8]),
    transposed=st.booleans(),
)
def test_any_split_and_width(counts, inner, outer, transposed):
    x, weight, dy = operands(counts, inner, outer)
    stored = weight.detach().transpose(1, 2).contiguous() if transposed else weight.detach().clone()
    stored.requires_grad_()
    view = stored.transpose(1, 2) if transposed else stored
    npu_gmm(x, view, group_list=ends(counts)).backward(dy)
    _, dx64, dw64 = reference_gradients(x, weight, dy, counts)
    assert relative_error(x.grad, dx64) <= TOLERANCE
    assert relative_error(stored.grad.transpose(1, 2) if transposed else stored.grad, dw64) <= TOLERANCE


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)], ids=str)
def test_half_precision_keeps_its_dtype_and_is_close(dtype, tolerance):
    counts = [3, 0, 5]
    x, weight, dy = operands(counts, 16, 8, dtype)
    y = npu_gmm(x, weight, group_list=ends(counts))
    y.backward(dy)
    y64, dx64, dw64 = reference_gradients(x, weight, dy, counts)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype
    for got, wanted in ((y.detach(), y64), (x.grad, dx64), (weight.grad, dw64)):
        assert relative_error(got, wanted) <= tolerance


@pytest.mark.parametrize(
    "dtype, bias_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
def test_bias_is_added_to_the_rows_of_its_group(dtype, bias_dtype):
    counts = [2, 0, 3]
    x, weight, _ = operands(counts, dtype=dtype)
    bias = here(torch.randn(3, 12).to(bias_dtype))
    y = npu_gmm(x, weight, bias=bias, group_list=ends(counts))
    wanted = reference.grouped_matmul(wide(x), wide(weight), counts) + wide(bias)[[0, 0, 2, 2, 2]]
    assert y.dtype == dtype
    assert relative_error(y.detach(), wanted) <= (TOLERANCE if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("counts", SPLITS, ids=str)
def test_group_type_2_groups_the_inner_dimension(counts):
    x, _, dy = operands(counts)
    got = npu_gmm(x.detach().t(), dy, group_list=ends(counts), group_type=2)
    got_v2 = npu_gmm_v2(x.detach().t(), dy, group_list=here(torch.tensor(counts)), group_type=2)
    assert got.shape == (len(counts), 8, 12)
    assert relative_error(got, reference.grouped_dw(wide(x), wide(dy), counts)) <= TOLERANCE
    assert torch.equal(got, got_v2)


@pytest.mark.parametrize("shape", [(8, 12), (1, 8, 12)])
def test_group_type_minus_1_is_a_plain_matmul(shape):
    x, weight = here(torch.randn(5, 8)), here(torch.randn(shape))
    bias = here(torch.randn(12))
    y = npu_gmm(x, weight, bias=bias, group_type=-1)
    wanted = wide(x) @ wide(weight).view(8, 12) + wide(bias)
    assert relative_error(y, wanted) <= TOLERANCE


def parameter_with_main_grad(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(weight.detach().clone().reshape(shape))
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    return parameter


@pytest.mark.parametrize("layout", ["same", "legacy 2-D", "transposed"])
@pytest.mark.parametrize("counts", SPLITS, ids=str)
def test_fusion_adds_two_micro_batches_to_main_grad(counts, layout):
    x, weight, dy = operands(counts)
    groups = len(counts)
    if layout == "transposed":
        parameter = parameter_with_main_grad(weight.transpose(1, 2).contiguous(), (groups, 12, 8))
    else:
        shape = (groups, 8, 12) if layout == "same" else (8, groups * 12)
        parameter = parameter_with_main_grad(weight, shape)
    for _ in range(2):
        view = parameter.transpose(1, 2) if layout == "transposed" else parameter.view(groups, 8, 12)
        y = npu_gmm(x, view, group_list=ends(counts), gemm_fusion=True, original_weight=parameter)
        y.backward(dy)
    got = parameter.main_grad
    got = got.transpose(1, 2) if layout == "transposed" else got.view(groups, 8, 12)
    _, dx64, dw64 = reference_gradients(x, weight, dy, counts)
    assert parameter.grad_added_to_main_grad is True
    assert relative_error(got, 2 * dw64) <= TOLERANCE
    assert relative_error(x.grad, 2 * dx64) <= TOLERANCE


@pytest.mark.host  # the choice is one of the CPU's kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widened", [True, False])
def test_fusion_of_half_precision_adds_in_fp32(dtype, widened, monkeypatch):
    from fluid_npu.device import Choice, kernels_of

    x, weight, dy = operands([4, 0, 5], 16, 8, dtype)
    monkeypatch.setattr(kernels_of(x), "_widen", Choice(widened, "test"))
    parameter = parameter_with_main_grad(weight, (3, 16, 8))
    y = npu_gmm_v2(x, parameter, group_list=torch.tensor([4, 0, 5]), gemm_fusion=True, original_weight=parameter)
    y.backward(dy)
    assert parameter.main_grad.dtype == torch.float32
    wanted = reference.grouped_dw(wide(x), wide(dy), [4, 0, 5])
    assert relative_error(parameter.main_grad, wanted) <= (TOLERANCE if widened else 6e-3)


def test_zero_out_wgrad_is_read_from_the_parameter_and_not_from_the_view():
    x, weight, dy = operands([2, 3])
    parameter = parameter_with_main_grad(weight, (8, 24))
    parameter.zero_out_wgrad = True
    npu_gmm(x, parameter.view(2, 8, 12), group_list=[2, 5], gemm_fusion=True, original_weight=parameter).backward(dy)
    assert torch.count_nonzero(parameter.grad) == 0


def test_fusion_without_main_grad_says_what_to_do():
    x, weight, _ = operands([2, 3])
    with pytest.raises(RuntimeError, match="main_grad.*gemm_fusion=False"):
        npu_gmm(x, weight, group_list=[2, 5], gemm_fusion=True, original_weight=torch.nn.Parameter(weight))


def errors():
    """(expected error, words of the message, operator, changes to a legal call)."""
    half, rows = torch.bfloat16, 5
    legal_main_grad = torch.nn.Parameter(torch.zeros(2, 8, 12))
    legal_main_grad.main_grad = torch.zeros(2, 8, 12)
    wrong_dtype = torch.nn.Parameter(torch.zeros(2, 8, 12))
    wrong_dtype.main_grad = torch.zeros(2, 8, 12, dtype=half)
    wrong_size = torch.nn.Parameter(torch.zeros(2, 8, 12))
    wrong_size.main_grad = torch.zeros(2, 8, 11)
    meta = torch.device("meta")
    return [
        (ValueError, "group_type is 1", npu_gmm, dict(group_type=1)),
        (ValueError, "group_type is 7", npu_gmm, dict(group_type=7)),
        (TypeError, "x is list", npu_gmm, dict(x=[1.0])),
        (TypeError, "x.dtype is torch.float64", npu_gmm, dict(x=torch.zeros(rows, 8).double())),
        (TypeError, "weight.dtype is torch.int32", npu_gmm, dict(weight=torch.zeros(2, 8, 12, dtype=torch.int32))),
        (TypeError, "weight.dtype is torch.bfloat16", npu_gmm, dict(weight=torch.zeros(2, 8, 12, dtype=half))),
        (RuntimeError, "weight is on meta", npu_gmm, dict(weight=torch.zeros(2, 8, 12, device=meta))),
        (ValueError, "x has shape", npu_gmm, dict(x=torch.zeros(rows, 1, 8))),
        (ValueError, "weight has shape", npu_gmm, dict(weight=torch.zeros(8, 12))),
        (ValueError, "inner dimension", npu_gmm, dict(weight=torch.zeros(2, 7, 12))),
        (ValueError, "below 65536", npu_gmm, dict(weight=torch.zeros(1, 1, 1).expand(2, 8, 65536))),
        (TypeError, "group_list is NoneType", npu_gmm, dict(group_list=None)),
        (TypeError, "group_list is tuple", npu_gmm, dict(group_list=(2, 5))),
        (TypeError, "group_list holds 2.0", npu_gmm, dict(group_list=[2.0, 5])),
        (TypeError, "group_list is list", npu_gmm_v2, dict(group_list=[2, 3])),
        (TypeError, "group_list.dtype is torch.int32", npu_gmm, dict(group_list=torch.tensor([2, 5]).int())),
        (ValueError, "must be 1-D", npu_gmm, dict(group_list=torch.tensor([[2, 5]]))),
        (
            RuntimeError,
            "group_list is on meta",
            npu_gmm,
            dict(group_list=torch.zeros(2, device=meta).long()),
        ),
        (ValueError, "group_list is empty", npu_gmm, dict(group_list=[])),
        (ValueError, "non-decreasing", npu_gmm, dict(group_list=[6, 5])),
        (ValueError, "non-negative", npu_gmm, dict(group_list=[-1, 5])),
        (ValueError, "non-negative", npu_gmm_v2, dict(group_list=torch.tensor([6, -1]))),
        (ValueError, "last entry of group_list is 4", npu_gmm, dict(group_list=[2, 4])),
        (ValueError, "sum of group_list is 7", npu_gmm_v2, dict(group_list=torch.tensor([2, 5]))),
        (ValueError, "has 3 entries", npu_gmm, dict(group_list=[2, 3, 5])),
        (TypeError, "bias is list", npu_gmm, dict(bias=[0.0])),
        (ValueError, "bias requires a gradient", npu_gmm, dict(bias=torch.zeros(2, 12, requires_grad=True))),
        (TypeError, "bias.dtype is torch.bfloat16", npu_gmm, dict(bias=torch.zeros(2, 12, dtype=half))),
        (RuntimeError, "bias is on meta", npu_gmm, dict(bias=torch.zeros(2, 12, device=meta))),
        (ValueError, "bias has shape", npu_gmm, dict(bias=torch.zeros(12))),
        (ValueError, "group_list is given", npu_gmm, dict(group_type=-1, weight=torch.zeros(8, 12))),
        (
            RuntimeError,
            "requires a gradient",
            npu_gmm,
            dict(group_type=-1, group_list=None, weight=torch.zeros(8, 12, requires_grad=True)),
        ),
        (TypeError, "original_weight is NoneType", npu_gmm, dict(gemm_fusion=True)),
        (RuntimeError, "main_grad is torch.bfloat16", npu_gmm, dict(gemm_fusion=True, original_weight=wrong_dtype)),
        (ValueError, "main_grad has shape", npu_gmm, dict(gemm_fusion=True, original_weight=wrong_size)),
        (
            ValueError,
            "weight has strides",
            npu_gmm,
            dict(gemm_fusion=True, original_weight=legal_main_grad, weight=torch.zeros(2, 8, 24)[:, :, ::2]),
        ),
        (
            ValueError,
            "works with 0 only",
            npu_gmm,
            dict(gemm_fusion=True, group_type=2, weight=torch.zeros(5, 12), x=torch.zeros(8, 5)),
        ),
        (
            ValueError,
            "bias is given with group_type 2",
            npu_gmm,
            dict(bias=torch.zeros(12), group_type=2, weight=torch.zeros(5, 12), x=torch.zeros(8, 5)),
        ),
    ]


@pytest.mark.parametrize("error, words, operator, changes", errors(), ids=lambda value: str(value)[:40])
def test_illegal_input_is_refused_by_name(error, words, operator, changes):
    group_list = torch.tensor([2, 3]) if operator is npu_gmm_v2 else [2, 5]
    call = dict(x=torch.zeros(5, 8), weight=torch.zeros(2, 8, 12), group_list=group_list) | changes
    with pytest.raises(error, match=words):
        operator(call.pop("x"), call.pop("weight"), **call)


def test_an_expanded_gradient_is_accepted():
    x, weight, _ = operands([3, 2])
    npu_gmm(x, weight, group_list=[3, 5]).sum().backward()
    _, dx64, dw64 = reference_gradients(x, weight, torch.ones(5, 12), [3, 2])
    assert relative_error(x.grad, dx64) <= TOLERANCE
    assert relative_error(weight.grad, dw64) <= TOLERANCE
