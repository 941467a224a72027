"""A planted delay, for tests and for showing what overlap does on a machine whose own network is too fast.

The exchange of the inner transport starts at once, but counts as complete only ``delay_ms`` after its launch;
the delay uses no processor. Host-side, so for gloo on CPUs alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from fluid_npu.comm.transports.base import PendingWork, Table, Transport, begin


class _DelayedWork:
    def __init__(self, inner: PendingWork, ready_at: float) -> None:
        self._inner = inner
        self._ready_at = ready_at
        self.leg_bytes: tuple[int, int] | None = getattr(inner, "leg_bytes", None)

    def wait(self) -> None:
        self._inner.wait()
        left = self._ready_at - time.monotonic()
        if left > 0:
            time.sleep(left)


class DelayedTransport:
    """Wraps a transport; every exchange takes at least ``delay_ms`` milliseconds."""

    def __init__(self, inner: Transport, delay_ms: float) -> None:
        if delay_ms < 0:
            raise ValueError(f"delay_ms={delay_ms}: a delay cannot be negative; give 0 for none")
        self.name = f"{inner.name}+{delay_ms:g}ms"
        self.needs_table = getattr(inner, "needs_table", False)
        self.node_size: int = getattr(inner, "node_size", 0)
        self._inner = inner
        self._delay_s = delay_ms / 1e3

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
        table: Table | None = None,
    ) -> PendingWork:
        """Starts the inner exchange and the clock."""
        ready_at = time.monotonic() + self._delay_s
        work = begin(self._inner, output, source, (output_splits, input_splits), group, table)
        return _DelayedWork(work, ready_at)
