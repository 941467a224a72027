"""The experts' operators for rows that only the device knows, on kernels that want their number on the host.

Kernels whose ``rows_on_device`` is set take ``DeviceRows`` themselves. For the others the host reads the counts, which
on a CPU costs nothing, the rows in use are computed as ever, and the result is put at the front of a buffer of the same
capacity. R rows of capacity, K inner and N outer width, F ffn, L groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows, Groups

if TYPE_CHECKING:
    from fluid_npu.device.kernels.activations import ActivationProbs
    from fluid_npu.device.kernels.base import Kernels


class ExpertKernels(Protocol):
    """The operators of experts, for any counts. Contracts as in ``Kernels``."""

    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Groups, trans_w: bool = False) -> Tensor: ...
    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> Tensor: ...
    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> None: ...
    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor: ...
    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def activation_probs(
        self, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> Tensor: ...
    def activation_probs_grad(
        self, da_RF: Tensor, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]: ...


def kernels_for(x: Tensor, counts_L: Groups) -> ExpertKernels:
    """The kernels of the device of x, in a form that takes these counts."""
    kernels = kernels_of(x)
    if isinstance(counts_L, DeviceRows) and not kernels.rows_on_device:
        return KnownRows(kernels)
    return cast(ExpertKernels, kernels)


class KnownRows:
    """``ExpertKernels`` for ``DeviceRows`` alone, by kernels that take ``GroupRows``."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Groups, trans_w: bool = False) -> Tensor:
        counts, (x,) = known(counts_L, x_RK)
        return whole(self._kernels.grouped_mm(x, w_LKN, counts, trans_w), x_RK.shape[0])

    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> Tensor:
        counts, (x, dy) = known(counts_L, x_RK, dy_RN)
        return self._kernels.grouped_dw(x, dy, counts)

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> None:
        counts, (x, dy) = known(counts_L, x_RK, dy_RN)
        self._kernels.grouped_dw_add_(main_grad_LKN, x, dy, counts)

    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor:
        _, (h, p) = known(counts_L, h_R2F, p_R)
        return whole(self._kernels.swiglu_probs(h, p), h_R2F.shape[0])

    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        _, (da, h, p) = known(counts_L, da_RF, h_R2F, p_R)
        dh, dp = self._kernels.swiglu_probs_grad(da, h, p)
        return whole(dh, h_R2F.shape[0]), whole(dp, h_R2F.shape[0])

    def activation_probs(
        self, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> Tensor:
        _, (used, p) = known(counts_L, h, p_R)
        return whole(self._kernels.activation_probs(used, p, activation), h.shape[0])

    def activation_probs_grad(
        self, da_RF: Tensor, h: Tensor, p_R: Tensor, activation: ActivationProbs, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        _, (da, used, p) = known(counts_L, da_RF, h, p_R)
        dh, dp = self._kernels.activation_probs_grad(da, used, p, activation)
        return whole(dh, h.shape[0]), whole(dp, h.shape[0])


def known(counts_L: Groups | None, *buffers: Tensor) -> tuple[GroupRows, list[Tensor]]:
    """The counts on the host, and of each buffer the rows that they are about."""
    assert isinstance(counts_L, DeviceRows), "bare counts are on the host already"
    counts = counts_L.on_host()
    rows = sum(counts)
    return counts, [buffer[:rows] for buffer in buffers]


def whole(y: Tensor, capacity: int) -> Tensor:
    """y at the front of a buffer of ``capacity`` rows; the rest is not written."""
    buffer = y.new_empty(capacity, *y.shape[1:])
    buffer[: y.shape[0]] = y
    return buffer
