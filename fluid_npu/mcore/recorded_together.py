"""Whether all expert-parallel ranks have recorded a layer: otherwise none of them replays it.

NCCL takes a collective that is part of a CUDA graph on all of its ranks or on none, and a rank can fail to record by
itself, for want of memory. Ranks tell each other over the job's store, once for each layer, after the attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import rank_names
from fluid_npu.mcore.store_round import answers_of_all


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
        me = ranks[self.peers.index]
        answers = answers_of_all(self.peers, "recorded", failed or "recorded", self.timeout_s)
        missing = [rank for rank, answer in answers.items() if answer is None]
        if missing:
            raise RuntimeError(
                f"rank {me} recorded a layer, but {rank_names(missing)} did not come to it in {self.timeout_s:.0f} s; "
                "do without recording (cuda_graph=False) and compare what the ranks compute"
            )
        others = (f"rank {rank}: {answer}" for rank, answer in answers.items() if answer != "recorded" and rank != me)
        return failed or next(others, "")
