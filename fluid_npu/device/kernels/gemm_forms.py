"""The forms that a grouped matmul can take on a GPU: each says whether it fits a call, and computes it.

``loop``: one cuBLAS call a group. ``grouped_mm``: torch's own. ``batched``: one batched cuBLAS call, for groups of
equal size. ``triton-...``: our kernel with those tiles. Where only the device knows the rows of each group, ``loop``
and ``batched`` do not fit; ``loop`` is left where nothing does. A dW of rows in several pieces (``kernels.pieces``)
``triton-...`` reads where they lie; ``joined`` copies them together first, for whatever form their dW then takes.
Shapes: R rows, K inner, N outer, L groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.beside import is_beside
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows, Groups, ends_of, rows_in
from fluid_npu.device.kernels.known_rows import known, whole
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.device.kernels.torch_kernels import (
    _groups,
    _loop_grouped_dw,
    _loop_grouped_mm,
    _native_accepts,
    _native_grouped_mm,
)
from fluid_npu.device.kernels.triton_support import load, triton_on

_HALVES = (torch.bfloat16, torch.float16)
_MAX_FP32_TILE = 64 * 64
_MAX_PIECES = 4  # as triton_dw_pieces
_IN_PIECES = "the rows are in several pieces"
_HOST_ROWS = "it wants the rows of each group on the host, and only the device knows them"


@dataclass(frozen=True, kw_only=True)
class GemmCall:
    """One grouped matmul; ``op`` is ``mm`` (x w), ``mm_t`` (x w^T, w as [L, N, K]), ``dw`` (x^T dy) or ``dw_add``.

    ``a`` is [R, K]; ``b`` the weight for ``mm`` and ``mm_t``, else dy [R, N]; ``out`` the main_grad of ``dw_add``.
    Of ``dw_add`` alone: ``more`` are further pieces, whose rows follow these, and ``join`` copies all of them together.
    """

    op: str
    a: Tensor
    b: Tensor
    counts: Groups
    out: Tensor | None = None
    more: tuple[DWPart, ...] = ()
    join: Callable[[], Iterable[DWPart]] | None = None
    beside: bool = field(default_factory=is_beside)
    """Whether it runs beside an AllToAll."""

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """(L, K, N)."""
        if self.op in ("dw", "dw_add"):
            return len(self.counts), self.a.shape[1], self.b.shape[1]
        groups, inner, outer = self.b.shape
        return (groups, outer, inner) if self.op == "mm_t" else (groups, inner, outer)

    @property
    def rows(self) -> int:
        """R of all pieces, or what is expected of it."""
        return rows_in(self.counts, self.a) + sum(rows_in(part.counts, part.x) for part in self.more)

    @property
    def multiply_adds(self) -> int:
        """R * K * N."""
        _, inner, outer = self.weight_shape
        return self.rows * inner * outer

    @property
    def pieces(self) -> list[GemmCall]:
        """The same of each piece alone."""
        first = replace(self, more=(), join=None)
        return [first, *(replace(first, a=part.x, b=part.dy, counts=part.counts) for part in self.more)]

    def negated(self) -> GemmCall:
        """The same with a of the other sign."""
        more = tuple(part._replace(x=-part.x) for part in self.more)
        join = self.join
        turned = None if join is None else lambda: (part._replace(x=-part.x) for part in join())
        return replace(self, a=-self.a, more=more, join=turned)

    def on_host(self) -> GemmCall:
        """The same call over the rows in use, whose numbers the host then knows; it waits for them."""
        if not isinstance(self.counts, DeviceRows):
            return self
        counts, buffers = known(self.counts, self.a, *((self.b,) if self.op in ("dw", "dw_add") else ()))
        return replace(self, counts=counts, a=buffers[0], b=buffers[-1] if len(buffers) > 1 else self.b)

    def weight(self) -> Tensor:
        """[L, K, N], a view."""
        return self.b.transpose(1, 2) if self.op == "mm_t" else self.b

    def ends(self) -> Tensor:
        """[L] int32 on the device: where each group ends."""
        return ends_of(self.counts, self.a.device, torch.int32)


def call_of_pieces(main_grad_LKN: Tensor, parts: Sequence[DWPart], rows: PieceRows) -> GemmCall | None:
    """The dW over rows in pieces, of those that have some; None where none has."""
    filled = [
        DWPart(part.x, part.dy, counts) for part, counts in zip(parts, rows.counts, strict=True) if part.x.shape[0]
    ]
    if not filled:
        return None
    (x, dy, counts), *more = filled
    join = (lambda: rows.joined(parts)) if more else None
    return GemmCall(op="dw_add", a=x, b=dy, counts=counts, out=main_grad_LKN, more=tuple(more), join=join)


class Loop:
    """One cuBLAS call for each group that has rows."""

    name = "loop"

    def why_not(self, call: GemmCall) -> str | None:
        """What keeps it from this call, or None."""
        return _HOST_ROWS if isinstance(call.counts, DeviceRows) else None

    def run(self, call: GemmCall) -> Tensor | None:
        """The result, or None where it is added to ``call.out``."""
        if call.more:
            for piece in call.pieces:
                self.run(piece)
            return None
        capacity, call = call.a.shape[0], call.on_host()
        counts = call.counts
        assert not isinstance(counts, DeviceRows), "the host knows them now"
        if call.op in ("mm", "mm_t"):
            y = _loop_grouped_mm(call.a, call.weight(), counts)
            return y if y.shape[0] == capacity else whole(y, capacity)
        if call.out is None:
            return _loop_grouped_dw(call.a, call.b, counts)
        for grad, x, dy in _groups(call.out, call.a, call.b, counts):
            add_product_(grad, x.t(), dy)
        return None


class Native:
    """torch's grouped_mm; a dW is added in a second pass."""

    name = "grouped_mm"

    def why_not(self, call: GemmCall) -> str | None:
        if call.more:
            return _IN_PIECES
        a = call.a.t() if call.op.startswith("dw") else call.a
        if _native_grouped_mm is None:
            return f"torch {torch.__version__} has no grouped_mm (2.10 has)"
        if not _native_accepts(a, call.weight()):
            return "torch's grouped_mm wants bf16 or fp32 on both sides, no empty operand and rows aligned to 16 bytes"
        if isinstance(call.counts, DeviceRows) and not _native_reads_on_device(call.a):
            return "torch's grouped_mm leaves the sizes on the device only for bf16 on a GPU from Hopper on"
        return None

    def run(self, call: GemmCall) -> Tensor | None:
        a = call.a.t() if call.op.startswith("dw") else call.a
        product: Tensor = _native_grouped_mm(a, call.weight(), offs=call.ends())
        if call.out is None:
            return product
        call.out.add_(product)
        return None


class Batched:
    """One batched product over groups of equal size."""

    name = "batched"

    def why_not(self, call: GemmCall) -> str | None:
        if call.more:
            return _IN_PIECES
        if isinstance(call.counts, DeviceRows):
            return _HOST_ROWS
        if not equal_groups(call.counts) or call.counts[0] == 0:
            return f"batched products want equal groups, these have {min(call.counts)} to {max(call.counts)} rows"
        if call.out is not None and call.out.dtype != call.a.dtype and not fuses_batched_add().value:
            return fuses_batched_add().reason
        return None

    def run(self, call: GemmCall) -> Tensor | None:
        assert not isinstance(call.counts, DeviceRows), "why_not refuses them"
        groups, each = len(call.counts), call.counts[0]
        a = call.a.view(groups, each, -1)
        if call.op in ("mm", "mm_t"):
            product = torch.bmm(a, call.weight())
            return product.view(-1, product.shape[2])
        a, dy = a.transpose(1, 2), call.b.view(groups, each, -1)
        if call.out is None:
            return torch.bmm(a, dy)
        if call.out.dtype == call.a.dtype:
            call.out.baddbmm_(a, dy)
        else:
            torch.baddbmm(call.out, a, dy, out_dtype=torch.float32, out=call.out)
        return None


class Joined:
    """Rows of several pieces put together by group, then what ``compute`` does with them.

    Args:
        compute: adds the dW of rows in one buffer.
    """

    name = "joined"

    def __init__(self, compute: Callable[[GemmCall], Tensor | None]) -> None:
        self._compute = compute

    def why_not(self, call: GemmCall) -> str | None:
        if call.join is None:
            return "the rows are in one buffer"
        return _HOST_ROWS if isinstance(call.counts, DeviceRows) else None

    def run(self, call: GemmCall) -> Tensor | None:
        assert call.join is not None and call.out is not None, "why_not refuses what has no pieces"
        first = 0
        for x, dy, counts in call.join():
            groups = slice(first, first + len(counts))
            if x.shape[0]:
                self._compute(GemmCall(op="dw_add", a=x, b=dy, counts=counts, out=call.out[groups]))
            first = groups.stop
        return None


class TritonForm:
    """Our kernel with tiles of one shape: ``tiles`` are the arguments of ``triton_grouped_gemm.Tiles``."""

    def __init__(self, *tiles: int, described: bool = False, persistent: bool = False, swizzle: int = 8) -> None:
        self._arguments: dict[str, Any] = {"described": described, "persistent": persistent, "swizzle": swizzle}
        self._sizes = tiles
        bm, bn, bk, warps, stages = tiles
        flags = "-tma" * described + "-persistent" * persistent + f"-g{swizzle}" * (swizzle != 8)
        self.name = f"triton-{bm}x{bn}x{bk}-w{warps}-s{stages}{flags}"

    def why_not(self, call: GemmCall) -> str | None:
        if call.more:
            if 1 + len(call.more) > _MAX_PIECES:
                return f"the Triton kernel reads up to {_MAX_PIECES} pieces, these are {1 + len(call.more)}"
            return next((reason for piece in call.pieces if (reason := self.why_not(piece)) is not None), None)
        found = triton_on(call.a.device)
        if not found.value:
            return found.reason
        if call.a.dtype not in (*_HALVES, torch.float32) or call.b.dtype != call.a.dtype:
            return f"the Triton kernel multiplies bf16, fp16 or fp32, not {call.a.dtype} and {call.b.dtype}"
        if call.a.dtype == torch.float32 and self._sizes[0] * self._sizes[1] > _MAX_FP32_TILE:
            return (
                f"tiles of more than {_MAX_FP32_TILE} entries are for bf16 and fp16: fp32 is multiplied entry by entry"
            )
        if call.out is not None and (call.out.dtype != torch.float32 or not call.out.is_contiguous()):
            return "the Triton kernel adds to a contiguous fp32 main_grad"
        rows = (call.a, call.b) if call.op.startswith("dw") else (call.a,)
        if any(x.stride(1) != 1 for x in rows):
            return "the Triton kernel wants rows with unit stride"
        return self._why_not_described(call) if self._arguments["described"] else None

    def _why_not_described(self, call: GemmCall) -> str | None:
        if call.a.dtype not in _HALVES:
            return "tensor descriptors are used for bf16 and fp16 alone"
        inner, step = call.weight_shape[1], self._sizes[2]
        if call.op in ("mm", "mm_t") and not call.b.is_contiguous():
            return "tensor descriptors want contiguous weights"
        if call.op == "mm" and inner % step:
            # A step past K would read the next group's weights, and zeros of x times inf are no zeros.
            return f"tensor descriptors want K = {inner} to be a multiple of {step}"
        reason: str | None = load("triton_grouped_gemm").why_not_described(call.a, call.b)
        return reason

    def run(self, call: GemmCall) -> Tensor | None:
        module = load("triton_grouped_gemm")
        tiles = module.Tiles(*self._sizes, **self._arguments)
        if call.more:
            pieces = [(piece.a, piece.b, piece.ends()) for piece in call.pieces]
            load("triton_dw_pieces").grouped_dw_pieces_(call.out, pieces, tiles)
            return None
        ends = call.ends()
        if call.op in ("mm", "mm_t"):
            table = _row_blocks(module, call, ends, tiles.bm)
            y: Tensor = module.grouped_mm(call.a, call.b, ends, tiles, trans_w=call.op == "mm_t", table=table)
            return y
        if call.out is not None:
            module.grouped_dw_(call.out, call.a, call.b, ends, tiles)
            return None
        dw = call.a.new_empty(call.weight_shape)
        module.grouped_dw_(dw, call.a, call.b, ends, tiles, accumulate=False)
        return dw


Form = Loop | Native | Batched | Joined | TritonForm

_TILES = (
    TritonForm(128, 256, 64, 8, 4, described=True),
    TritonForm(128, 128, 64, 4, 3, described=True),
    TritonForm(128, 128, 64, 8, 3),
    TritonForm(64, 64, 32, 4, 3),
)
FORMS: dict[str, Form] = {form.name: form for form in (Loop(), Native(), Batched(), *_TILES)}


def _native_reads_on_device(a: Tensor) -> bool:
    if not a.is_cuda or a.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(a.device)[0] >= 9


def equal_groups(counts: Groups) -> bool:
    """Whether all groups are known to have as many rows."""
    if isinstance(counts, DeviceRows):
        return False
    return counts.equal if isinstance(counts, GroupRows) else len(set(counts)) == 1


def add_product_(grad: Tensor, a: Tensor, b: Tensor) -> None:
    """grad += a b, inside one matmul where torch can add a half-precision product to an fp32 matrix."""
    if grad.dtype == a.dtype:
        grad.addmm_(a, b)
    elif fuses_dw_add().value and a.dtype in _HALVES and b.dtype == a.dtype and grad.dtype == torch.float32:
        torch.addmm(grad, a, b, out_dtype=torch.float32, out=grad)
    else:
        grad.add_(a @ b)


@cache
def fuses_dw_add() -> Choice[bool]:
    """Whether this torch can add a half-precision product to an fp32 matrix in one call."""
    if "dtype_out" in torch.ops.aten.addmm.overloads():
        return Choice(True, "torch.addmm has out_dtype: dW goes into main_grad without a second pass")
    return Choice(False, f"torch {torch.__version__} has no addmm with out_dtype (2.8 has): dW, then add_")


@cache
def fuses_batched_add() -> Choice[bool]:
    """The same for batches of matrices."""
    if "dtype_out" in torch.ops.aten.baddbmm.overloads():
        return Choice(True, "torch.baddbmm has out_dtype")
    return Choice(False, f"torch {torch.__version__} has no baddbmm with out_dtype (2.8 has)")


@cache
def fuses_wide_mm(dtype: torch.dtype) -> Choice[bool]:
    """Whether this torch multiplies matrices of ``dtype`` into fp32 in one call."""
    if dtype not in _HALVES:
        return Choice(False, f"{dtype} is not half precision")
    if "dtype" in torch.ops.aten.mm.overloads():
        return Choice(True, "torch.mm has out_dtype")
    return Choice(False, f"torch {torch.__version__} has no mm with out_dtype (2.8 has)")


def bf16_terms(x: Tensor) -> Tensor:
    """``[R, 3, N]``: bf16 numbers that add up to fp32 ``[R, N]``, 8 of its 24 bits each, the largest first.

    Of an infinite number the second is no number.
    """
    terms = torch.empty(x.shape[0], 3, x.shape[1], dtype=torch.bfloat16, device=x.device)
    rest = x
    for number in range(3):
        terms[:, number] = rest
        if number < 2:
            rest = rest - terms[:, number]
    return terms


def _row_blocks(module: Any, call: GemmCall, ends: Tensor, bm: int) -> Tensor:
    """The table of row blocks, made once for the grouped matmuls over the same groups."""
    blocks = -(-call.a.shape[0] // bm) + len(call.counts)

    def make() -> Tensor:
        table: Tensor = module.row_blocks(ends, blocks, bm)
        return table

    if not isinstance(call.counts, GroupRows | DeviceRows):
        return make()
    return call.counts.kept(("row blocks", bm, ends.device), make)
