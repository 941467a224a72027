"""``--pp`` and ``--vpp`` train, resume and write text like a run without a pipeline, from the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.train.config import TrainConfig
from tests.support.ranks import run_ranks
from tests.support.training import CUT, tiny, train_here

FOUR_LAYERS = {**CUT, "layers": 4}


def check_pipeline(folder: Path, plain: TrainConfig, pipelined: dict[str, Any]) -> None:
    """Losses within 1e-4 of those of ``plain`` and the same text; a resumed run equals an unbroken one."""
    without = run_ranks(plain.nproc, train_here, plain.to_json(), "kept")
    reference, start = without[0], {name: value for rank in without for name, value in rank["start"].items()}
    whole = tiny(folder / "whole", **pipelined)
    unbroken = run_ranks(whole.nproc, train_here, whole.to_json(), start)
    assert unbroken[0]["losses"] == pytest.approx(reference["losses"], abs=1e-4)
    assert unbroken[0]["losses"][whole.steps] < unbroken[0]["losses"][1] - 0.5
    assert unbroken[0]["summary"]["generated"] == reference["summary"]["generated"] != ""
    assert unbroken[0]["summary"]["parallel"]["vpp"] == whole.vpp
    assert (unbroken[0]["summary"]["a2a_ms"] is None) == (whole.ep == 1)  # one rank exchanges nothing
    later = folder / "whole" / "checkpoints" / f"step_{whole.steps:06d}"
    shutil.copytree(folder / "whole", folder / "broken", ignore=shutil.ignore_patterns(later.name))
    broken = tiny(folder / "broken", **{**pipelined, "resume": True, "checkpoint_every": 100})
    for one, other in zip(unbroken, run_ranks(whole.nproc, train_here, broken.to_json()), strict=True):
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]


def test_interleaved_pipeline_equals_none(tmp_path: Path) -> None:
    common = {"ep": 1, "steps": 8, "micro_batches": 4, "cut": FOUR_LAYERS, "overlap": "dw", "twin_every": 3}
    plain = tiny(tmp_path / "plain", nproc=1, **common)
    check_pipeline(tmp_path, plain, {**common, "pp": 2, "vpp": 2, "checkpoint_every": 4, "carry_over": True})


#: At h64's learning rate rounding differences of this one decide a tie of its router after some ten steps.
MIXTRAL = {"preset": "mixtral-tiny", "lr": 3e-4, "min_lr": 3e-5}


@pytest.mark.nightly
@pytest.mark.parametrize("vpp", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"distributed_optimizer": True}, MIXTRAL], ids=str)
def test_pipelines_with_expert_parallelism(tmp_path: Path, vpp: int, changes: dict[str, Any]) -> None:
    common = {"ep": 2, "steps": 20, "micro_batches": 4, "cut": FOUR_LAYERS, "overlap": "dw", **changes}
    plain = tiny(tmp_path / "plain", nproc=2, **common)
    check_pipeline(tmp_path, plain, {**common, "nproc": 4, "pp": 2, "vpp": vpp, "checkpoint_every": 10})
