"""Training gives the same bits whatever moves the bytes, overlapped and as its serialised twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankError, run_ranks
from tests.support.training import tiny, train_here


def _trained(folder: Path, transport: str, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"steps": 4, "micro_batches": 2, "overlap": "dw", "twin_every": 2, **changes}
    config = tiny(folder / transport, a2a_transport=transport, **settings)
    return run_ranks(2, train_here, config.to_json())


def test_peer_copies_and_rounds_train_to_the_same_weights(tmp_path: Path) -> None:
    reference = _trained(tmp_path, "collective")
    for transport in ("peer-copy", "pairwise"):
        for mine, other in zip(_trained(tmp_path, transport), reference, strict=True):
            assert mine["losses"] == other["losses"]
            assert mine["weights"] == other["weights"]


def test_a_transport_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="--a2a-transport few-ctas: CTAs are NCCL's, and this device is cpu"):
        _trained(tmp_path, "few-ctas", steps=1)
