"""NCCL on few CTAs: each group gets a communicator of its own with at most ``ctas`` of them, on a high-priority stream.

An AllToAll of NCCL is a kernel. Beside a GEMM that holds every multiprocessor it waits for the GEMM's end; with few
CTAs and a GEMM that leaves as many multiprocessors free (``carve_out``) both run; the AllToAll alone is slower then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import PendingWork
from fluid_npu.device.choice import Choice


class FewCtasTransport:
    """``all_to_all_single`` on a twin of each group. The twins are made in ``prepare``, or at the first use of a group.

    Args:
        ctas: how many CTAs NCCL may use.
    """

    name = "few-ctas"

    def __init__(self, ctas: int = 8) -> None:
        if ctas < 1:
            raise ValueError(f"ctas={ctas}: NCCL needs one CTA at least; give 4 to 16")
        self._ctas = ctas
        self._twins: dict[str, Any] = {}

    def prepare(self, group: Any) -> Choice[bool]:
        """Makes the group's communicator; a collective call of all of its ranks."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas, options.config.min_ctas = self._ctas, 1
        # Ranks outside of the group do not take part: groups may be made by each on its own.
        self._twins[group.group_name] = dist.new_group(
            dist.get_process_group_ranks(group), backend="nccl", pg_options=options, use_local_synchronization=True
        )
        return Choice(True, f"at most {self._ctas} CTAs")

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts the exchange without blocking the host."""
        if group.group_name not in self._twins:
            self.prepare(group)
        twin = self._twins[group.group_name]
        return dist.all_to_all_single(output, source, output_splits, input_splits, group=twin, async_op=True)

    def close(self) -> None:
        """Gives the communicators back."""
        for twin in self._twins.values():
            dist.destroy_process_group(twin)
        self._twins.clear()


def few_ctas_missing(device: str) -> str:
    """What a communicator with few CTAs lacks here; empty when nothing."""
    if device != "cuda":
        return f"CTAs are NCCL's, and this device is {device}"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    if not hasattr(dist.ProcessGroupNCCL.Options(), "config"):
        return f"torch {torch.__version__} has no ProcessGroupNCCL.Options().config"
    return ""


@contextmanager
def carve_out(multiprocessors: int) -> Iterator[None]:
    """Matrix products launched inside leave that many multiprocessors free, where torch can; 0 changes nothing."""
    carve = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if not multiprocessors or carve is None:
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    carve(multiprocessors)
    try:
        yield
    finally:
        carve(before)
