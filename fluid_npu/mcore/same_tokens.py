"""Do all expert-parallel ranks have the same number of tokens? Asked once for each new number, over the job's store.

With dispatch 'static' no rank tells another how many rows it sends, so they must be as many everywhere. The question is
nothing collective: a rank whose number is not new asks nobody, and the ranks that wait for it say so.
"""

from __future__ import annotations

from typing import Any

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import rank_names
from fluid_npu.device.kernels.agreement import store_of_job
from fluid_npu.mcore.store_round import answers_of_all

_FIX = "give every rank the same sequence length and micro-batch size, or use dispatch='once-per-rank'"

#: Numbers that the ranks of a group have agreed on, by store and ranks.
_agreed: dict[tuple[int, tuple[int, ...]], list[int]] = {}


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
    agreed = _agreed.setdefault((id(store), peers.ranks), [])
    if tokens in agreed:
        return
    me = peers.ranks[peers.index]
    of_rank = answers_of_all(peers, "tokens", str(tokens), timeout_s, store)
    missing = [rank for rank, found in of_rank.items() if found is None]
    if missing:
        raise RuntimeError(
            f"dispatch='static': rank {me} has {tokens} tokens for the first time, but {rank_names(missing)} came to "
            f"no new number in {timeout_s:.0f} s (so far: {', '.join(map(str, agreed)) or 'none'}); {_FIX}"
        )
    if len(set(of_rank.values())) > 1:
        told = ", ".join(f"rank {rank} has {found}" for rank, found in of_rank.items())
        raise ValueError(
            f"dispatch='static': the expert-parallel ranks must have the same number of tokens; {told}; {_FIX}"
        )
    agreed.append(tokens)
