"""The AllToAll of torch.distributed: gloo, NCCL and HCCL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import PendingWork


class CollectiveTransport:
    """``all_to_all_single`` with split sizes; the backend follows from the group."""

    name = "collective"
    recordable = True

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts the exchange without blocking the host."""
        return dist.all_to_all_single(output, source, output_splits, input_splits, group=group, async_op=True)
