"""Checkpoint directories on disk: which one is complete, how one becomes complete, which ones go. No torch.

``checkpoints/step_000100.tmp`` is being written; ``checkpoints/step_000100`` has been renamed from it after every
rank was done, and holds ``manifest.json`` with the size of each file and the digest of the small ones. Whatever is
``.tmp``, lacks a manifest or differs from it is never chosen.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
KEEP = 2
_HASHED_BYTES = 1 << 20  # larger files are checked by size alone
_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text says which, why and what to do."""


def folder_of(out: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(out) / "checkpoints"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Final directory of the checkpoint after ``step`` steps."""
    return folder / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Number of steps that a checkpoint directory's name stands for."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint}: not a checkpoint directory, whose name is step_NNNNNN")
    return int(match[1])


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    for checkpoint in sorted(_finished(Path(folder)), key=step_of, reverse=True):
        if damage(checkpoint) is None:
            return checkpoint
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint directory; None when it equals its manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except OSError:
        return f"{checkpoint}: no {MANIFEST}; it was never finished"
    except (ValueError, KeyError, AttributeError):
        return f"{checkpoint}: {MANIFEST} is damaged"
    for name, entry in files:
        file = checkpoint / name
        if not file.is_file():
            return f"{checkpoint}: {name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{checkpoint}: {name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if "sha256" in entry and _sha256(file) != entry["sha256"]:
            return f"{checkpoint}: the contents of {name} changed"
    return None


def start_writing(folder: Path, step: int) -> Path:
    """An empty ``.tmp`` directory for the checkpoint; leftovers of killed runs go first."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    work = folder / (checkpoint_path(folder, step).name + ".tmp")
    work.mkdir()
    return work


def finish(work: Path) -> Path:
    """Writes the manifest, makes everything durable and renames ``X.tmp`` to ``X``."""
    files = {}
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        _fsync(file)
        size = file.stat().st_size
        entry: dict[str, int | str] = {"bytes": size}
        if size <= _HASHED_BYTES:
            entry["sha256"] = _sha256(file)
        files[file.relative_to(work).as_posix()] = entry
    manifest = work / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    _fsync(manifest)
    _fsync(work)
    final = work.with_suffix("")
    if final.exists():  # damaged, or rewritten by a run that resumed before it
        shutil.rmtree(final)
    os.rename(work, final)
    _fsync(work.parent)
    return final


def prune(folder: Path, keep: int = KEEP) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for old in sorted(_finished(folder), key=step_of)[:-keep]:
        # Without its manifest a half-removed directory is never chosen.
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def discard_on_failure(work: Path) -> Iterator[None]:
    """Removes ``work`` when the body fails; a full disk becomes a CheckpointError that says so."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if is_full_disk(error):
            raise CheckpointError(
                f"{work}: cannot write the checkpoint, the disk is full; nothing half-written was kept; "
                "free some space and continue with --resume"
            ) from error
        raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, is that of a full disk or an exceeded quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
