"""A dispatch whose tokens travel as one byte a number (``device.kernels.e4m3_rows``); everything else as before.

Tokens are coded before they are packed, once however often they are sent, and decoded after they are unpacked; between
the two any form of rows moves them as it moves tokens, narrower ones. Gradients are *straight through*: those of the
decoded numbers are taken for those of the numbers, and travel in their own dtype, as does the combine. That is what
users of DeepSeek-V3 expect: dispatch in fp8, combine in bf16; one scale is for a whole token here, not for 128 numbers.

T tokens, R rows of the experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.e4m3_rows import coded_width

__all__ = ["Fp8Pack", "Fp8Payload", "Fp8Unpack", "PayloadError", "coded_width", "payload_of"]

#: What ``--a2a-payload-dtype`` may be.
PAYLOAD_DTYPES = ("same", "fp8")


@dataclass(frozen=True)
class PayloadError:
    """What coding has changed in some tokens, as a share of them."""

    frobenius: float
    """Of all together: the root of the sum of squared differences over that of squared numbers."""
    worst_row: float
    """The same of the token with the largest."""

    @staticmethod
    def of(x_TH: Tensor, arrived_TH: Tensor) -> PayloadError:
        """Of rows that are numbers: those with a NaN or an infinity are not counted."""
        x, y = x_TH.double(), arrived_TH.double()
        good = x.isfinite().all(1, keepdim=True)
        squares, lost = (torch.where(good, value, 0.0).square().sum(1) for value in (x, x - y))
        rows = torch.where(squares > 0, lost / squares.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        total = squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return PayloadError(float((lost.sum() / total).sqrt()), float(rows.max().sqrt()))

    def __str__(self) -> str:
        return f"error {100 * self.frobenius:.2f} % (Frobenius), {100 * self.worst_row:.2f} % of the worst token"


class Fp8Payload:
    """The cargo of fp8 dispatches; one object for all layers of a model. ``error`` is that of the first exchange."""

    def __init__(self) -> None:
        self.error: PayloadError | None = None

    def code(self, x_TH: Tensor) -> Tensor:
        """[T, W] coded tokens; the first time the error is measured and said."""
        coded = kernels_of(x_TH).to_e4m3(x_TH)
        if self.error is None and x_TH.shape[0]:
            self.error = PayloadError.of(x_TH, kernels_of(x_TH).from_e4m3(coded, x_TH.shape[1]))
            reason = f"first exchange, tokens of this rank: {self.error}; gradients and combine are not coded"
            Choice("fp8", reason).announce("payload of dispatch")
        return coded

    def cargo(self, rows: Any, hidden: int, wire: torch.dtype, dtype: torch.dtype) -> tuple[Fp8Pack, Fp8Unpack]:
        """Loading and unloading of tokens of ``dtype``, for a form of rows with ``pack`` and ``unpack``."""
        narrow = coded_width(hidden, dtype)
        return (
            Fp8Pack(self, rows.pack(narrow, wire), rows.pack(hidden, wire)),
            Fp8Unpack(hidden, rows.unpack(narrow, wire), rows.unpack(hidden, wire)),
        )


def payload_of(dtype: str) -> Fp8Payload | None:
    """The cargo for a name of ``PAYLOAD_DTYPES``; None for the tokens' own. Raises ValueError for another name."""
    if dtype not in PAYLOAD_DTYPES:
        raise ValueError(f"--a2a-payload-dtype {dtype!r}: allowed are {', '.join(PAYLOAD_DTYPES)}")
    return Fp8Payload() if dtype == "fp8" else None


@dataclass(frozen=True)
class Fp8Pack:
    """Loads coded tokens. ``narrow`` packs rows of the coded width, ``full`` of the tokens': both are of one form."""

    payload: Fp8Payload
    narrow: Any
    full: Any

    def load(self, *tensors: Tensor) -> Tensor:
        x_TH, *others = tensors
        rows: Tensor = self.narrow.load(self.payload.code(x_TH), *others)
        return rows

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = self.full.unload_grad(rows)
        return grads


@dataclass(frozen=True)
class Fp8Unpack:
    """Unloads coded tokens as ``[R, H]`` numbers; ``narrow`` and ``full`` as above, the other way."""

    hidden: int
    narrow: Any
    full: Any

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        coded_RW, *others = self.narrow.unload(rows)
        return (kernels_of(coded_RW).from_e4m3(coded_RW, self.hidden), *others)

    def load_grad(self, *grads: Tensor) -> Tensor:
        rows: Tensor = self.full.load_grad(*grads)
        return rows
