"""Kernels in plain torch, shared by the CPU and CUDA; each device overrides what it does better.

Grouped matmuls use torch's own grouped_mm where it exists (torch 2.10 and later on every device) and accepts the
operands, else a loop of ``mm`` into slices of one output. On a CPU the two differ by 10 to 20 % for tiny
groups and not at all for large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device import device_of
from fluid_npu.device.kernels.activations import ActivationProbs
from fluid_npu.device.kernels.base import Kernels, RowLayout
from fluid_npu.device.kernels.groups import Groups, ends_of
from fluid_npu.device.kernels.payload_tail import payload_width, read_tail, write_tail
from fluid_npu.device.kernels.routed import ChunkOrder, RoutedRows, bag_offsets

_native_grouped_mm = getattr(F, "grouped_mm", None)
_HALVES = (torch.bfloat16, torch.float16)


class TorchKernels(Kernels):
    """Correct on every device torch supports; see ``Kernels`` for the contracts."""

    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int], trans_w: bool = False) -> Tensor:
        if trans_w:
            w_LKN = w_LKN.transpose(1, 2)
        if _native_accepts(x_RK, w_LKN):
            return _native_grouped_mm(x_RK, w_LKN, offs=ends_of(counts_L, x_RK.device, torch.int32))
        return _loop_grouped_mm(x_RK, w_LKN, counts_L)

    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> Tensor:
        x_KR = x_RK.t()
        if _native_accepts(x_KR, dy_RN):
            return _native_grouped_mm(x_KR, dy_RN, offs=ends_of(counts_L, x_RK.device, torch.int32))
        return _loop_grouped_dw(x_RK, dy_RN, counts_L)

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> None:
        if x_RK.dtype == main_grad_LKN.dtype:
            for grad, x, dy in _groups(main_grad_LKN, x_RK, dy_RN, counts_L):
                grad.addmm_(x.t(), dy)
        else:
            main_grad_LKN.add_(self.grouped_dw(x_RK, dy_RN, counts_L))

    def dense_dw_add_(self, main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
        if x_RK.dtype != dy_RN.dtype:  # a router may compute above the dtype of its input
            wider = torch.promote_types(x_RK.dtype, dy_RN.dtype)
            x_RK, dy_RN = x_RK.to(wider), dy_RN.to(wider)
        if x_RK.dtype == main_grad_NK.dtype:
            main_grad_NK.addmm_(dy_RN.t(), x_RK)
        else:
            main_grad_NK.add_(dy_RN.t() @ x_RK)

    def wide_mm_backward(
        self, dy_RN: Tensor, x_RK: Tensor, w_NK: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        dx = (dy_RN @ w_NK.to(dy_RN.dtype)).to(x_RK.dtype) if wanted[0] else None
        return dx, (dy_RN.t() @ x_RK.to(dy_RN.dtype)).to(w_NK.dtype) if wanted[1] else None

    def wide_mm(self, x_RK: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(x_RK.to(dtype), w_NK.to(dtype))

    def permute(self, x_TH: Tensor, layout: RowLayout) -> Tensor:
        return x_TH.index_select(0, layout.token_of_row)

    def unpermute(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        # One bag a token; it walks its rows in order. detach: the forward-only variant is faster.
        return torch.embedding_bag(x_NH.detach(), layout.row_of_pair, layout.bag_offsets, False, 0)[0]

    def sum_rows(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        return self.unpermute(x_NH, layout)  # a GPU's bags, and fused sums, add in fp32 already

    def routed_rows(self, map_TE: Tensor, num_rows: int | None, uniform_topk: int | None) -> RoutedRows:
        num_tokens, num_experts = map_TE.shape
        expert_of_row, token_of_row = true_positions(map_TE.t(), num_rows)
        sorted_tokens, row_of_pair = torch.sort(token_of_row, stable=True)
        return RoutedRows(
            token_of_row=token_of_row,
            row_of_pair=row_of_pair,
            bag_offsets=bag_offsets(sorted_tokens, num_tokens, uniform_topk),
            pair_index=torch.add(expert_of_row, token_of_row, alpha=num_experts),
        )

    def chunk_order(self, counts_CL: Tensor, host_CL: Tensor) -> ChunkOrder:
        both = torch.from_numpy(np.stack(_chunk_order(host_CL.numpy())))
        rows, inverse = device_of(counts_CL).from_host(both, counts_CL.device)
        return ChunkOrder(rows, inverse)

    def pack_tokens(self, x_TH: Tensor, probs_TE: Tensor, layout: RowLayout) -> Tensor:
        hidden = x_TH.shape[1]
        payload = x_TH.new_empty(layout.token_of_row.shape[0], payload_width(hidden, x_TH.dtype))
        torch.index_select(x_TH, 0, layout.token_of_row, out=payload[:, :hidden])
        write_tail(payload, hidden, torch.take(probs_TE, layout.pair_index))
        return payload

    def sum_payload(
        self, payload_NW: Tensor, hidden: int, wire: torch.dtype, layout: RowLayout
    ) -> tuple[Tensor, Tensor]:
        dx_TH = self.unpermute(payload_NW[:, :hidden].contiguous(), layout)
        dp_N = read_tail(payload_NW, hidden, wire)
        # Every (token, expert) has at most one row: a plain write, no sum.
        dprobs = dp_N.new_zeros(layout.num_tokens * layout.num_experts)
        return dx_TH, dprobs.scatter_(0, layout.pair_index, dp_N).view(layout.num_tokens, layout.num_experts)

    def unpack_rows(
        self, payload_RW: Tensor, hidden: int, wire: torch.dtype, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ordered = payload_RW if rows is None else payload_RW.index_select(0, rows)
        return ordered[:, :hidden], read_tail(ordered, hidden, wire)

    def pack_rows(self, x_RH: Tensor, p_R: Tensor, rows: Tensor | None) -> Tensor:
        hidden = x_RH.shape[1]
        payload = x_RH.new_empty(x_RH.shape[0], payload_width(hidden, x_RH.dtype))
        if rows is None:
            payload[:, :hidden] = x_RH
        else:
            payload[:, :hidden].index_copy_(0, rows, x_RH)
            p_R = torch.empty_like(p_R).index_copy_(0, rows, p_R)
        write_tail(payload, hidden, p_R)
        return payload

    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor:
        h0, h1 = h_R2F.chunk(2, dim=-1)
        return F.silu(h0).mul_(h1).mul_(p_R.unsqueeze(-1))  # a wider p is not rounded: mul_ promotes inside

    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        dh, dp, p_R1 = torch.empty_like(h_R2F), torch.empty_like(p_R), p_R.unsqueeze(-1)
        rows = da_RF.shape[0]
        step = self._swiglu_rows_at_once(rows, da_RF.shape[1])
        for start in range(0, rows, step):
            block = slice(start, start + step)
            _swiglu_grad_into(dh[block], dp[block], da_RF[block], h_R2F[block], p_R1[block])
        return dh, dp

    def _swiglu_rows_at_once(self, rows: int, width: int) -> int:
        """A CPU takes blocks that stay in its cache; a GPU all rows."""
        return max(rows, 1)

    def activation_probs(
        self, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> Tensor:
        return (activation.plain(h) * p_R.unsqueeze(-1)).to(h.dtype)

    def activation_probs_grad(
        self, da_RF: Tensor, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        """The bits that autograd gives, without the products of its forward."""
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            plain = activation.plain(h)
        da = da_RF.to(torch.promote_types(plain.dtype, p_R.dtype))
        (dh,) = torch.autograd.grad(plain, h, (da * p_R.unsqueeze(-1)).to(plain.dtype))
        return dh, (da * plain.detach()).sum(-1).to(p_R.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (wide * rstd).mul_(gamma).to(x.dtype), rstd

    def rms_norm_grad(self, dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x.shape[-1]
        dy_RH, x_RH, gamma_H = _wide(dy).reshape(-1, hidden), _wide(x).reshape(-1, hidden), _wide(gamma)
        rstd_R1 = rstd.reshape(-1, 1)
        scratch = dy_RH * x_RH
        dgamma = torch.mv(scratch.t(), rstd_R1.view(-1))
        pull_R1 = torch.mv(scratch, gamma_H).unsqueeze_(-1).mul_(rstd_R1.pow(3)).div_(-hidden)
        dx = torch.mul(dy_RH, gamma_H, out=scratch).mul_(rstd_R1).addcmul_(x_RH, pull_R1)
        return dx.view(x.shape).to(x.dtype), dgamma.to(gamma.dtype)


def _swiglu_grad_into(dh: Tensor, dp: Tensor, da: Tensor, h: Tensor, p_R1: Tensor) -> None:
    (h0, h1), (dh0, dh1) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
    h0 = _wide(h0)  # half precision is computed in fp32, with two temporaries and no more
    scratch = F.silu(h0).mul_(da)
    torch.mul(scratch, p_R1, out=dh1)
    dp.copy_(scratch.mul_(h1).sum(-1))
    if dh.dtype == h0.dtype:
        torch.mul(da, h1, out=scratch).mul_(p_R1)
        torch.ops.aten.silu_backward.grad_input(scratch, h0, grad_input=dh0)
    else:
        scratch.copy_(da).mul_(h1).mul_(p_R1)
        dh0.copy_(torch.ops.aten.silu_backward.grad_input(scratch, h0, grad_input=scratch))


def sum_widened(kernels: Kernels, x_NH: Tensor, layout: RowLayout) -> Tensor:
    """``sum_rows`` of a device whose ``unpermute`` rounds half precision after every row."""
    if x_NH.dtype in _HALVES:
        return kernels.unpermute(x_NH.float(), layout).to(x_NH.dtype)
    return kernels.unpermute(x_NH, layout)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


def _native_accepts(a: Tensor, b: Tensor) -> bool:
    """torch's grouped_mm wants fp32 or bf16, no empty operand, and rows aligned to 16 bytes."""
    if _native_grouped_mm is None or a.dtype not in (torch.float32, torch.bfloat16) or a.dtype != b.dtype:
        return False
    return _aligned(a) and _aligned(b)


def _aligned(x: Tensor) -> bool:
    row, column = x.stride(-2), x.stride(-1)
    leading, length = (row, x.shape[-1]) if column == 1 else (column, x.shape[-2])
    whole = min(row, column) == 1 and leading >= length and leading * x.element_size() % 16 == 0
    return whole and x.numel() > 0 and x.data_ptr() % 16 == 0


def _loop_grouped_mm(x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int]) -> Tensor:
    y_RN = x_RK.new_empty(x_RK.shape[0], w_LKN.shape[2])
    for w, x, y in _groups(w_LKN, x_RK, y_RN, counts_L):
        torch.mm(x, w, out=y)
    return y_RN


def _loop_grouped_dw(x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> Tensor:
    make = x_RK.new_zeros if 0 in counts_L else x_RK.new_empty
    dw_LKN = make(len(counts_L), x_RK.shape[1], dy_RN.shape[1])
    for dw, x, dy in _groups(dw_LKN, x_RK, dy_RN, counts_L):
        torch.mm(x.t(), dy, out=dw)
    return dw_LKN


def _groups(
    per_group_L: Tensor, a_R: Tensor, b_R: Tensor, counts_L: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(entry, rows of a, rows of b) of every group that has rows."""
    counts = list(counts_L)
    parts = zip(counts, per_group_L.unbind(0), a_R.split(counts), b_R.split(counts), strict=True)
    return [(entry, a, b) for count, entry, a, b in parts if count]


def true_positions(map_ET: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """(expert, token) of every True, by expert and then token; ``rows`` is how many, if known."""
    if map_ET.device.type != "cpu" and rows is not None:
        return first_positions_by_sort(map_ET, rows)
    expert, token = map_ET.nonzero().unbind(1)
    return expert, token.contiguous()


def first_positions_by_sort(map_ET: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same when the number of rows is known: the host need not wait for a size, as nonzero makes it."""
    num_tokens = map_ET.shape[1]
    flat = torch.sort(map_ET.reshape(-1).to(torch.int8), descending=True, stable=True)[1][:rows]
    return torch.div(flat, num_tokens, rounding_mode="floor"), flat % num_tokens


def _chunk_order(counts_CL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows come in chunks by (source, expert); gives the order by (expert, source) and its inverse."""
    counts = counts_CL.T.reshape(-1)
    ends = counts_CL.cumsum().reshape(counts_CL.shape)
    starts = (ends - counts_CL).T.reshape(-1)
    place = np.arange(counts.sum())
    rows = place + np.repeat(starts - (counts.cumsum() - counts), counts)
    inverse = np.empty_like(rows)
    inverse[rows] = place
    return rows, inverse
