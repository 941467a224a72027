"""The weight gradient of rows in several pieces, added to fp32 by one launch that reads each piece where it lies.

Every program computes one tile of the result: first over the group's rows of the first piece, then over those of the
second, and so on, in one sum, and adds it once. Shapes: R rows of a piece, K inner and N outer width, L groups, BM x BN
the tile of K x N, BK the step along the rows.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.triton_grouped_gemm import (
    Tiles,
    _descriptor,
    _precision,
    _store_dw,
    _sum_of_products,
    _swizzled,
)

MAX_PIECES = 4


def grouped_dw_pieces_(dw_LKN: Tensor, pieces: Sequence[tuple[Tensor, Tensor, Tensor]], tiles: Tiles) -> None:
    """Adds x^T dy of each group, over the rows of all pieces, to the contiguous fp32 ``dw_LKN``.

    The entry of a group without rows is neither read nor written.

    Args:
        dw_LKN: the sum.
        pieces: up to ``MAX_PIECES`` of [R, K] rows x, [R, N] rows dy, both with rows, and where each group ends, [L].
        tiles: the tile shapes; always as many programs as tiles.
    """
    groups, inner, outer = dw_LKN.shape
    if dw_LKN.numel() == 0:
        return
    operands: list[Any] = []
    strides: list[int] = []
    for x, dy, ends in pieces:
        described = (_descriptor(x, [tiles.bk, tiles.bm]), _descriptor(dy, [tiles.bk, tiles.bn]))
        operands += [*(described if tiles.described else (x, dy)), ends]
        strides += [x.stride(0), dy.stride(0)]
    missing = MAX_PIECES - len(pieces)
    programs = groups * triton.cdiv(inner, tiles.bm) * triton.cdiv(outer, tiles.bn)
    _grouped_dw_pieces[(programs,)](
        *operands, *[None] * (3 * missing), dw_LKN, inner, outer, *strides, *[0] * (2 * missing),
        PIECES=len(pieces), BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, SWIZZLE=tiles.swizzle,
        DESCRIBED=tiles.described, PRECISION=_precision(pieces[0][0]),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _grouped_dw_pieces(
    x0, dy0, ends0, x1, dy1, ends1, x2, dy2, ends2, x3, dy3, ends3,
    dw, inner, outer, stride_x0, stride_dy0, stride_x1, stride_dy1, stride_x2, stride_dy2, stride_x3, stride_dy3,
    PIECES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(inner, BM), tl.cdiv(outer, BN)
    tile = tl.program_id(0)
    group = tile // (blocks_m * blocks_n)
    block_m, block_n = _swizzled(tile % (blocks_m * blocks_n), blocks_m, blocks_n, SWIZZLE)
    first_k, first_n = block_m * BM, block_n * BN
    start0, end0 = _rows_of(ends0, group)
    start1, end1 = _rows_of(ends1, group)
    rows = end0 - start0 + end1 - start1
    if PIECES > 2:
        start2, end2 = _rows_of(ends2, group)
        rows += end2 - start2
    if PIECES > 3:
        start3, end3 = _rows_of(ends3, group)
        rows += end3 - start3
    if rows > 0:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = _sum_of_products(
            acc, x0, dy0, start0, end0, first_k, first_n, inner, outer, stride_x0, stride_dy0,
            BM, BN, BK, DESCRIBED, PRECISION,
        )  # fmt: skip
        acc = _sum_of_products(
            acc, x1, dy1, start1, end1, first_k, first_n, inner, outer, stride_x1, stride_dy1,
            BM, BN, BK, DESCRIBED, PRECISION,
        )  # fmt: skip
        if PIECES > 2:
            acc = _sum_of_products(
                acc, x2, dy2, start2, end2, first_k, first_n, inner, outer, stride_x2, stride_dy2,
                BM, BN, BK, DESCRIBED, PRECISION,
            )  # fmt: skip
        if PIECES > 3:
            acc = _sum_of_products(
                acc, x3, dy3, start3, end3, first_k, first_n, inner, outer, stride_x3, stride_dy3,
                BM, BN, BK, DESCRIBED, PRECISION,
            )  # fmt: skip
        _store_dw(dw, acc, group, first_k, first_n, inner, outer, BM, BN, True)


@triton.jit
def _rows_of(ends, group):
    """The first row of a group and the one behind its last."""
    end = tl.load(ends + group).to(tl.int32)
    start = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    return start, end
