"""What every transport offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class PendingWork(Protocol):
    """An exchange under way."""

    def wait(self) -> Any:
        """Returns when the receive buffer may be read by what is issued next on the current stream."""


class Transport(Protocol):
    """Moves rows between the ranks of a group. Split sizes are on the host: rows per peer, in rank order."""

    name: str

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts the exchange. ``source`` and ``output`` must stay alive and untouched until ``wait()``."""
