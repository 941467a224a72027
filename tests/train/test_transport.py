"""Training gives the same bits whatever moves the bytes, overlapped and as its serialised twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.training import tiny, train_here


def _trained(folder: Path, transport: str, ranks: int = 2, **more: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"steps": 4, "micro_batches": 2, "overlap": "dw", "twin_every": 2, **more}
    config = tiny(folder / transport, a2a_transport=transport, nproc=ranks, ep=ranks, **settings)
    return run_ranks(ranks, train_here, config.to_json())


@pytest.mark.parametrize("transport", ["peer-copy", pytest.param("pairwise", marks=pytest.mark.nightly)])
def test_another_transport_trains_to_the_same_weights(transport: str, tmp_path: Path) -> None:
    reference = _trained(tmp_path, "collective")
    for mine, other in zip(_trained(tmp_path, transport), reference, strict=True):
        assert mine["losses"] == other["losses"]
        assert mine["weights"] == other["weights"]


@pytest.mark.nightly
def test_two_nodes_of_two_ranks_train_to_the_same_weights(tmp_path: Path) -> None:
    reference = _trained(tmp_path, "collective", ranks=4)
    for mine, other in zip(_trained(tmp_path, "two-level", ranks=4, a2a_node_size=2), reference, strict=True):
        assert mine["losses"] == other["losses"]
        assert mine["weights"] == other["weights"]
