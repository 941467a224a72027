"""Training gives the same bits whatever moves the bytes, overlapped and as its serialised twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.training import tiny, train_here


def _trained(folder: Path, transport: str) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"steps": 4, "micro_batches": 2, "overlap": "dw", "twin_every": 2}
    config = tiny(folder / transport, a2a_transport=transport, **settings)
    return run_ranks(2, train_here, config.to_json())


@pytest.mark.parametrize("transport", ["peer-copy", pytest.param("pairwise", marks=pytest.mark.nightly)])
def test_another_transport_trains_to_the_same_weights(transport: str, tmp_path: Path) -> None:
    reference = _trained(tmp_path, "collective")
    for mine, other in zip(_trained(tmp_path, transport), reference, strict=True):
        assert mine["losses"] == other["losses"]
        assert mine["weights"] == other["weights"]
