"""Megatron's torch_dist save strategy, writing in this process.

Upstream forks one process per file even for a synchronous save; forking a process that has gloo's threads is not
safe, and a rank killed during the save would leave them behind.
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class InProcessSave(TorchDistSaveShardedStrategy):
    """One file per rank, written and synced to disk by the rank itself."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Writes this rank's shards; a failure on any rank is raised on all by the finalizers."""
        import torch.distributed as dist

        request = self.async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is not None:
            _rank, buckets, results = request.async_fn_args
            transforms = request.async_fn.args[0]
            if request.preload_fn is not None:
                buckets = request.preload_fn()
            results.put(_write(transforms, buckets))
        dist.barrier()
        for finalize in request.finalize_fns:
            finalize()


def _write(transforms: Any, buckets: Any) -> Any:
    """Results per bucket, or the exception of the first that failed."""
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[Any] = queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, running, True)
        _, answer = answers.get_nowait()
        if isinstance(answer, Exception):
            return answer
        written[index] = answer
    return written
