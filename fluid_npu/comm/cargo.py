"""How tensors become the rows of an exchange and rows become tensors again.

Loading and unloading are part of the launch's and the wait's autograd node: a node of its own for each would cost the
host more than the work itself where experts are small. Implementations are in ``ops/``.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Loading(Protocol):
    """From tensors to the rows that are sent; its gradient goes the other way."""

    def load(self, *tensors: Tensor) -> Tensor:
        """``[R, ...]`` rows ordered by destination."""

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient for each tensor, from the gradient of the rows."""


class Unloading(Protocol):
    """From received rows to tensors; its gradient goes the other way."""

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the consumer wants."""

    def load_grad(self, *grads: Tensor) -> Tensor:
        """The gradient of the received rows, from one gradient for each tensor."""


class AsIs:
    """Rows are one tensor, unchanged."""

    def load(self, *tensors: Tensor) -> Tensor:
        return tensors[0]

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return (rows,)

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return grads[0]


AS_IS = AsIs()
