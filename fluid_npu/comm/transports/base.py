"""What every transport offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class PendingWork(Protocol):
    """An exchange under way."""

    def wait(self) -> Any:
        """Returns when the receive buffer may be read by what is issued next on the current stream."""


Table = Sequence[Sequence[int]]
"""[source][target] rows of an exchange, of all ranks of the group."""


class Landing(PendingWork, Protocol):
    """An exchange under way whose rows come to lie in memory of the transport."""

    rows: torch.Tensor
    """[R, ...] received rows, in rank order; to be read after ``wait()``."""

    def release(self) -> None:
        """Gives the memory back: what is issued next on the current stream does not read ``rows`` any more."""


class Transport(Protocol):
    """Moves rows between the ranks of a group. Split sizes are on the host: rows per peer, in rank order.

    One with ``needs_table = True`` takes the exchange's table too, as the keyword ``table``, None where it is unknown.
    One with ``recordable = True`` keeps no count of exchanges on the host, so that recorded ones may be replayed.
    """

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


def wants_table(transport: Transport) -> bool:
    """Whether every rank should be told what each sends to each."""
    return hasattr(transport, "land") or getattr(transport, "needs_table", False)


def begin(
    transport: Transport,
    output: torch.Tensor,
    source: torch.Tensor,
    splits: tuple[Sequence[int] | None, Sequence[int] | None],
    group: Any,
    table: Table | None,
) -> PendingWork:
    """``start``, with the table where the transport takes it; ``splits`` are (output's, input's)."""
    more: dict[str, Any] = {"table": table} if getattr(transport, "needs_table", False) else {}
    return transport.start(output, source, *splits, group, **more)
