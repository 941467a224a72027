"""Passing rows once around a group: each rank sends what it has to the next and receives from the one before.

It is an AllToAll in which each rank has rows for one other, so transports, statistics and error messages are the same.
"""

from __future__ import annotations

from torch import Tensor

from fluid_npu.comm.all_to_all import Flight, Peers, Route
from fluid_npu.comm.sink import OverlapSink


def pass_on(peers: Peers, rows: Tensor, sink: OverlapSink, *, label: str = "", backward: bool = False) -> Flight:
    """Starts sending ``rows`` to the next rank; ``land()`` of what is returned gives those of the rank before.

    Args:
        peers: the group. Every rank passes on the same number of rows, in the same order of calls.
        rows: ``[T, ...]``; kept alive until it has landed.
        sink: counts bytes; in the serialised twin the rows have arrived when this returns.
        label: where it belongs ("layer 3"), for error messages.
        backward: counted as 'ring_backward' instead of 'ring'.

    Not differentiable: attention that uses it is one autograd node. Raises CollectiveError as ``fluid_all_to_all``.
    """
    ranks, here, count = len(peers.ranks), peers.index, rows.shape[0]
    route = Route(
        peers=peers,
        output_splits=[count if rank == (here - 1) % ranks else 0 for rank in range(ranks)],
        input_splits=[count if rank == (here + 1) % ranks else 0 for rank in range(ranks)],
        comm_type="ring_backward" if backward else "ring",
        label=label,
    )
    return Flight(rows, route, route.name, sink)
