#!/usr/bin/env python3
"""AllToAlls of NCCL alone, under settings of its own: what a link gives before anything is overlapped.

    python3 scripts/gpu_link.py OUT_FILE [--nproc 4] [--rows 460 1840 3648] [--ctas 0 4 8] [--p2p-off]
        [--settings NCCL_BUFFSIZE=16777216 NCCL_P2P_PCI_CHUNKSIZE=65536,NCCL_BUFFSIZE=16777216 ...]

Rows of 4,160 bytes to each of the other GPUs, median of 40 on rank 0, on a stream of high priority. Each of --settings
(variables joined by commas; always also none) is a process tree of its own of about ten seconds, since NCCL reads its
variables once; --ctas are communicators inside it, 0 with as many CTAs as NCCL takes. Needs torchrun's module and CUDA.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

_COLUMNS, _TIMES = 2080, 40


def main() -> int:
    """Runs every setting; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[460, 1840, 3648])
    parser.add_argument("--ctas", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--p2p-off", action="store_true", help="NCCL_P2P_DISABLE=1")
    parser.add_argument("--rank-of", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.rank_of:
        _measure(a)
        return 0
    always = {"NCCL_P2P_DISABLE": "1"} if a.p2p_off else {}
    worst = 0
    for number, setting in enumerate(["", *a.settings]):
        chosen = dict(pair.split("=", 1) for pair in setting.split(",") if pair)
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={a.nproc}"]
        launch += [f"--master_port={29700 + number}", __file__, *sys.argv[1:], "--rank-of"]
        done = subprocess.run(launch, env={**os.environ, **always, **chosen}, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("ctas")]
        text = "\n".join([setting or "NCCL as it is", *(lines or [done.stderr[-2000:]])])
        print(text, flush=True)
        with a.out.open("a", encoding="utf-8") as record:
            record.write(text + "\n")
        worst = max(worst, done.returncode)
    return int(worst != 0)


def _measure(a: argparse.Namespace) -> None:
    """On each rank: a line for each number of CTAs."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    for ctas in a.ctas:
        options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if ctas:
            options.config.min_ctas = options.config.max_ctas = ctas
        group = dist.new_group(pg_options=options)
        found = [_exchange(rows, rank, group) for rows in a.rows]
        if rank == 0:
            told = "  ".join(f"{rows} rows {ms * 1e3:.0f} us {rate:.1f} GB/s" for rows, ms, rate in found)
            print(f"ctas {ctas or 'of NCCL'}: {told}", flush=True)
    dist.destroy_process_group()


def _exchange(rows: int, rank: int, group: Any) -> tuple[int, float, float]:
    """Rows, milliseconds and GB/s of what a rank sends to others."""
    import torch
    import torch.distributed as dist

    splits = [0 if other == rank else rows for other in range(dist.get_world_size())]
    source = torch.zeros(sum(splits), _COLUMNS, dtype=torch.bfloat16, device="cuda")
    target, marks = torch.empty_like(source), [torch.cuda.Event(enable_timing=True) for _ in range(_TIMES + 1)]
    for _ in range(5):
        dist.all_to_all_single(target, source, splits, splits, group=group)
    torch.cuda.synchronize()
    dist.barrier()
    marks[0].record()
    for mark in marks[1:]:
        dist.all_to_all_single(target, source, splits, splits, group=group)
        mark.record()
    torch.cuda.synchronize()
    ms = median(start.elapsed_time(end) for start, end in zip(marks, marks[1:], strict=False))
    return rows, ms, source.nbytes / ms / 1e6


if __name__ == "__main__":
    sys.exit(main())
