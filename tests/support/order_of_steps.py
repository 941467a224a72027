"""The order of two training steps of a small GPT model: recorded on every rank, and checked for all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from fluid_npu.comm.guard import watch
from fluid_npu.order.checker import check
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Entry, numbered
from tests.support.gpt import Run, train_all


def recorded_steps(run: Run) -> list[Entry]:
    """Of this rank."""
    with OrderRecorder(dist.get_rank(), lambda: watch.current.name if watch.current else "") as recorder:
        train_all([replace(run, steps=2)])
    return recorder.entries


def exchanges_of_clean_steps(ranks: Sequence[Sequence[Entry]]) -> int:
    """How many AllToAlls the records have, all ranks together. Fails where the checker finds anything."""
    report = check({rank: numbered(entries, rank) for rank, entries in enumerate(ranks)})
    assert report.clean, "\n".join(map(str, report.findings))
    return sum(entry.name == "alltoall_base" for entries in ranks for entry in entries)
