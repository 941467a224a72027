"""Whether all expert-parallel ranks have recorded a layer: otherwise none of them replays it.

NCCL takes a collective that is part of a CUDA graph on all of its ranks or on none, and a rank can fail to record by
itself, for want of memory. Ranks tell each other over the job's store, once for each layer, after the attempt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import rank_names
from fluid_npu.device.kernels.agreement import store_of_job

_PREFIX = "fluid_npu/recorded/"

#: How many layers a group was asked about, by store and ranks: layers are recorded in the same order on all ranks.
_asked: Counter[tuple[int, tuple[int, ...]]] = Counter()


@dataclass(frozen=True)
class RecordedTogether:
    """Called with why this rank could not record, '' where it did; why its group does not replay, '' where it does."""

    peers: Peers
    timeout_s: float = 300.0

    def __call__(self, failed: str) -> str:
        """Raises RuntimeError, naming them, where ranks did not come to record in time."""
        ranks = self.peers.ranks
        if len(ranks) == 1:
            return failed
        store = store_of_job()
        key = f"{_PREFIX}{'-'.join(map(str, ranks))}/{_asked[id(store), ranks]}"
        _asked[id(store), ranks] += 1
        me = ranks[self.peers.index]
        store.set(f"{key}/{me}", failed or "recorded")
        answers = {rank: self._answer(store, f"{key}/{rank}") for rank in ranks}
        missing = [rank for rank, answer in answers.items() if answer is None]
        if missing:
            raise RuntimeError(
                f"rank {me} recorded a layer, but {rank_names(missing)} did not come to it in {self.timeout_s:.0f} s; "
                "do without recording (cuda_graph=False) and compare what the ranks compute"
            )
        others = (f"rank {rank}: {answer}" for rank, answer in answers.items() if answer != "recorded" and rank != me)
        return failed or next(others, "")

    def _answer(self, store: Any, key: str) -> str | None:
        try:
            store.wait([key], timedelta(seconds=self.timeout_s))
        except RuntimeError:  # a DistStoreError is one
            return None
        return str(store.get(key).decode())
