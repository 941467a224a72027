"""Do all expert-parallel ranks have the same number of tokens? Asked once for each new number, over the job's store.

With dispatch 'static' no rank tells another how many rows it sends, so they must be as many everywhere. The question is
nothing collective: a rank whose number is not new asks nobody, and the ranks that wait for it say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import rank_names
from fluid_npu.device.kernels.agreement import store_of_job

_PREFIX = "fluid_npu/tokens/"
_FIX = "give every rank the same sequence length and micro-batch size, or use dispatch='once-per-rank'"


@dataclass
class _Known:
    """Of one group: the numbers that its ranks agreed on, and how often this rank asked."""

    agreed: list[int] = field(default_factory=list)
    asked: int = 0


_known: dict[tuple[int, tuple[int, ...]], _Known] = {}


def check_same_tokens(tokens: int, peers: Peers, timeout_s: float = 60.0, store: Any = None) -> None:
    """Returns when all ranks of the group have come to ``tokens`` as their next new number, or had it before.

    Args:
        tokens: T of this rank.
        peers: the expert-parallel group.
        timeout_s: how long to wait for the other ranks.
        store: None takes one of the job's own.

    Raises:
        ValueError: a rank has another number; every rank that asked gets this error.
        RuntimeError: a rank has come to no new number; the message names it.
    """
    if len(peers.ranks) == 1:
        return
    store = store_of_job() if store is None else store
    known = _known.setdefault((id(store), peers.ranks), _Known())
    if tokens in known.agreed:
        return
    me = peers.ranks[peers.index]
    key = f"{_PREFIX}{'-'.join(map(str, peers.ranks))}/{known.asked}"
    known.asked += 1
    store.set(f"{key}/{me}", str(tokens))
    of_rank = {rank: _answer(store, f"{key}/{rank}", timeout_s) for rank in peers.ranks}
    missing = [rank for rank, found in of_rank.items() if found is None]
    if missing:
        raise RuntimeError(
            f"dispatch='static': rank {me} has {tokens} tokens for the first time, but {rank_names(missing)} came to "
            f"no new number in {timeout_s:.0f} s (so far: {', '.join(map(str, known.agreed)) or 'none'}); {_FIX}"
        )
    if len(set(of_rank.values())) > 1:
        told = ", ".join(f"rank {rank} has {found}" for rank, found in of_rank.items())
        raise ValueError(
            f"dispatch='static': the expert-parallel ranks must have the same number of tokens; {told}; {_FIX}"
        )
    known.agreed.append(tokens)


def _answer(store: Any, key: str, timeout_s: float) -> int | None:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError:  # a DistStoreError is one
        return None
    return int(store.get(key).decode())
