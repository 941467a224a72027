"""Finds results below the given paths and reads them. What is not read is named with the reason, never left out.

bench    one JSON object of ``fluid-npu bench``
run      a folder of ``fluid-npu train``: metrics.jsonl, summary.json and, with --trace, lanes.json
order    a folder of order records: rankN.jsonl, one entry a line, host times in seconds
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluid_npu.report.bench_tables import KNOWN

METRICS, SUMMARY, LANES = "metrics.jsonl", "summary.json", "lanes.json"
_RANK_FILE = re.compile(r"rank(\d+)\.jsonl")
_INNER_FOLDERS = ("checkpoints", "tensorboard")  # of a run: its state and its curves once more
_RUN_FILES = ("config.json", "loss.png")
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """One result. ``name`` is its path below the given folder; ``data`` as the kind has it."""

    kind: str
    name: str
    path: Path
    data: Any


@dataclass(frozen=True, order=True)
class Unread:
    """A file, or the files of a folder, that the report does not show, and why."""

    path: str
    reason: str


@dataclass
class Found:
    """What is below the paths."""

    sources: list[Source] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)


class Unreadable(ValueError):
    """Why a file cannot be shown."""


def collect(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Reads all results below the paths, which may be files too. Raises FileNotFoundError naming those that are not."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(", ".join(missing))
    found, seen = Found(), set()
    for path in map(Path, paths):
        base = path if path.is_dir() else path.parent
        for folder, files in _folders(path):
            fresh = [file for file in files if file.resolve() not in seen]
            seen |= {file.resolve() for file in fresh}
            if fresh:
                _read_folder(found, folder, fresh, base)
    return found


def _folders(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    if path.is_file():
        yield path.parent, [path]
        return
    for folder, inner, files in os.walk(path):
        inner.sort()
        yield Path(folder), sorted(Path(folder, name) for name in files)


def _read_folder(found: Found, folder: Path, files: list[Path], base: Path) -> None:
    left = {file.name: file for file in files}
    for take in (_take_run, _take_order):
        take(found, folder, left, base)
    if _inside_run(folder) and left:
        found.unread.append(Unread(str(folder), f"{len(left)} file(s) of a run's {folder.name}"))
        return
    for file in left.values():
        _read_file(found, file, base)


def _take_run(found: Found, folder: Path, left: dict[str, Path], base: Path) -> None:
    if METRICS not in left and SUMMARY not in left:
        return
    data: dict[str, Any] = {"rows": [], "summary": None, "lanes": []}
    if METRICS in left:
        path = left.pop(METRICS)
        data["rows"], bad = _lines(path)
        if bad:
            found.unread.append(Unread(str(path), f"line(s) {_numbers(bad)} are no metrics; the others are shown"))
    for name, key, read in ((SUMMARY, "summary", _object), (LANES, "lanes", _lanes)):
        if name in left:
            path = left.pop(name)
            try:
                data[key] = read(path)
            except Unreadable as error:
                found.unread.append(Unread(str(path), str(error)))
    for name in _RUN_FILES:
        if name in left:
            reason = "the run's flags" if name == "config.json" else "drawn again from metrics.jsonl"
            found.unread.append(Unread(str(left.pop(name)), reason))
    if data["rows"] or data["summary"]:
        found.sources.append(Source(kind="run", name=_name(folder, base), path=folder, data=data))


def _take_order(found: Found, folder: Path, left: dict[str, Path], base: Path) -> None:
    ranks: dict[int, list[dict[str, Any]]] = {}
    for name in [name for name in left if _RANK_FILE.fullmatch(name)]:
        path = left.pop(name)
        rows, bad = _lines(path)
        entries = [row for row in rows if "kind" in row]
        if bad or len(entries) < len(rows):
            count = len(bad) + len(rows) - len(entries)
            found.unread.append(Unread(str(path), f"{count} line(s) are no order record; the others are shown"))
        if entries:
            ranks[int(_RANK_FILE.fullmatch(name)[1])] = entries  # type: ignore[index]
    if ranks:
        found.sources.append(Source(kind="order", name=_name(folder, base), path=folder, data=ranks))


def _read_file(found: Found, path: Path, base: Path) -> None:
    try:
        if path.suffix == ".json":
            source = Source(kind="bench", name=_name(path.with_suffix(""), base), path=path, data=read_bench(path))
            found.sources.append(source)
        elif path.suffix == ".txt" and path.with_suffix(".json").exists():
            raise Unreadable(f"the text of {path.with_suffix('.json').name}")
        else:
            raise Unreadable("not a result: the report reads *.json of benches, runs and order records (*.jsonl)")
    except Unreadable as error:
        found.unread.append(Unread(str(path), str(error)))


def read_bench(path: Path) -> dict[str, Any]:
    """A bench's result. Raises Unreadable."""
    result = _object(path)
    rows = result.get("rows")
    if "bench" not in result and isinstance(rows, list) and rows and "ratio_stock_over_this" in rows[0]:
        result["bench"] = "train-step"  # as it was written before the key existed
    if result.get("bench") not in KNOWN:
        raise Unreadable(f"not a result: its key 'bench' is {result.get('bench')!r}, known are {', '.join(KNOWN)}")
    if result.get("schema", SCHEMA) > SCHEMA:
        raise Unreadable(f"schema {result['schema']} is newer than this fluid-npu ({SCHEMA}); update it")
    if not isinstance(rows, list) or not rows:
        raise Unreadable("a bench result without rows")
    return result


def _lanes(path: Path) -> list[dict[str, Any]]:
    lanes = _object(path).get("lanes")
    if not isinstance(lanes, list):
        raise Unreadable("no key 'lanes'")
    return lanes


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Unreadable(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Unreadable("not a result: the JSON is no object")
    return value


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects, and the numbers of lines that are none."""
    rows, bad = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return [], [0]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            bad.append(number)
    return rows, bad


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")


def _inside_run(folder: Path) -> bool:
    """Whether it is, or is below, a known folder of a run."""
    parents = [folder, *folder.parents]
    return any(
        place.name in _INNER_FOLDERS and ((place.parent / METRICS).exists() or (place.parent / SUMMARY).exists())
        for place in parents
    )


def _name(path: Path, base: Path) -> str:
    relative = path.relative_to(base).as_posix()
    return base.resolve().name if relative == "." else relative
