"""CudaKernels on a GPU against float64 references; deselected where there is none."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.device import get_device, kernels_of
from fluid_npu.device.kernels.agreement import alone
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.kernels.gemm_beside import HELD
from fluid_npu.device.kernels.gemm_chooser import GemmChooser
from fluid_npu.device.kernels.gemm_forms import GemmCall, fuses_dw_add
from fluid_npu.device.kernels.triton_support import load
from fluid_npu.ops import reference
from fluid_npu.ops.grouped_matmul import npu_gmm
from fluid_npu.ops.once_bounded import bounded_groups
from fluid_npu.ops.permute import PermuteLayout, permute_tokens, permuted_probs, unpermute_tokens
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.rms_norm import rms_norm
from fluid_npu.ops.swiglu import swiglu_probs
from tests.support.triton_bounded_cases import map_of

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SPLITS = [[16, 8, 3, 5], [0, 7, 0, 1], [0, 0, 0], [9], [0]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("width, form", [(32, "loop"), (5, "loop"), (32, "rule"), (32, "triton"), (5, "triton")])
def test_grouped_matmul_and_its_dw_in_main_grad(counts, dtype, width, form, monkeypatch):
    monkeypatch.setenv("FLUID_GROUPED_GEMM", form)
    torch.manual_seed(0)
    x, weight = torch.randn(sum(counts), 16).to(dtype), torch.randn(len(counts), 16, width).to(dtype)
    dy = torch.randn(sum(counts), width).to(dtype)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = reference.grouped_matmul(x64, w64, counts)
    y64.backward(dy.double())
    x_gpu, parameter = x.cuda().requires_grad_(), torch.nn.Parameter(weight.cuda())
    parameter.main_grad = torch.zeros(weight.shape, device="cuda")
    ends = torch.tensor(counts, device="cuda").cumsum(0)
    for _ in range(2):
        y = npu_gmm(x_gpu, parameter, group_list=ends, gemm_fusion=True, original_weight=parameter)
        y.backward(dy.cuda())
    plain = torch.nn.Parameter(weight.cuda())
    npu_gmm(x.cuda(), plain, group_list=ends).backward(dy.cuda())
    assert relative_error(y.detach().cpu(), y64.detach()) <= TOLERANCE[dtype]
    assert relative_error(x_gpu.grad.cpu(), 2 * x64.grad) <= TOLERANCE[dtype]
    assert relative_error(plain.grad.cpu(), w64.grad) <= TOLERANCE[dtype]
    fused = dtype == torch.float32 or form == "triton" or (form == "loop" and fuses_dw_add().value)
    assert relative_error(parameter.main_grad.cpu(), 2 * w64.grad) <= (1e-6 if fused else TOLERANCE[dtype])


def test_forms_beside_an_exchange_are_timed_beside_held_multiprocessors():
    x, w = torch.randn(8 * 512, 1024, device="cuda").bfloat16(), torch.randn(8, 1024, 1024, device="cuda").bfloat16()
    chooser = GemmChooser(alone)
    with beside_exchange():
        call = GemmCall(op="mm", a=x, b=w, counts=[512] * 8)
    assert f"measured, beside {HELD} held multiprocessors: " in chooser.choose(call).reason
    product = chooser.compute(call)
    assert relative_error(product.cpu(), torch.bmm(x.view(8, 512, -1).double(), w.double()).flatten(0, 1).cpu()) <= 6e-3


def test_the_stand_in_holds_for_as_long_as_it_is_told():
    """Planted: 20 ms."""
    kernels = load("triton_hold")
    room = kernels.room_for(HELD, torch.device("cuda"))
    kernels.hold(room, 1.0)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    kernels.hold(room, 20e3)
    end.record()
    end.synchronize()
    assert 19.5 <= begin.elapsed_time(end) <= 30.0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dense_dw_in_main_grad(dtype):
    torch.manual_seed(0)
    x, dy, main_grad = torch.randn(9, 16).to(dtype), torch.randn(9, 8).to(dtype), torch.ones(8, 16)
    on_gpu = main_grad.cuda()
    kernels_of(on_gpu).dense_dw_add_(on_gpu, x.cuda(), dy.cuda())
    assert relative_error(on_gpu.cpu(), 1 + dy.double().t() @ x.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("form", ["triton", "loop", "rule"])
def test_a_dense_dw_beside_an_exchange_waits_for_nothing(form, monkeypatch):
    monkeypatch.setenv("FLUID_GROUPED_GEMM", form)
    x, dy = (torch.randn(64, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    main_grad = torch.zeros(32, 32, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    with beside_exchange():
        kernels_of(x).dense_dw_add_(main_grad, x, dy)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels_of(x).dense_dw_add_(main_grad, x, dy)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert relative_error(main_grad.cpu(), 2 * (dy.double().t() @ x.double()).cpu()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("uniform", [2, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_permute_and_unpermute_are_repeatable_and_right(dtype, uniform):
    torch.manual_seed(0)
    scores = torch.rand(33, 8)
    routing_map = torch.zeros(33, 8, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)
    wanted = PermuteLayout.from_routing_map(routing_map)
    layout = PermuteLayout.from_routing_map(routing_map.cuda(), uniform)
    for name in ("token_of_row", "row_of_pair", "bag_offsets", "pair_index"):
        assert torch.equal(getattr(layout, name).cpu(), getattr(wanted, name))
    x, probs = torch.randn(33, 16).to(dtype), torch.rand(33, 8)
    gpu = x.cuda().requires_grad_()
    out = [unpermute_tokens(permute_tokens(gpu, layout), layout) for _ in range(2)]
    out[0].sum().backward()
    assert torch.equal(out[0], out[1]) and torch.equal(out[0].cpu(), 2 * x)
    assert torch.equal(gpu.grad, torch.full_like(gpu.grad, 2))
    assert torch.equal(permuted_probs(probs.cuda(), layout).cpu(), permuted_probs(probs, wanted))


@pytest.mark.parametrize("room_G", [[900] * 8, [700] * 8, [None, *[900] * 7], [900, *[None] * 7]], ids=str)
def test_blocks_of_a_fixed_size_are_those_of_plain_torch(room_G, monkeypatch):
    """Real sizes: many programs, of which each counts what comes before its tokens."""
    monkeypatch.setenv("FLUID_ROW_KERNELS", "triton")
    map_TE = map_of(1365, 64, 8, seed=0)
    wanted, told = bounded_groups(map_TE, 8, room_G)
    for _ in range(2):
        layout, got = bounded_groups(map_TE.cuda(), 8, room_G)
        for name in ("token_of_row", "row_of_pair", "bag_offsets", "pair_index"):
            assert torch.equal(getattr(layout.rows, name).cpu(), getattr(wanted.rows, name)), name
        assert torch.equal(got.cpu(), told) and torch.equal(layout.map_TE.cpu(), wanted.map_TE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_swiglu_and_rms_norm(dtype):
    torch.manual_seed(0)
    h, p, gamma = torch.randn(17, 32).to(dtype), torch.rand(17), torch.rand(32).to(dtype)
    results = []
    for cast in (lambda t: t.double(), lambda t: t.cuda()):
        leaves = [cast(t).requires_grad_() for t in (h, p, gamma)]
        if cast(h).is_cuda:
            a, y = swiglu_probs(leaves[0], leaves[1]), rms_norm(leaves[0], leaves[2], 1e-5)
        else:
            a = reference.swiglu_probs(leaves[0], leaves[1])
            y = reference.rms_norm(leaves[0], leaves[2], 1e-5)
        (a.sum() + y.sum()).backward()
        results.append([a.detach(), y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*results, strict=True):
        assert relative_error(got.cpu(), wanted) <= TOLERANCE[dtype]


def test_auto_finds_the_gpu():
    device = get_device().value
    assert device.name in ("cuda", "npu")
    device.set_current(0)
    start, end = device.event(), device.event()
    start.record()
    torch.ones(1000, 1000, device=device.torch_device(0)).matmul(torch.ones(1000, 1000, device="cuda"))
    end.record()
    assert end.elapsed_ms(start) > 0 and device.peak_memory_mb() > 0 and device.describe()
    device.reset_peak_memory()
    device.manual_seed(1)
    state = device.get_rng_state()
    first = torch.rand(3, device="cuda")
    device.set_rng_state(state)
    assert torch.equal(first, torch.rand(3, device="cuda"))
