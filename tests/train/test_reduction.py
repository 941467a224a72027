"""--overlap-grad-reduce: gradients are reduced during the backward, and the run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.training import tiny, train_here


@pytest.mark.parametrize(("nproc", "sharded"), [(2, False), (4, True)])
def test_reduction_during_the_backward_changes_nothing(nproc: int, sharded: bool, tmp_path: Path) -> None:
    """Two micro-batches, of which the last is reduced; EP 2, so on 4 ranks two hold the same experts."""
    settings: dict[str, Any] = {"overlap": "dw", "carry_over": True, "micro_batches": 2, "steps": 3, "nproc": nproc}
    runs = []
    for during in (False, True):
        config = tiny(
            tmp_path / str(during), overlap_grad_reduce=during, distributed_optimizer=sharded, twin_every=2, **settings
        )
        runs.append(run_ranks(nproc, train_here, config.to_json(), timeout=200)[0])
    after, during = runs
    assert during["losses"] == after["losses"] and during["weights"] == after["weights"]
