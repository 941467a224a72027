"""Checkpoint writing of megatron-core: no helper processes, and with the torch that is installed."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable
from functools import partial
from typing import Any

_results: queue.Queue[Any] = queue.Queue()


def results_queue(*_args: Any) -> queue.Queue[Any]:
    """Stands for ``_get_write_results_queue``, without the leading underscore from 0.17 on.

    Megatron's starts a manager process that outlives a killed rank.
    """
    return _results


def written_with_format(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps torch's ``_write_item`` as 0.12 calls it: without the serialization format, which torch wants since 2.7."""
    if "serialization_format" not in inspect.signature(original).parameters:
        return original
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    return partial(original, serialization_format=SerializationFormat.TORCH_SAVE)


def save_in_this_process(strategy: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
    """Stands for ``AsyncSaveShardedStrategy.save`` of 0.12, which hands the writing to a forked process and waits."""
    strategy.async_save(sharded_state_dict, checkpoint_dir).execute_sync()
