"""Kernels of an NVIDIA GPU: Triton where it passed its check, cuBLAS and torch elsewhere; grouped matmuls by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fluid_npu.device.kernels.activations import SWIGLU, ActivationProbs
from fluid_npu.device.kernels.base import OnceKernels, RowLayout, StaticKernels
from fluid_npu.device.kernels.beside import is_beside
from fluid_npu.device.kernels.gemm_chooser import GemmChooser
from fluid_npu.device.kernels.gemm_forms import GemmCall, add_product_, bf16_terms, call_of_pieces, fuses_wide_mm
from fluid_npu.device.kernels.groups import DeviceRows, Groups
from fluid_npu.device.kernels.known_rows import ExpertKernels, KnownRows
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.device.kernels.routed import ChunkOrder, RoutedRows, Slots
from fluid_npu.device.kernels.row_kernels import (
    RowKernels,
    activated,
    activated_grad,
    gather,
    gathered_sum,
    summed_payload,
)
from fluid_npu.device.kernels.torch_attention import MEGATRON, TORCH, torch_attention
from fluid_npu.device.kernels.torch_attention_blocks import torch_attention_blocks
from fluid_npu.device.kernels.torch_kernels import TorchKernels
from fluid_npu.device.kernels.triton_support import load

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CudaKernels(TorchKernels):
    """``TorchKernels`` with fused launches, and with grouped matmuls in the form that is fastest for their class."""

    one_wait_for_counts = True
    rows_on_device = True

    def __init__(self, chooser: GemmChooser | None = None, rows: RowKernels | None = None) -> None:
        self.chooser = chooser if chooser is not None else GemmChooser()
        self._torch = TorchKernels()
        self._rows = rows if rows is not None else RowKernels(self._torch)
        attentions = ("auto", MEGATRON, "cudnn", "flash", "efficient", TORCH)
        self.attention, self.attention_blocks = torch_attention(attentions), torch_attention_blocks(attentions)

    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Groups, trans_w: bool = False) -> Tensor:
        call = GemmCall(op="mm_t" if trans_w else "mm", a=x_RK, b=w_LKN, counts=counts_L)
        if not _has_work(call):
            return self._plain(counts_L).grouped_mm(x_RK, w_LKN, counts_L, trans_w)
        product = self.chooser.compute(call)
        assert product is not None
        return product

    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> Tensor:
        call = GemmCall(op="dw", a=x_RK, b=dy_RN, counts=counts_L)
        if not _has_work(call):
            return self._plain(counts_L).grouped_dw(x_RK, dy_RN, counts_L)
        dw = self.chooser.compute(call)
        assert dw is not None
        return dw

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> None:
        call = GemmCall(op="dw_add", a=x_RK, b=dy_RN, counts=counts_L, out=main_grad_LKN)
        if not _has_work(call):
            return self._plain(counts_L).grouped_dw_add_(main_grad_LKN, x_RK, dy_RN, counts_L)
        self.chooser.compute(call)
        return None

    def grouped_dw_pieces_add_(self, main_grad_LKN: Tensor, parts: Sequence[DWPart], rows: PieceRows) -> None:
        call = call_of_pieces(main_grad_LKN, parts, rows)
        if call is None:
            return
        if not call.more:  # the others have no rows
            self.grouped_dw_add_(main_grad_LKN, call.a, call.b, call.counts)
        elif _has_work(call):
            self.chooser.compute(call)
        else:
            super().grouped_dw_pieces_add_(main_grad_LKN, parts, rows)

    def _plain(self, counts_L: Groups | None) -> ExpertKernels:
        """Plain torch, for which the host reads the counts where only the device knows them."""
        if isinstance(counts_L, DeviceRows):
            return KnownRows(self._torch)
        return cast(ExpertKernels, self._torch)

    def dense_dw_add_(self, main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
        if x_RK.dtype != dy_RN.dtype or x_RK.shape[0] == 0:
            return super().dense_dw_add_(main_grad_NK, x_RK, dy_RN)
        if is_beside() and main_grad_NK.is_contiguous():
            return self.grouped_dw_add_(main_grad_NK.unsqueeze(0), dy_RN, x_RK, [x_RK.shape[0]])  # of one group
        return add_product_(main_grad_NK, dy_RN.t(), x_RK)

    def wide_mm(self, x_RK: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype != torch.float32 or x_RK.dtype != w_NK.dtype or not fuses_wide_mm(x_RK.dtype).value:
            return super().wide_mm(x_RK, w_NK, dtype)
        # Products of bf16 are exact in fp32, and tensor cores add them up in fp32.
        return torch.mm(x_RK, w_NK.t(), out_dtype=torch.float32)

    def wide_mm_backward(
        self, dy_RN: Tensor, x_RK: Tensor, w_NK: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """As ``wide_mm``: fp32 is the sum of three bf16, so three products of bf16 stand for one of fp32."""
        half = x_RK.dtype
        of_bf16 = half == w_NK.dtype == torch.bfloat16
        if dy_RN.dtype != torch.float32 or not of_bf16 or not fuses_wide_mm(half).value:
            return super().wide_mm_backward(dy_RN, x_RK, w_NK, wanted)
        terms_R3N = bf16_terms(dy_RN).view(dy_RN.shape[0], -1)
        dx = torch.mm(terms_R3N, w_NK.repeat(3, 1)) if wanted[0] else None
        if not wanted[1]:
            return dx, None
        dw_3NK = torch.mm(terms_R3N.t(), x_RK, out_dtype=torch.float32).view(3, *w_NK.shape)
        return dx, dw_3NK.sum(0).to(half)

    def permute(self, x_TH: Tensor, layout: RowLayout) -> Tensor:
        return gather(x_TH, layout) if self._rows.takes("permute", x_TH) else super().permute(x_TH, layout)

    def unpermute(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        return gathered_sum(x_NH, layout) if self._rows.takes("unpermute", x_NH) else super().unpermute(x_NH, layout)

    def routed_rows(self, map_TE: Tensor, num_rows: int | None, uniform_topk: int | None) -> RoutedRows:
        if num_rows is None or not self._rows.routes(map_TE):
            return super().routed_rows(map_TE, num_rows, uniform_topk)
        rows: RoutedRows = load("triton_routing").routed_rows(map_TE, num_rows)
        return rows

    def counts_and_rows(self, map_TE: Tensor, num_rows: int | None) -> tuple[Tensor, RoutedRows | None]:
        if num_rows is None or not self._rows.routes(map_TE):
            return super().counts_and_rows(map_TE, num_rows)
        rows: RoutedRows = load("triton_routing").routed_rows(map_TE, num_rows)
        assert rows.counts_E is not None
        return rows.counts_E, rows

    def once_rows(self, map_TE: Tensor, groups: int, most: int) -> RoutedRows | None:
        if not self._rows.routes(map_TE):
            return None
        rows: RoutedRows = load("triton_once").once_rows(map_TE, groups, most)
        return rows

    def bounded_rows(
        self, map_TE: Tensor, room_G: Tensor, rows: int, told: Tensor, masked: bool
    ) -> tuple[RoutedRows, Tensor] | None:
        if not self._rows.bounds(map_TE):
            return None
        found: tuple[RoutedRows, Tensor]
        found = load("triton_bounded").bounded_rows(map_TE, room_G, rows, told, masked)
        return found

    def once(self, x: Tensor, slots: Slots) -> OnceKernels | None:
        kernels: Any = load("triton_once") if _tail_fits(x, slots) and self._rows.takes("once", x) else None
        found: OnceKernels | None = kernels
        return found

    def static(self, x: Tensor, slots: Slots) -> StaticKernels | None:
        kernels: Any = load("triton_static") if _tail_fits(x, slots) and self._rows.takes("static", x) else None
        found: StaticKernels | None = kernels
        return found

    def chunk_order(self, counts_CL: Tensor, host_CL: Tensor) -> ChunkOrder:
        if counts_CL.stride(1) != 1:
            counts_CL = counts_CL.contiguous()
        if not self._rows.orders(counts_CL):
            return super().chunk_order(counts_CL, host_CL)
        order: ChunkOrder = load("triton_routing").chunk_order(counts_CL, int(host_CL.numpy().sum()))
        return order

    def pack_tokens(self, x_TH: Tensor, probs_TE: Tensor, layout: RowLayout) -> Tensor:
        if not (probs_TE.is_contiguous() and self._rows.packs(x_TH.shape[1], probs_TE.dtype, x_TH)):
            return super().pack_tokens(x_TH, probs_TE, layout)
        module = load("triton_payload")
        payload: Tensor = module.pack_tokens(x_TH, probs_TE, layout.token_of_row, layout.pair_index)
        return payload

    def sum_payload(
        self, payload_NW: Tensor, hidden: int, wire: torch.dtype, layout: RowLayout
    ) -> tuple[Tensor, Tensor]:
        if not self._rows.packs(hidden, wire, payload_NW):
            return super().sum_payload(payload_NW, hidden, wire, layout)
        return summed_payload(payload_NW, hidden, wire, layout)

    def unpack_rows(
        self, payload_RW: Tensor, hidden: int, wire: torch.dtype, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self._rows.packs(hidden, wire, payload_RW):
            return super().unpack_rows(payload_RW, hidden, wire, rows)
        unpacked: tuple[Tensor, Tensor] = load("triton_payload").unpack_rows(payload_RW, hidden, wire, rows)
        return unpacked

    def pack_rows(self, x_RH: Tensor, p_R: Tensor, rows: Tensor | None) -> Tensor:
        if not self._rows.packs(x_RH.shape[1], p_R.dtype, x_RH):
            return super().pack_rows(x_RH, p_R, rows)
        payload: Tensor = load("triton_payload").pack_rows(x_RH, p_R, rows)
        return payload

    def to_e4m3(self, x_TH: Tensor) -> Tensor:
        if not self._rows.takes("e4m3", x_TH):
            return super().to_e4m3(x_TH)
        coded: Tensor = load("triton_e4m3").to_e4m3(x_TH)
        return coded

    def from_e4m3(self, coded_RW: Tensor, hidden: int) -> Tensor:
        if not self._rows.takes("e4m3", coded_RW):
            return super().from_e4m3(coded_RW, hidden)
        x_RH: Tensor = load("triton_e4m3").from_e4m3(coded_RW, hidden)
        return x_RH

    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor:
        if not self._rows.activates(SWIGLU, h_R2F):
            return self._plain(counts_L).swiglu_probs(h_R2F, p_R, counts_L)
        return activated(SWIGLU, h_R2F, p_R, _bound(counts_L, h_R2F))

    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._rows.activates(SWIGLU, h_R2F, da_RF):
            return self._plain(counts_L).swiglu_probs_grad(da_RF, h_R2F, p_R, counts_L)
        return activated_grad(SWIGLU, da_RF, h_R2F, p_R, _bound(counts_L, h_R2F))

    def activation_probs(
        self, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> Tensor:
        if not self._rows.activates(activation, h):
            # With ``DeviceRows`` of all rows that there is room for: each is by itself, and the host waits for nothing.
            return super().activation_probs(h, p_R, activation)
        return activated(activation, h, p_R, _bound(counts_L, h))

    def activation_probs_grad(
        self, da_RF: Tensor, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._rows.activates(activation, h, da_RF):
            return super().activation_probs_grad(da_RF, h, p_R, activation)
        return activated_grad(activation, da_RF, h, p_R, _bound(counts_L, h))

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not self._normalises(x, gamma):
            return super().rms_norm(x, gamma, eps)
        normed: tuple[Tensor, Tensor] = load("triton_rms_norm").rms_norm(x, gamma, eps)
        return normed

    def rms_norm_grad(self, dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        if not self._normalises(x, gamma):
            return super().rms_norm_grad(dy, x, gamma, rstd)
        grads: tuple[Tensor, Tensor] = load("triton_rms_norm").rms_norm_grad(dy.contiguous(), x, gamma, rstd)
        return grads

    def _normalises(self, x: Tensor, gamma: Tensor) -> bool:
        fits = x.is_contiguous() and gamma.is_contiguous() and 0 < x.shape[-1] <= 16384 and gamma.dtype in _DTYPES
        return fits and self._rows.takes("rms_norm", x)


def _has_work(call: GemmCall) -> bool:
    """Whether there is anything to multiply, of one dtype; the rest is torch's own and takes no choice."""
    return call.multiply_adds > 0 and call.a.dtype == call.b.dtype and call.a.dtype in _DTYPES


def _tail_fits(x: Tensor, slots: Slots) -> bool:
    """Whether the tail of a payload row of tokens like x can be seen as integers of the probabilities' size."""
    return slots.wire.itemsize >= x.element_size() and x.shape[1] * x.element_size() % slots.wire.itemsize == 0


def _bound(counts_L: Groups | None, x: Tensor) -> Tensor | None:
    """[L] where each group ends, if x has rows behind the last one."""
    return counts_L.ends(x.device, torch.int32) if isinstance(counts_L, DeviceRows) else None
