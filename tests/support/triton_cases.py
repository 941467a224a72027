"""Checks of the Triton kernels against float64 loops, for a GPU and for Triton's interpreter on a CPU.

``python -m tests.support.triton_cases`` runs all of them, in the interpreter with TRITON_INTERPRET=1 and else on a GPU,
and prints one JSON line a case; with K/N every N-th case from K. The interpreter multiplies no bf16: there, matrices
are fp32 and fp16. Shapes as in ``device/kernels/base.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from fluid_npu.ops import reference
from fluid_npu.ops.permute import PermuteLayout
from fluid_npu.ops.reference import relative_error
from tests.support.triton_activation_cases import ACTIVATION_CASES
from tests.support.triton_bounded_cases import BOUNDED_CASES
from tests.support.triton_exchange_cases import EXCHANGE_CASES
from tests.support.triton_static_cases import STATIC_CASES, static_round

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
COUNTS = [17, 0, 5, 20]
CASES: dict[str, Callable[[str], None]] = {**BOUNDED_CASES, **STATIC_CASES, **EXCHANGE_CASES, **ACTIVATION_CASES}


def case(function: Callable[[str], None]) -> Callable[[str], None]:
    """Registers a check; its argument is the device."""
    CASES[function.__name__] = function
    return function


def matrix_dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiles(**flags: bool) -> object:
    from fluid_npu.device.kernels.triton_grouped_gemm import Tiles

    return Tiles(16, 16, 16, 4, 2, swizzle=2, **flags)


def ends_of(counts: list[int], device: str) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(device)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = relative_error(got.cpu(), wanted)
    assert error <= TOLERANCE[dtype], f"off by {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def check_mm(device: str, inner: int, outer: int, dtype: torch.dtype, **flags: bool) -> None:
    """Both layouts of the weight, rows of a wider buffer, and nothing written beside the result."""
    from fluid_npu.device.kernels.triton_grouped_gemm import grouped_mm

    x = random(sum(COUNTS), inner + 16, dtype=dtype)[:, :inner]
    w = random(len(COUNTS), inner, outer, dtype=dtype, seed=1)
    wanted = reference.grouped_matmul(x, w, COUNTS)
    on_device, ends = x.to(device), ends_of(COUNTS, device)
    close(grouped_mm(on_device, w.to(device), ends, tiles(**flags)), wanted, dtype)
    transposed = w.transpose(1, 2).contiguous().to(device)
    close(grouped_mm(on_device, transposed, ends, tiles(**flags), trans_w=True), wanted, dtype)


@case
def grouped_mm_with_widths_that_no_block_divides(device: str) -> None:
    for dtype in matrix_dtypes(device):
        check_mm(device, 40, 24, dtype)


@case
def grouped_mm_through_tensor_descriptors(device: str) -> None:
    for dtype in matrix_dtypes(device):
        check_mm(device, 32, 24, dtype, described=True)


@case
def grouped_mm_with_one_program_for_many_tiles(device: str) -> None:
    check_mm(device, 40, 40, torch.float16, persistent=True)


@case
def grouped_mm_reads_no_neighbours(device: str) -> None:
    """Infinite rows and weights of one group stay in that group."""
    from fluid_npu.device.kernels.triton_grouped_gemm import grouped_mm

    x, w = random(42, 32, dtype=torch.float16), random(4, 32, 24, dtype=torch.float16, seed=1)
    x[17:22], w[2] = float("inf"), float("inf")
    for flags in ({}, {"described": True}):
        y = grouped_mm(x.to(device), w.to(device), ends_of(COUNTS, device), tiles(**flags)).cpu()
        finite = torch.cat([y[:17], y[22:]])
        close(finite, torch.cat([x[:17].double() @ w[0].double(), x[22:].double() @ w[3].double()]), torch.float16)


@case
def dw_is_added_to_main_grad_and_an_empty_group_is_not_touched(device: str) -> None:
    from fluid_npu.device.kernels.triton_grouped_gemm import grouped_dw_

    every = ({}, {"described": True}, {"persistent": True})
    for dtype in matrix_dtypes(device):
        for flags in every[:1] if dtype == torch.float32 else every[1:]:
            x, dy = random(42, 40, dtype=dtype), random(42, 24, dtype=dtype, seed=1)
            main_grad = torch.ones(4, 40, 24, device=device)
            main_grad[1] = -0.0  # a zero that is added makes it +0.0
            for _ in range(2):
                grouped_dw_(main_grad, x.to(device), dy.to(device), ends_of(COUNTS, device), tiles(**flags))
            wanted = 1 + 2 * reference.grouped_dw(x, dy, COUNTS)
            assert main_grad[1].signbit().all() and not main_grad[1].any()
            close(main_grad[[0, 2, 3]], wanted[[0, 2, 3]], torch.float32)


@case
def dw_reads_no_rows_of_the_next_group(device: str) -> None:
    from fluid_npu.device.kernels.triton_grouped_gemm import grouped_dw_

    x, dy = random(42, 32, dtype=torch.float16), random(42, 24, dtype=torch.float16, seed=1)
    x[22:], dy[22:] = float("inf"), float("nan")
    for flags in ({}, {"described": True}):
        dw = torch.zeros(4, 32, 24, device=device)
        grouped_dw_(dw, x.to(device), dy.to(device), ends_of(COUNTS, device), tiles(**flags))
        close(dw[:3], reference.grouped_dw(x[:22], dy[:22], COUNTS[:3]), torch.float32)


@case
def dw_is_written_with_zeros_for_an_empty_group(device: str) -> None:
    from fluid_npu.device.kernels.triton_grouped_gemm import grouped_dw_

    for dtype in matrix_dtypes(device):
        x, dy = random(42, 40, dtype=dtype), random(42, 24, dtype=dtype, seed=1)
        dw = torch.full((4, 40, 24), float("nan"), dtype=dtype, device=device)
        grouped_dw_(dw, x.to(device), dy.to(device), ends_of(COUNTS, device), tiles(), accumulate=False)
        close(dw, reference.grouped_dw(x, dy, COUNTS), dtype)
        assert not dw[1].any()


@case
def dw_of_pieces_is_one_sum_over_the_rows_of_all(device: str) -> None:
    """Two to four pieces; groups without rows in some or all of them; nothing read behind a piece's last row."""
    from fluid_npu.device.kernels.triton_dw_pieces import grouped_dw_pieces_

    each = [COUNTS, [0, 0, 18, 3], [1, 0, 0, 33], [16, 0, 2, 0]]
    for number, dtype, flags in (
        (2, torch.float32, {}),
        (2, torch.float16, {"described": True}),
        (3, torch.float16, {"described": True}),
        (4, torch.float16, {}),
    ):
        operands = []
        for seed, counts in enumerate(each[:number]):
            rows = sum(counts)
            x, dy = (
                random(rows + 3, 48, dtype=dtype, seed=seed)[:, :40],
                random(rows + 3, 24, dtype=dtype, seed=9 + seed),
            )
            x[rows:], dy[rows:] = float("inf"), float("nan")
            operands.append((x, dy, counts))
        wanted = 1 + sum(reference.grouped_dw(x[: sum(c)], dy[: sum(c)], c) for x, dy, c in operands)
        main_grad = torch.ones(4, 40, 24, device=device)
        main_grad[1] = -0.0  # a zero that is added makes it +0.0
        pieces = [(x.to(device), dy.to(device), ends_of(c, device)) for x, dy, c in operands]
        grouped_dw_pieces_(main_grad, pieces, tiles(**flags))
        assert main_grad[1].signbit().all() and not main_grad[1].any()
        close(main_grad[[0, 2, 3]], wanted[[0, 2, 3]], torch.float32)


@case
def dw_of_pieces_through_the_seam_is_one_launch(device: str) -> None:
    """Rows that the host knows and rows that it does not; no operator of torch beside the kernel."""
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.device.kernels.gemm_chooser import GemmChooser
    from fluid_npu.device.kernels.gemm_forms import TritonForm
    from fluid_npu.device.kernels.groups import DeviceRows, GroupRows
    from fluid_npu.device.kernels.pieces import DWPart, PieceRows
    from tests.support.op_count import OpCount

    if device != "cpu":
        return  # launches are counted in the interpreter
    form = TritonForm(16, 16, 16, 4, 2)
    kernels, each = CudaKernels(GemmChooser(forms={form.name: form})), [[3, 0, 5], [1, 0, 2]]
    operands = [(random(12, 16, seed=n), random(12, 24, seed=5 + n), counts) for n, counts in enumerate(each)]
    wanted = sum(reference.grouped_dw(x[: sum(c)], dy[: sum(c)], c) for x, dy, c in operands)
    for known in (True, False):
        rows: list[GroupRows | DeviceRows] = []
        for counts in each:
            ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
            rows.append(GroupRows(counts, ends=ends) if known else DeviceRows(3, capacity=12, expected=6))
            if isinstance(rows[-1], DeviceRows):
                rows[-1].settle(ends)
        used = [sum(counts) if known else 12 for counts in each]
        parts = [DWPart(x[:n], dy[:n], r) for (x, dy, _), n, r in zip(operands, used, rows, strict=True)]
        main_grad = torch.zeros(3, 16, 24)
        pieces = PieceRows(rows, torch.tensor(each) if known else None)
        with OpCount().with_kernels() as count:
            kernels.grouped_dw_pieces_add_(main_grad, parts, pieces)
        assert dict(count.kernels) == {"_grouped_dw_pieces": 1} and not count.ops, (count.kernels, count.ops)
        close(main_grad, wanted, torch.float32)


@case
def row_blocks_cover_every_row_once(device: str) -> None:
    from fluid_npu.device.kernels.triton_grouped_gemm import row_blocks

    for counts in ([17, 0, 5, 20], [0, 0, 3], [5000, 1], [16]):
        table = row_blocks(ends_of(counts, device), sum(counts) // 16 + 1 + len(counts), 16).cpu()
        ends = torch.tensor(counts).cumsum(0).tolist()
        wanted = [(g, row) for g, n in enumerate(counts) for row in range(ends[g] - n, ends[g], 16)]
        assert [tuple(entry) for entry in table[: len(wanted)].tolist()] == wanted
        assert (table[len(wanted) :, 0] == -1).all()


@case
def permute_and_unpermute(device: str) -> None:
    """Uniform and varying numbers of rows, a token without rows, rows of a wider buffer; the same bits twice."""
    from fluid_npu.device.kernels.triton_permute import gather_rows, sum_rows

    uniform = torch.zeros(9, 6, dtype=torch.bool).scatter_(1, random(9, 6).topk(3).indices, True)
    dropped = uniform.clone()
    dropped[2], dropped[5, :4] = False, False
    for routed, per_token in ((uniform, 3), (uniform, None), (dropped, None)):
        layout = PermuteLayout.from_routing_map(routed, per_token)
        rows = reference.routed_rows(routed)
        token_of_row, pairs, bags = (
            t.to(device) for t in (layout.token_of_row, layout.row_of_pair, layout.bag_offsets)
        )
        for dtype in TOLERANCE:
            x = random(9, 40, dtype=dtype)[:, :36]
            assert torch.equal(gather_rows(x.to(device), token_of_row).cpu().double(), reference.permute(x, rows))
            y = random(len(rows), 48, dtype=dtype)[:, :36]
            sums = [sum_rows(y.to(device), pairs, bags, layout.pairs_per_token) for _ in range(2)]
            close(sums[0], reference.unpermute(y, rows, 9), dtype)
            assert torch.equal(sums[0], sums[1])


def routed_maps() -> list[tuple[Tensor, int | None]]:
    """Maps and K: top-1 to top-8, one token, one expert, uneven, no token, many tokens, dropped pairs, nobody."""
    maps: list[tuple[Tensor, int | None]] = []
    for tokens, experts, topk in ((9, 6, 3), (5, 8, 8), (1, 4, 2), (19, 5, 1), (5, 1, 1), (0, 3, 2), (300, 64, 6)):
        scores = random(tokens, experts, seed=tokens) + torch.arange(experts) / 4
        maps.append((torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True), topk))
    dropped = maps[0][0].clone()
    dropped[2], dropped[5, :4] = False, False
    return [*maps, (dropped, None), (torch.zeros(7, 3, dtype=torch.bool), None)]


@case
def routing_maps_become_the_rows_of_plain_torch(device: str) -> None:
    from fluid_npu.device.kernels.torch_kernels import TorchKernels
    from fluid_npu.device.kernels.triton_routing import routed_rows

    for routed, topk in routed_maps():
        count = int(routed.sum())
        wanted = TorchKernels().routed_rows(routed, count, topk)._replace(counts_E=routed.sum(0))
        for name, got in routed_rows(routed.to(device), count)._asdict().items():
            assert torch.equal(got.cpu(), getattr(wanted, name)), (routed.shape, topk, name)


@case
def a_map_with_other_entries_than_promised_points_nowhere_outside(device: str) -> None:
    from fluid_npu.device.kernels.triton_routing import routed_rows

    one = torch.zeros(40, 6, dtype=torch.bool)
    one[::3, 2] = True
    many = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for routed, rows in ((one, 80), (one, 5), (many, 200), (many, 100), (many, 30)):
        found = routed_rows(routed.to(device), rows)
        for index, below in ((found.token_of_row, 40), (found.row_of_pair, rows), (found.pair_index, 240)):
            assert index.shape == (rows,) and ((index >= 0) & (index < below)).all(), (rows, below)
        assert (found.bag_offsets <= rows).all() or rows > int(routed.sum())


@case
def received_chunks_are_put_in_the_order_of_plain_torch(device: str) -> None:
    from fluid_npu.device.kernels.torch_kernels import TorchKernels
    from fluid_npu.device.kernels.triton_routing import chunk_order

    for counts in ([[3, 0, 5], [1, 2, 0]], [[0, 0]], [[7]], [[1500, 2], [0, 1100]], [[1] * 9] * 4, [[0, 0], [0, 0]]):
        counts_CL = torch.tensor(counts)
        wanted = TorchKernels().chunk_order(counts_CL, counts_CL)
        wider = torch.cat([counts_CL, counts_CL + 1], dim=1).to(device)[:, : counts_CL.shape[1]]
        rows, inverse, ends = chunk_order(wider, int(counts_CL.sum()))
        assert torch.equal(rows.cpu(), wanted.rows) and torch.equal(inverse.cpu(), wanted.inverse), counts
        assert ends is not None and torch.equal(ends.cpu(), counts_CL.sum(0).cumsum(0).int()), counts


@case
def payloads_are_those_of_plain_torch(device: str) -> None:
    """Tokens and probabilities keep their bits, those of NaNs too; gradients sum as permute's; rows have strides."""
    from fluid_npu.device.kernels import triton_payload
    from fluid_npu.device.kernels.torch_kernels import TorchKernels

    plain, wires = TorchKernels(), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for routed, topk in routed_maps()[:-1]:
        layout, count = PermuteLayout.from_routing_map(routed, topk), int(routed.sum())
        indices = (layout.row_of_pair, layout.bag_offsets, layout.pair_index)
        pairs, bags, index = (t.to(device) for t in indices)
        shape = (36, routed.shape[1], layout.pairs_per_token)
        if count > 100:
            continue  # the interpreter takes a millisecond a row
        for number, dtype in enumerate(TOLERANCE):
            wire = wires[(number + layout.num_tokens) % 4]
            wire = wire if wire.itemsize >= dtype.itemsize else dtype
            x, p = random(layout.num_tokens, 48, dtype=dtype)[:, :36], random(*routed.shape, seed=1).to(wire)
            p.view(-1)[::7] = -0.0 if wire.itemsize == 2 else float("nan")  # torch's NaNs of halves change bits
            wanted = plain.pack_tokens(x, p, layout)
            token_of_row = layout.token_of_row.to(device)
            payload = triton_payload.pack_tokens(x.to(device), p.to(device), token_of_row, index)
            same_bits(payload, wanted)
            dx, dp = triton_payload.sum_payload(payload, wire, pairs, bags, index, shape)
            same_bits(dp, plain.sum_payload(wanted, 36, wire, layout)[1])
            if len(x):
                rows_of = reference.routed_rows(routed)
                close(dx, reference.unpermute(wanted[:, :36].double(), rows_of, len(x)), dtype)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(3)) if number else None
            on_device = None if order is None else order.to(device)
            got = triton_payload.unpack_rows(payload, 36, wire, on_device)
            for a, b in zip(got, plain.unpack_rows(wanted, 36, wire, order), strict=True):
                same_bits(a, b)
            strided = got[1].repeat_interleave(2)[::2]
            again = triton_payload.pack_rows(payload[:, :36], strided, on_device)
            same_bits(again, plain.pack_rows(wanted[:, :36], strided.cpu(), order))


@case
def tokens_that_go_once_to_each_rank_are_those_of_plain_torch(device: str) -> None:
    """The rows, the payload, its arrival and all gradients, beside the functions of ops in plain torch on the CPU."""
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels

    sizes = ((9, 6, 3, 3, torch.float16), (5, 8, 8, 2, torch.float32), (3, 4, 1, 4, torch.bfloat16))
    kept = seam._kernels.get(device)
    for tokens, experts, topk, groups, dtype in sizes:
        routed = torch.zeros(tokens, experts, dtype=torch.bool)
        routed.scatter_(1, (random(tokens, experts, seed=tokens) + torch.arange(experts) / 3).topk(topk).indices, True)
        x, p = random(tokens, 24, dtype=dtype), random(tokens, experts, seed=1)
        results = []
        for where in ("cpu", device):
            if len(results):
                seam._kernels[device] = CudaKernels()
            try:
                results.append(_once_round(routed.to(where), x.to(where), p.to(where), topk, groups))
            finally:
                seam._kernels.pop(device, None) if kept is None else seam._kernels.update({device: kept})
        for number, (wanted, got) in enumerate(zip(*results, strict=True)):
            if got.dtype == torch.int64 or got.dtype == torch.float32 and number < 5:
                assert torch.equal(got.cpu(), wanted), (tokens, number)
            else:
                close(got, wanted.double(), dtype)


def _once_round(routed: Tensor, x: Tensor, p: Tensor, topk: int, groups: int) -> list[Tensor]:
    """One dispatch whose rows for group 0 arrive on this rank; the gradients of that group's rows come back."""
    from fluid_npu.ops.once import once_counts
    from fluid_npu.ops.payload_once import Arrival, Expand, PackOnce, SlotRow

    counts, layout_of = once_counts(routed, topk, groups)
    layout = layout_of(int(counts[:, 0].sum()))
    row = SlotRow(hidden=x.shape[1], slots=layout.num_slots, wire=torch.float32)
    pack = PackOnce(layout, row)
    payload = pack.load(x, p)
    first = int(counts[0, 0])
    arrived = payload[:first].clone()
    expand = Expand(row, Arrival(expert_rows=int(counts[0, 1:].sum())), layout.local)
    x_R, p_R = expand.unload(arrived)
    back = expand.load_grad(x_R, p_R)
    dx, dp = pack.unload_grad(torch.cat([back, payload[first:]]))
    rows = layout.rows
    return [
        counts,
        rows.token_of_row,
        rows.pair_index,
        p_R,
        dp,
        payload[:, : x.shape[1]],
        x_R,
        back[:, : x.shape[1]],
        dx,
    ]


@case
def a_dispatch_is_one_launch_for_each_thing_that_moves(device: str) -> None:
    """Routing, payload, order of arrival and all their gradients: so many kernels, and no operator of torch."""
    if device != "cpu":
        return  # launches are counted in the interpreter
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.ops.payload import Pack, Unpack
    from fluid_npu.ops.permute import counts_of_experts
    from tests.support.op_count import OpCount

    routed, topk = routed_maps()[0]
    x, p = random(9, 24, dtype=torch.float16), random(9, 6, seed=1)
    kept, seam._kernels[device] = seam._kernels.get(device), CudaKernels()
    try:
        for _ in range(2):  # the first time kernels are checked
            with OpCount().with_kernels() as plain:
                counts, found = counts_of_experts(routed, topk)
                layout = PermuteLayout.from_routing_map(routed, topk, routed=found)
                pack = Pack(layout, 24, torch.float32)
                payload = pack.load(x, p)
                order = seam.kernels_of(counts).chunk_order(counts.view(1, -1), torch.tensor([[0] * 5 + [27]]))
                unpack = Unpack(24, torch.float32, order.rows)
                pack.unload_grad(unpack.load_grad(*unpack.unload(payload)))
            with OpCount().with_kernels() as once:
                _once_round(routed, x, p, 3, 3)
            with OpCount().with_kernels() as static:
                static_round(routed, x, p, 3, 3)
    finally:
        seam._kernels.pop(device) if kept is None else seam._kernels.update({device: kept})
    kernels = dict.fromkeys(("_routed_rows", "_pack", "_chunk_order", "_unpack", "_pack_rows", "_sum_payload"), 1)
    assert plain.kernels == kernels, plain.kernels
    assert sum(plain.ops.values()) <= 0, plain.ops
    kernels = dict.fromkeys(
        ("_once_rows", "_pack_once", "_slots_to_map", "_routed_rows", "_expand", "_reduce", "_sum_once"), 1
    )
    assert once.kernels == kernels, once.kernels
    wanted = {"_pack_once": 1, "_slots_to_map": 1, "_place": 1, "_spread": 2, "_sum": 2, "_sum_once": 1}
    assert static.kernels == wanted, static.kernels
    assert set(static.ops) <= {
        "repeat",
        "cat",
        "sum",
        "fill_",
        "diff",
        "to",
        "_to_copy",
        "sub",
        "new_zeros",
        "copy_",
    } | {"_local_scalar_dense"}, static.ops
    assert set(once.ops) <= {"clone", "cat", "sum", "_local_scalar_dense"}, once.ops  # those of the round itself


def same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.cpu().contiguous().view(words), wanted.contiguous().view(words))


@case
def routing_and_payloads_through_the_seam(device: str) -> None:
    """CudaKernels take them after their own check, and plain torch for what Triton does not fit."""
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.device.kernels.torch_kernels import TorchKernels

    kernels, plain = CudaKernels(), TorchKernels()
    routed, topk = routed_maps()[0]
    on_device = routed.to(device)
    counts, found = kernels.counts_and_rows(on_device, 27)
    assert found is not None and torch.equal(counts.cpu(), routed.sum(0))
    assert kernels.counts_and_rows(on_device, None)[1] is None
    layout = PermuteLayout.from_routing_map(on_device, topk, routed=found)
    wanted = PermuteLayout.from_routing_map(routed, topk)
    for hidden in (36, 35):  # 35 columns of 2 bytes end between words of 4
        x, p = random(9, hidden, dtype=torch.float16), random(9, 6, seed=1)
        payload = kernels.pack_tokens(x.to(device), p.to(device), layout)
        same_bits(payload, plain.pack_tokens(x, p, wanted))
        dx, dp = kernels.sum_payload(payload, hidden, torch.float32, layout)
        same_bits(dp, plain.sum_payload(payload.cpu(), hidden, torch.float32, wanted)[1])
        close(dx, reference.unpermute(x[wanted.token_of_row].double(), reference.routed_rows(routed), 9), torch.float16)
        for got, same in zip(
            kernels.unpack_rows(payload, hidden, torch.float32, None),
            plain.unpack_rows(payload.cpu(), hidden, torch.float32, None),
            strict=True,
        ):
            same_bits(got, same)
        rows = kernels.unpack_rows(payload, hidden, torch.float32, None)
        same_bits(kernels.pack_rows(*rows, None), payload.cpu())
    assert kernels.chunk_order(torch.tensor([[2, 1]], device=device), torch.tensor([[2, 1]])).ends_L is not None


@case
def rms_norm_and_its_gradients(device: str) -> None:
    from fluid_npu.device.kernels.triton_rms_norm import rms_norm, rms_norm_grad

    for dtype in TOLERANCE:
        x, dy = random(3, 5, 40, dtype=dtype), random(3, 5, 40, dtype=dtype, seed=1)
        gamma = random(40, dtype=dtype, seed=2)
        x64, gamma64 = x.double().requires_grad_(), gamma.double().requires_grad_()
        y64 = reference.rms_norm(x64, gamma64, 1e-5)
        y64.backward(dy.double())
        y, rstd = rms_norm(x.to(device), gamma.to(device), 1e-5)
        assert rstd.shape == (3, 5, 1) and rstd.dtype == torch.float32
        dx, dgamma = rms_norm_grad(dy.to(device), x.to(device), gamma.to(device), rstd)
        for got, wanted in ((y, y64.detach()), (dx, x64.grad), (dgamma, gamma64.grad)):
            close(got, wanted, dtype)


@case
def nothing_to_do(device: str) -> None:
    from fluid_npu.device.kernels import triton_activations, triton_grouped_gemm, triton_payload, triton_permute

    empty, ends = torch.empty(0, 32, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    assert triton_grouped_gemm.grouped_mm(empty, torch.ones(3, 32, 8, device=device), ends, tiles()).shape == (0, 8)
    dw = torch.ones(3, 32, 32, device=device)
    triton_grouped_gemm.grouped_dw_(dw, empty, empty, ends, tiles())
    assert (dw == 1).all()
    triton_grouped_gemm.grouped_dw_(dw, empty, empty, ends, tiles(), accumulate=False)
    assert not dw.any()
    no_rows, no_p = ends[:0], torch.empty(0, 3, device=device)
    payload = triton_payload.pack_tokens(empty, no_p, no_rows, no_rows)
    assert payload.shape == (0, 36) and triton_payload.pack_rows(empty, no_p[:, 0], None).shape == (0, 36)
    assert [t.shape for t in triton_payload.unpack_rows(payload, 32, torch.float32, no_rows)] == [(0, 32), (0,)]
    dx, dp = triton_payload.sum_payload(payload, torch.float32, no_rows, ends, no_rows, (32, 3, None))
    assert dx.shape == (3, 32) and not dx.any() and dp.shape == (3, 3) and not dp.any()
    assert triton_permute.gather_rows(empty, ends[:0]).shape == (0, 32)
    assert not triton_permute.sum_rows(empty, ends[:0], ends, None).any()
    for gated, width in ((True, 16), (False, 32)):
        assert triton_activations.activation_probs(empty, empty[:, 0], "gelu", gated).shape == (0, width)
        grads = triton_activations.activation_probs_grad(empty[:, :width], empty, empty[:, 0], "gelu", gated)
        assert [t.shape for t in grads] == [(0, 32), (0,)]


@case
def experts_through_the_seam(device: str) -> None:
    """``expert_mlp`` on CudaKernels that may use nothing but Triton, with uneven and empty groups."""
    import fluid_npu.device as seam
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.device.kernels.gemm_chooser import GemmChooser
    from fluid_npu.device.kernels.gemm_forms import TritonForm
    from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, expert_mlp

    form = TritonForm(16, 16, 16, 4, 2)
    kept = seam._kernels.get(device)
    seam._kernels[device] = CudaKernels(GemmChooser(forms={form.name: form}))
    try:
        counts = [3, 0, 5, 1]
        tensors = [random(9, 20)[:, :12], random(9, seed=1), random(4, 12, 32, seed=2), random(4, 16, 12, seed=3)]
        x, p, w1, w2 = (t.clone().to(device).requires_grad_() for t in tensors)
        for w in (w1, w2):
            w.main_grad = torch.zeros(w.shape, device=device)  # type: ignore[attr-defined]
        fused = (WeightGradTarget(fuse_into=w) for w in (w1, w2))
        mlp = ExpertMLP(counts=counts, activation=None, fc1=next(fused), fc2=next(fused))
        y = expert_mlp(x, p, w1, w2, mlp)
        y.backward(random(9, 12, seed=4).to(device))
    finally:
        seam._kernels.pop(device) if kept is None else seam._kernels.update({device: kept})
    x64, p64, w164, w264 = (t.double().requires_grad_() for t in tensors)
    hidden = reference.swiglu_probs(reference.grouped_matmul(x64, w164, counts), p64)
    y64 = reference.grouped_matmul(hidden, w264, counts)
    y64.backward(random(9, 12, seed=4).double())
    got = (y.detach(), x.grad, p.grad, w1.main_grad, w2.main_grad)  # type: ignore[attr-defined]
    for value, wanted in zip(got, (y64.detach(), x64.grad, p64.grad, w164.grad, w264.grad), strict=True):
        assert relative_error(value.cpu(), wanted) <= 2e-6


def main(arguments: list[str]) -> int:
    """Runs the cases; returns 1 when one failed."""
    failed, device = 0, "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    share, shares = map(int, (arguments[0] if arguments else "0/1").split("/"))
    for name, check in list(CASES.items())[share::shares]:
        try:
            start = time.process_time()
            check(device)
            print(json.dumps({"case": name, "failure": None, "seconds": time.process_time() - start}), flush=True)
        except Exception:
            failed = 1
            print(json.dumps({"case": name, "failure": traceback.format_exc()[-3000:]}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
