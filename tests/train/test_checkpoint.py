"""Checkpoints: complete or not chosen; a resumed run equals an unbroken one bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.train.checkpoint_files import (
    MANIFEST,
    CheckpointError,
    checkpoint_path,
    damage,
    discard_on_failure,
    finish,
    latest_checkpoint,
    prune,
    start_writing,
)
from tests.support.ranks import RankError, run_ranks
from tests.support.training import data_prefix, tiny, train_here


def write_one(folder: Path, step: int) -> Path:
    work = start_writing(folder, step)
    (work / "weights.distcp").write_bytes(os.urandom(2 << 20))
    (work / "common.pt").write_bytes(b"small")
    return finish(work)


def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    write_one(tmp_path, 9)
    newest = write_one(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == newest == checkpoint_path(tmp_path, 10)


def cut_large(checkpoint: Path) -> None:
    with (checkpoint / "weights.distcp").open("r+b") as file:
        file.truncate(1000)


def change_small(checkpoint: Path) -> None:
    (checkpoint / "common.pt").write_bytes(b"smalk")


def drop_file(checkpoint: Path) -> None:
    (checkpoint / "common.pt").unlink()


def drop_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def cut_manifest(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text[: len(text) // 2])


def back_to_tmp(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_suffix(".tmp"))


@pytest.mark.parametrize("harm", [cut_large, change_small, drop_file, drop_manifest, cut_manifest, back_to_tmp])
def test_a_damaged_or_unfinished_checkpoint_is_never_chosen(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    good = write_one(tmp_path, 5)
    bad = write_one(tmp_path, 10)
    harm(bad)
    assert latest_checkpoint(tmp_path) == good
    assert damage(bad) is not None


def test_the_last_two_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_one(tmp_path, step)
    prune(tmp_path)
    start_writing(tmp_path, 4)
    start_writing(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003", "step_000005.tmp"]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    work = start_writing(tmp_path, 1)
    with pytest.raises(CheckpointError, match="disk is full"), discard_on_failure(work):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def train_on_full_disk(config_text: str) -> dict[str, Any]:
    """Trains while every shard of rank 1 meets a full disk, as the file system would answer."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == 1:
        filesystem_async._write_item = full
    return train_here(config_text)


def test_a_full_disk_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="No space left|disk is full"):
        run_ranks(2, train_on_full_disk, tiny(tmp_path, steps=3, checkpoint_every=2).to_json())
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"overlap": "dw", "plant_delay_ms": 0.5}, {"distributed_optimizer": True, "dtype": "bf16"}, {"dtype": "fp16"}],
    ids=["dw", "distributed-bf16", "fp16"],
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = tiny(tmp_path / "whole", steps=8, checkpoint_every=4, **changes)
    broken = tiny(tmp_path / "broken", steps=8, checkpoint_every=100, resume=True, **changes)
    unbroken = run_ranks(2, train_here, whole.to_json())
    later = tmp_path / "whole" / "checkpoints" / "step_000008"
    shutil.copytree(tmp_path / "whole", tmp_path / "broken", ignore=shutil.ignore_patterns(later.name))
    resumed = run_ranks(2, train_here, broken.to_json())
    for one, other in zip(unbroken, resumed, strict=True):
        assert one["losses"] == other["losses"]
        assert one["weights"] == other["weights"]


def test_resuming_with_another_flag_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(2, train_here, tiny(tmp_path, steps=2).to_json())
    with pytest.raises(RankError, match=r"--seed 7: the checkpoint was written with --seed 1234"):
        run_ranks(2, train_here, tiny(tmp_path, steps=2, seed=7, resume=True).to_json())


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=1)
    run_ranks(2, train_here, config.to_json())
    prefix = Path(data_prefix())
    for file in prefix.parent.glob(f"{prefix.name}.*.json"):
        shutil.copy(file, tmp_path / file.name)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"{prefix.name}{suffix}")
    meta = tmp_path / f"{prefix.name}.meta.json"
    described = json.loads(meta.read_text())
    described["sha256"][".bin"] = "0" * 64
    meta.write_text(json.dumps(described))
    other = dataclasses.replace(config, data=str(tmp_path / prefix.name), resume=True)
    with pytest.raises(RankError, match="was written with other data"):
        run_ranks(2, train_here, other.to_json())


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    final = write_one(tmp_path, 1)
    files = json.loads((final / MANIFEST).read_text())["files"]
    assert set(files) == {"weights.distcp", "common.pt"}
    assert "sha256" in files["common.pt"] and "sha256" not in files["weights.distcp"]
