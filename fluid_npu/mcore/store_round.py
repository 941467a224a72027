"""A round of answers over the job's store: every expert-parallel rank says something and learns what the others said.

For what is decided once for a layer, at a point that all ranks come to: nothing collective, so a rank that does not
come is named instead of waited for in a collective that means something else to it.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.device.kernels.agreement import store_of_job

#: How many rounds of a topic a group has had, by store and ranks: they are in the same order on all ranks.
_rounds: Counter[tuple[int, str, tuple[int, ...]]] = Counter()


def answers_of_all(peers: Peers, topic: str, mine: str, timeout_s: float, store: Any = None) -> dict[int, str | None]:
    """What each rank of the group said in this round of ``topic``, by global rank; None of one that did not come.

    ``store``: None takes one of the job's own.
    """
    store = store_of_job() if store is None else store
    count = id(store), topic, peers.ranks
    key = f"fluid_npu/{topic}/{'-'.join(map(str, peers.ranks))}/{_rounds[count]}"
    _rounds[count] += 1
    store.set(f"{key}/{peers.ranks[peers.index]}", mine)
    return {rank: _answer(store, f"{key}/{rank}", timeout_s) for rank in peers.ranks}


def _answer(store: Any, key: str, timeout_s: float) -> str | None:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError:  # a DistStoreError is one
        return None
    return str(store.get(key).decode())
