"""Checkpoint writing of megatron-core without helper processes."""

from __future__ import annotations

import queue
from typing import Any

_results: queue.Queue[Any] = queue.Queue()


def results_queue() -> queue.Queue[Any]:
    """Stands for ``_get_write_results_queue``, which starts a manager process that outlives a killed rank."""
    return _results
