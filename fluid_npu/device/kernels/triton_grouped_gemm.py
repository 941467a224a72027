"""Grouped matmul of uneven groups of rows as one launch, and its weight gradient added to fp32 inside the launch.

Every program computes one tile of the result, or with ``persistent`` one after another. Which rows a tile covers comes
from a table built on the device, so that the host need not know the groups. Tiles are read through tensor descriptors
(TMA) where ``described`` says so, else through pointers. Sums are fp32 in ascending order of the inner index: the same
tile shape gives the same bits on every run.

Shapes: R rows, K inner and N outer width, L groups, BM x BN the tile, BK the step along the inner dimension.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton before 3.4: pointers alone
    TensorDescriptor = None

_TABLE_BLOCK = 128


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swizzle: int = 8
    """Tiles of so many row blocks are computed before the next column block: they share what the cache holds."""
    described: bool = False
    """Reads through tensor descriptors."""
    persistent: bool = False
    """As many programs as the device has multiprocessors."""


def grouped_mm(
    x_RK: Tensor, w_LKN: Tensor, ends_L: Tensor, tiles: Tiles, trans_w: bool = False, table: Tensor | None = None
) -> Tensor:
    """[R, N] in the dtype of x: each group's rows times its weight; with ``trans_w`` the weight is [L, N, K].

    Args:
        x_RK: unit stride along K.
        w_LKN: any strides; ``tiles.described`` wants it contiguous.
        ends_L: where each group ends, int32 or int64 on the device of x; the last is R.
        tiles: the tile shapes.
        table: ``row_blocks`` of these groups and ``tiles.bm``, where it is there already.
    """
    rows, inner = x_RK.shape
    groups, outer = w_LKN.shape[0], w_LKN.shape[1 if trans_w else 2]
    y_RN = x_RK.new_empty(rows, outer)
    if y_RN.numel() == 0 or inner == 0:
        return y_RN.zero_()
    blocks = triton.cdiv(rows, tiles.bm) + groups  # no more than this many row blocks, whatever the groups are
    table = row_blocks(ends_L, blocks, tiles.bm) if table is None else table
    stride_k, stride_n = (w_LKN.stride(2), w_LKN.stride(1)) if trans_w else w_LKN.stride()[1:]
    x: Any = x_RK
    w: Any = w_LKN
    if tiles.described:
        x = _descriptor(x_RK, [tiles.bm, tiles.bk])
        w = _descriptor(w_LKN.flatten(0, 1), [tiles.bn, tiles.bk] if trans_w else [tiles.bk, tiles.bn])
    programs = blocks * triton.cdiv(outer, tiles.bn)
    _grouped_mm[(_programs(programs, tiles, x_RK),)](
        x, w, y_RN, table, ends_L,
        blocks, inner, outer, x_RK.stride(0), w_LKN.stride(0), stride_k, stride_n,
        BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, SWIZZLE=tiles.swizzle, TRANS_W=trans_w,
        DESCRIBED=tiles.described, PERSISTENT=tiles.persistent, PRECISION=_precision(x_RK),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y_RN


def grouped_dw_(
    dw_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, ends_L: Tensor, tiles: Tiles, accumulate: bool = True
) -> None:
    """Adds x^T dy of each group to the contiguous ``dw_LKN``; without ``accumulate`` writes it instead.

    An accumulating launch neither reads nor writes the entry of a group without rows; a writing one fills it with
    zeros. Here the tile is BM x BN of K x N and BK the step along the rows.
    """
    groups, inner, outer = dw_LKN.shape
    if dw_LKN.numel() == 0:
        return
    if x_RK.shape[0] == 0:
        if not accumulate:
            dw_LKN.zero_()
        return
    x: Any = x_RK
    dy: Any = dy_RN
    if tiles.described:
        x, dy = _descriptor(x_RK, [tiles.bk, tiles.bm]), _descriptor(dy_RN, [tiles.bk, tiles.bn])
    programs = groups * triton.cdiv(inner, tiles.bm) * triton.cdiv(outer, tiles.bn)
    _grouped_dw[(_programs(programs, tiles, x_RK),)](
        x, dy, dw_LKN, ends_L,
        programs, inner, outer, x_RK.stride(0), dy_RN.stride(0),
        BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, SWIZZLE=tiles.swizzle, ACCUMULATE=accumulate,
        DESCRIBED=tiles.described, PERSISTENT=tiles.persistent, PRECISION=_precision(x_RK),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def row_blocks(ends_L: Tensor, blocks: int, bm: int) -> Tensor:
    """int32 [blocks, 2]: (group, first row) of each block of up to ``bm`` rows of one group; -1 past the last."""
    table = torch.empty(blocks, 2, dtype=torch.int32, device=ends_L.device)
    groups = ends_L.shape[0]
    _row_blocks[(groups,)](
        ends_L, table, groups, blocks, BM=bm, GROUPS=triton.next_power_of_2(groups), BLOCK=_TABLE_BLOCK, num_warps=4
    )
    return table


def why_not_described(*operands: Tensor) -> str | None:
    """What keeps tensor descriptors from reading these operands, or None."""
    if TensorDescriptor is None:
        return f"triton {triton.__version__} has no tensor descriptors (3.4 has)"
    for x in operands:
        if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] < 9:
            return "the GPU is older than Hopper and has no TMA"
        if x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
            return "an operand is empty, starts between 16-byte words, or has no unit stride"
        if any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return "the rows of an operand are not aligned to 16 bytes"
    return None


def _descriptor(x: Tensor, block: list[int]) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _programs(tiles_total: int, tiles: Tiles, x: Tensor) -> int:
    if not tiles.persistent:
        return tiles_total
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return min(tiles_total, processors)


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def _row_blocks(ends, table, groups, blocks, BM: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    group = tl.program_id(0)
    every = tl.arange(0, GROUPS)
    last = tl.load(ends + every, mask=every < groups, other=0).to(tl.int32)
    first = tl.load(ends + every - 1, mask=(every > 0) & (every < groups), other=0).to(tl.int32)
    needed = tl.where(every < groups, (last - first + BM - 1) // BM, 0)
    start = tl.sum(tl.where(every < group, needed, 0))
    own = tl.sum(tl.where(every == group, needed, 0))
    row = tl.sum(tl.where(every == group, first, 0))
    for step in range(0, own, BLOCK):
        block = step + tl.arange(0, BLOCK)
        tl.store(table + 2 * (start + block), group + tl.zeros_like(block), mask=block < own)
        tl.store(table + 2 * (start + block) + 1, row + block * BM, mask=block < own)
    if group == groups - 1:
        for step in range(start + own, blocks, BLOCK):
            block = step + tl.arange(0, BLOCK)
            tl.store(table + 2 * block, tl.full((BLOCK,), -1, tl.int32), mask=block < blocks)


@triton.jit
def _swizzled(tile, blocks_m, blocks_n, SWIZZLE: tl.constexpr):
    """(row block, column block) of a tile: row blocks run fastest, in bundles of SWIZZLE."""
    bundle = tile // (SWIZZLE * blocks_n)
    first = bundle * SWIZZLE
    height = min(blocks_m - first, SWIZZLE)
    inside = tile % (SWIZZLE * blocks_n)
    return first + inside % height, inside // height


@triton.jit
def _grouped_mm(
    x, w, y, table, ends,
    blocks, inner, outer, stride_x, stride_group, stride_k, stride_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr, TRANS_W: tl.constexpr,
    DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(outer, BN)
    if PERSISTENT:
        for tile in range(tl.program_id(0), blocks * blocks_n, tl.num_programs(0)):
            _mm_tile(
                tile, x, w, y, table, ends, blocks, blocks_n, inner, outer, stride_x, stride_group, stride_k, stride_n,
                BM, BN, BK, SWIZZLE, TRANS_W, DESCRIBED, PRECISION,
            )  # fmt: skip
    else:
        _mm_tile(
            tl.program_id(0), x, w, y, table, ends, blocks, blocks_n, inner, outer, stride_x, stride_group, stride_k,
            stride_n, BM, BN, BK, SWIZZLE, TRANS_W, DESCRIBED, PRECISION,
        )  # fmt: skip


@triton.jit
def _mm_tile(
    tile, x, w, y, table, ends, blocks, blocks_n, inner, outer,
    stride_x, stride_group, stride_k, stride_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr, TRANS_W: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block_m, block_n = _swizzled(tile, blocks, blocks_n, SWIZZLE)
    group = tl.load(table + 2 * block_m)
    if group >= 0:
        row = tl.load(table + 2 * block_m + 1)
        end = tl.load(ends + group).to(tl.int32)
        column = block_n * BN
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        if DESCRIBED:
            # A step past K reads zeros, but of weights [K, N] the next group's: gemm_forms lets K be a multiple there.
            for k in range(0, inner, BK):
                a = x.load([row, k])
                if TRANS_W:
                    acc = tl.dot(a, w.load([group * outer + column, k]).T, acc, input_precision=PRECISION)
                else:
                    acc = tl.dot(a, w.load([group * inner + k, column]), acc, input_precision=PRECISION)
        else:
            x_tile = x + rows.to(tl.int64)[:, None] * stride_x
            w_tile = w + group.to(tl.int64) * stride_group + columns.to(tl.int64)[None, :] * stride_n
            for k in range(0, inner, BK):
                steps = k + tl.arange(0, BK)
                mask_a = (rows < end)[:, None] & (steps < inner)[None, :]
                mask_b = (steps < inner)[:, None] & (columns < outer)[None, :]
                a = tl.load(x_tile + steps[None, :], mask=mask_a, other=0.0)
                b = tl.load(w_tile + steps.to(tl.int64)[:, None] * stride_k, mask=mask_b, other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
        out = y + rows.to(tl.int64)[:, None] * outer + columns[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (columns < outer)[None, :])


@triton.jit
def _grouped_dw(
    x, dy, dw, ends,
    programs, inner, outer, stride_x, stride_dy,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr, ACCUMULATE: tl.constexpr,
    DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for tile in range(tl.program_id(0), programs, tl.num_programs(0)):
            _dw_tile(
                tile, x, dy, dw, ends, inner, outer, stride_x, stride_dy,
                BM, BN, BK, SWIZZLE, ACCUMULATE, DESCRIBED, PRECISION,
            )  # fmt: skip
    else:
        _dw_tile(
            tl.program_id(0), x, dy, dw, ends, inner, outer, stride_x, stride_dy,
            BM, BN, BK, SWIZZLE, ACCUMULATE, DESCRIBED, PRECISION,
        )  # fmt: skip


@triton.jit
def _dw_tile(
    tile, x, dy, dw, ends, inner, outer, stride_x, stride_dy,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr, ACCUMULATE: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(inner, BM), tl.cdiv(outer, BN)
    group = tile // (blocks_m * blocks_n)
    block_m, block_n = _swizzled(tile % (blocks_m * blocks_n), blocks_m, blocks_n, SWIZZLE)
    end = tl.load(ends + group).to(tl.int32)
    start = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    if (end > start) | (not ACCUMULATE):
        first_k, first_n = block_m * BM, block_n * BN
        acc = _sum_of_products(
            tl.zeros((BM, BN), dtype=tl.float32), x, dy, start, end, first_k, first_n, inner, outer,
            stride_x, stride_dy, BM, BN, BK, DESCRIBED, PRECISION,
        )  # fmt: skip
        _store_dw(dw, acc, group, first_k, first_n, inner, outer, BM, BN, ACCUMULATE)


@triton.jit
def _sum_of_products(
    acc, x, dy, start, end, first_k, first_n, inner, outer, stride_x, stride_dy,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc and the tile of x^T dy over some rows, in ascending order."""
    if DESCRIBED:
        whole = (end - start) // BK * BK
        for row in range(start, start + whole, BK):
            a, b = x.load([row, first_k]), dy.load([row, first_n])
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        if start + whole < end:
            # The last step reaches into the next group's rows: both sides, since 0 * inf is no 0.
            row = start + whole
            inside = (row + tl.arange(0, BK) < end)[:, None]
            a = tl.where(inside, x.load([row, first_k]), 0.0)
            b = tl.where(inside, dy.load([row, first_n]), 0.0)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    else:
        ks, ns = first_k + tl.arange(0, BM), first_n + tl.arange(0, BN)
        for row in range(start, end, BK):
            rows = row + tl.arange(0, BK)
            at = rows.to(tl.int64)
            mask_a = (ks < inner)[:, None] & (rows < end)[None, :]
            mask_b = (rows < end)[:, None] & (ns < outer)[None, :]
            a = tl.load(x + at[None, :] * stride_x + ks[:, None], mask=mask_a, other=0.0)
            b = tl.load(dy + at[:, None] * stride_dy + ns[None, :], mask=mask_b, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_dw(
    dw, acc, group, first_k, first_n, inner, outer, BM: tl.constexpr, BN: tl.constexpr, ACCUMULATE: tl.constexpr
):  # fmt: skip
    """Writes or adds a tile of a group."""
    ks = first_k + tl.arange(0, BM)
    out = dw + (group.to(tl.int64) * inner + ks.to(tl.int64)[:, None]) * outer
    halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)).split()
    # One half at a time: the sum and all that is added to it do not fit into the registers together.
    _store_half(out, halves[0], ks, first_n + tl.arange(0, BN // 2), inner, outer, ACCUMULATE)
    _store_half(out, halves[1], ks, first_n + BN // 2 + tl.arange(0, BN // 2), inner, outer, ACCUMULATE)


@triton.jit
def _store_half(out, acc, ks, ns, inner, outer, ACCUMULATE: tl.constexpr):
    mask = (ks < inner)[:, None] & (ns < outer)[None, :]
    out += ns[None, :]
    if ACCUMULATE:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)
