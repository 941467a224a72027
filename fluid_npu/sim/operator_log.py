"""Reads the operator log that ``fluid-npu sim exec --log DIR`` leaves: which operators ran, where, how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def read_log(folder: str | Path) -> Counter[tuple[str, str]]:
    """How often each (kind, name) ran, over all processes that wrote into the folder.

    Kinds: 'aclnn' an operator of our library, 'aten' queued on the stream, 'aten-sync' run at once after a drain,
    'hccl' a collective, 'fallback' what torch_npu would have computed on the host, 'refused' a broken contract,
    'missing' an operator that is not simulated.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(Path(folder).glob("*.log")):
        for line in path.read_text(encoding="utf-8").splitlines():
            kind, _, name = line.partition(" ")
            counts[kind, name] += 1
    return counts
