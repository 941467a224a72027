"""The one hardware seam of the maths: what every device computes, without autograd.

Shapes: T tokens, H hidden, F ffn, L local experts (groups), R or N rows, K inner and N outer width of a matmul.
Callers have already validated what they pass; ``counts_L`` are the rows of each group and sum to R; as ``GroupRows``
they cost no copy to the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels import e4m3_rows
from fluid_npu.device.kernels.activations import ActivationProbs
from fluid_npu.device.kernels.attention_blocks import AttentionBlocks
from fluid_npu.device.kernels.fused import AttentionKernels, DifferentiableAttention, RotaryKernels
from fluid_npu.device.kernels.groups import Groups
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.device.kernels.routed import ChunkOrder, RoutedRows, RowIndices, Slots


class RowLayout(Protocol):
    """What permute and unpermute need to know (``ops.permute.PermuteLayout`` is one)."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def pair_index(self) -> Tensor:
        """int64 [N]: position of each row's (token, expert) in a flattened [T, E] tensor; no two are the same."""

    @property
    def pairs_per_token(self) -> int | None:
        """K when every token has exactly K rows, else None."""

    @property
    def token_of_row(self) -> Tensor:
        """int64 [N]: the token that each row copies."""

    @property
    def row_of_pair(self) -> Tensor:
        """int64 [N]: rows sorted by token, ascending within a token."""

    @property
    def bag_offsets(self) -> Tensor:
        """int64 [T]: where each token's rows start in ``row_of_pair``."""

    @property
    def experts_TK(self) -> Tensor | None:
        """int64 [T, K]: the experts of each token, ascending, when K is uniform and rows are not padded."""


class OnceKernels(Protocol):
    """Tokens that go once to a group of experts: what ``triton_once`` has, without autograd. Its docstrings hold."""

    def pack_once(self, x_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, rows: RowIndices, slots: Slots) -> Tensor: ...
    def sum_once(
        self, payload_NW: Tensor, map_TE: Tensor, rows: RowIndices, slots: Slots, most: int
    ) -> tuple[Tensor, Tensor]: ...
    def arrived_rows(self, payload_MW: Tensor, slots: Slots, num_rows: int) -> RoutedRows: ...
    def expand_rows(self, payload_MW: Tensor, rows: RowIndices, slots: Slots) -> tuple[Tensor, Tensor]: ...
    def reduce_rows(self, dx_RH: Tensor, dp_R: Tensor, rows: RowIndices, slots: Slots) -> Tensor: ...


class StaticKernels(Protocol):
    """Tokens that go to every group of experts: what ``triton_static`` has, without autograd. Its docstrings hold."""

    def place_rows(self, payload_MW: Tensor, slots: Slots, capacity: int) -> tuple[Tensor, Tensor]: ...
    def spread_rows(self, rows_MH: Tensor, place_MS: Tensor, capacity: int) -> Tensor: ...
    def expand_rows(
        self, payload_MW: Tensor, place_MS: Tensor, capacity: int, slots: Slots
    ) -> tuple[Tensor, Tensor]: ...
    def sum_rows(self, x_CH: Tensor, place_MS: Tensor) -> Tensor: ...
    def reduce_rows(self, dx_CH: Tensor, dp_C: Tensor, place_MS: Tensor, slots: Slots) -> Tensor: ...


class Kernels(ABC):
    """Implementations return fresh tensors, except those whose name ends in an underscore."""

    one_wait_for_counts: bool = False
    """Every rank is told the counts of all: one wait of the host for all of them costs less than two for its own."""
    rows_on_device: bool = False
    """Operators of experts take ``DeviceRows``; where not, ``known_rows`` reads the counts for them."""
    attention: AttentionKernels | DifferentiableAttention | None = None
    """The device's fused attention; None: Megatron's own, in plain torch, is all there is."""
    attention_blocks: AttentionBlocks | None = None
    """The device's fused attention to blocks of keys, for rings; None as above."""
    rotary: RotaryKernels | None = None
    """The device's fused rotary embedding; None as above."""

    def fuses_norm(self, x: Tensor, gamma: Tensor) -> Choice[bool]:
        """Whether ``rms_norm`` is an operator of the device that takes these; else torch's own norm does as well."""
        return Choice(False, "torch's own RMSNorm: the device has no fused one")

    @abstractmethod
    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int], trans_w: bool = False) -> Tensor:
        """[R, N]: each group's rows times its weight; with ``trans_w`` the weight is given as [L, N, K]."""

    @abstractmethod
    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> Tensor:
        """[L, K, N] in the dtype of x: x^T dy of each group, zero for an empty one."""

    @abstractmethod
    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> None:
        """Adds ``grouped_dw`` to ``main_grad_LKN`` (fp32) in place."""

    def grouped_dw_pieces_add_(self, main_grad_LKN: Tensor, parts: Sequence[DWPart], rows: PieceRows) -> None:
        """Adds the sum of ``grouped_dw`` over pieces, in one pass; each part has the operands of one of ``rows``."""
        first = 0
        for x, dy, counts in rows.joined(parts):
            groups = slice(first, first + len(counts))
            self.grouped_dw_add_(main_grad_LKN[groups], x, dy, counts)  # type: ignore[arg-type]
            first = groups.stop

    @abstractmethod
    def dense_dw_add_(self, main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
        """Adds dy^T x to ``main_grad_NK`` (fp32, layout of nn.Linear) in place."""

    @abstractmethod
    def wide_mm(self, x_RK: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, N]: x w^T with products and sums in ``dtype``, which is wider than theirs."""

    @abstractmethod
    def wide_mm_backward(
        self, dy_RN: Tensor, x_RK: Tensor, w_NK: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dy w in the dtype of x, dy^T x in that of w) with products and sums in the dtype of dy, which is wider.

        Of each None unless ``wanted``.
        """

    @abstractmethod
    def permute(self, x_TH: Tensor, layout: RowLayout) -> Tensor:
        """[N, H]: the token of each row."""

    @abstractmethod
    def unpermute(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        """[T, H]: the sum of each token's rows in ascending row order, without atomics."""

    @abstractmethod
    def sum_rows(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        """As ``unpermute``, with half precision added up in fp32 and rounded once."""

    @abstractmethod
    def routed_rows(self, map_TE: Tensor, num_rows: int | None, uniform_topk: int | None) -> RoutedRows:
        """The rows of a bool map. N = ``num_rows`` where the host knows it; else, and on a CPU, the host waits for it.

        ``uniform_topk`` is K when every token has exactly K rows (not checked).
        """

    def counts_and_rows(self, map_TE: Tensor, num_rows: int | None) -> tuple[Tensor, RoutedRows | None]:
        """([E] rows of each expert, ``routed_rows`` where the same launch made them): counts are wanted first."""
        return map_TE.sum(0), None

    def once_rows(self, map_TE: Tensor, groups: int, most: int) -> RoutedRows | None:
        """Rows by (group, token), one for each token with experts in the group (``triton_once``); None: plain torch."""
        return None

    def bounded_rows(
        self, map_TE: Tensor, room_G: Tensor, rows: int, told: Tensor, masked: bool
    ) -> tuple[RoutedRows, Tensor] | None:
        """Such rows in blocks of a fixed number for each group (``triton_bounded``); None and untold: plain torch."""
        return None

    def once(self, x: Tensor, slots: Slots) -> OnceKernels | None:
        """Fused operators for payloads of tokens like x that go once to each group; None: plain torch."""
        return None

    def static(self, x: Tensor, slots: Slots) -> StaticKernels | None:
        """Fused operators for payloads of tokens like x that go to every group; None: plain torch."""
        return None

    @abstractmethod
    def chunk_order(self, counts_CL: Tensor, host_CL: Tensor) -> ChunkOrder:
        """The order of rows that come by (source, expert) and are wanted by (expert, source).

        Rows of each chunk as int64 [C, L], on the device and, the same numbers, on the host.
        """

    @abstractmethod
    def pack_tokens(self, x_TH: Tensor, probs_TE: Tensor, layout: RowLayout) -> Tensor:
        """[N, W] payload rows (``payload_tail``): the token of each row with its probability, which keeps its bits."""

    @abstractmethod
    def sum_payload(
        self, payload_NW: Tensor, hidden: int, wire: torch.dtype, layout: RowLayout
    ) -> tuple[Tensor, Tensor]:
        """([T, H], [T, E] of dtype ``wire``): ``unpermute`` of the tokens, each probability at its (token, expert)."""

    @abstractmethod
    def unpack_rows(
        self, payload_RW: Tensor, hidden: int, wire: torch.dtype, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """([R, H], [R]): tokens, perhaps strided, and probabilities of payload row ``rows[r]``, or r, at each r."""

    @abstractmethod
    def pack_rows(self, x_RH: Tensor, p_R: Tensor, rows: Tensor | None) -> Tensor:
        """[R, W] payload: row r at ``rows[r]``, a permutation, or at r."""

    def to_e4m3(self, x_TH: Tensor) -> Tensor:
        """[T, W] rows of one byte a number with a scale, in the dtype of x (``e4m3_rows``)."""
        return e4m3_rows.to_e4m3(x_TH)

    def from_e4m3(self, coded_RW: Tensor, hidden: int) -> Tensor:
        """[R, H] of coded rows, perhaps strided ones."""
        return e4m3_rows.from_e4m3(coded_RW, hidden)

    @abstractmethod
    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor:
        """[R, F] in the dtype of h: silu(h[:, :F]) * h[:, F:] * p. ``counts_L``: rows behind them may be left out."""

    @abstractmethod
    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients (dh in the dtype of h, dp in the dtype of p)."""

    @abstractmethod
    def activation_probs(
        self, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> Tensor:
        """As ``swiglu_probs``, of any activation: [R, F] from h [R, F], or [R, 2F] where gated."""

    @abstractmethod
    def activation_probs_grad(
        self, da_RF: Tensor, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``swiglu_probs_grad``."""

    @abstractmethod
    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(y in the dtype of x, rstd [..., 1] in fp32 or better) over the last dimension."""

    @abstractmethod
    def rms_norm_grad(self, dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (dx in the dtype of x, dgamma in the dtype of gamma)."""
