#!/usr/bin/env python3
"""Whether this tree's training step is slower than another commit's, or trains to other bits.

    python3 scripts/compare_commits.py COMMIT [--pairs 6] [--cases h64 h256] [--rounds 12] [--out FILE]
    python3 scripts/compare_commits.py COMMIT --bits cpu|npu [--out FILE]

Each pair runs ``bench train-step`` of COMMIT (unpacked into a scratch folder, same Python) and of this tree, one after
the other, in alternating order. What is compared is each implementation's median over stock's of the same run, so that
the speed of the machine at that moment cancels. Prints, for each case and implementation, this tree's time over the
other's: median over the pairs and 95 % interval (bootstrap). Exit code 1 when an interval lies above 1.

``--bits`` trains both for three steps on a CPU or on the simulated NPU, with each of a few settings that both know, and
names the tensors of the checkpoints (weights and Adam's moments) that differ. Exit code 1 when some do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.bench.stats import paired_ratio  # noqa: E402

_STOCK = "stock SequentialMLP"
_RUN = "import sys; sys.argv[0] = 'fluid-npu'; from fluid_npu.cli import main; raise SystemExit(main())"
_MODEL = "--preset mixtral-tiny --layers 2 --seq-length 64 --nproc 2 --steps 3 --lr-decay-steps 10 --warmup-steps 1"
#: What both trees must know; a commit from before some flag says so by its usage error.
_SETTINGS = (
    "--dtype fp32 --overlap off",
    "--dtype fp32 --overlap dw",
    "--dtype bf16 --overlap dw",
    "--dtype bf16 --overlap dw --carry-over",
    "--dtype bf16 --overlap dw --dispatch once-per-rank",
)
#: Of the timing alone.
_DEFAULTS: dict[str, Any] = {"pairs": 6, "cases": ["h64", "h256"], "rounds": 12}


def main() -> int:
    """Runs both and prints the ratios, or what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--bits", choices=("cpu", "npu"), help="compare what is trained, on a CPU or the simulated NPU")
    parser.add_argument("--out", type=Path, help="append the text to this file")
    a = parser.parse_args()
    for name, default in _DEFAULTS.items():
        if a.bits and getattr(a, name) is not None:
            parser.error(f"--{name} with --bits {a.bits}: nothing is timed; leave one of them out")
        if getattr(a, name) is None:
            setattr(a, name, default)
    if a.pairs < 2:
        parser.error(f"--pairs {a.pairs}: an interval needs at least 2")
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        other = Path(folder, "tree")
        other.mkdir()
        _unpack(a.commit, other)
        text, worse = _compared_bits(other, Path(folder), a) if a.bits else _compared(_timed(other, a), a)
    print(text)
    if a.out:
        with a.out.open("a", encoding="utf-8") as record:
            record.write(text + "\n")
    return 1 if worse else 0


def _timed(other: Path, a: argparse.Namespace) -> dict[str, list[dict[tuple[str, str], float]]]:
    runs: dict[str, list[dict[tuple[str, str], float]]] = {"other": [], "this": []}
    for pair in range(a.pairs):
        order = [("other", other), ("this", ROOT)]
        for name, tree in order if pair % 2 == 0 else order[::-1]:
            runs[name].append(_medians(tree, a.cases, a.rounds))
            print(f"pair {pair + 1} of {a.pairs}: {name} done", file=sys.stderr, flush=True)
    return runs


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _unpack(commit: str, folder: Path) -> None:
    archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit(f"compare_commits.py: no commit {commit!r} in this repository")
    # Where an installed package finds fluid_npu.patches.
    (folder / "fluid_npu" / "patches").symlink_to(folder / "patches")


def _medians(tree: Path, cases: list[str], rounds: int) -> dict[tuple[str, str], float]:
    """Milliseconds over stock's, of each case and implementation."""
    words = ["bench", "train-step", "--device", "cpu", "--rounds", str(rounds), "--json", "--cases", *cases]
    rows: list[dict[str, Any]] = json.loads(_fluid_npu(tree, words))["rows"]
    stock = {row["case"]: row["median_ms"] for row in rows if row["impl"] == _STOCK}
    return {(row["case"], row["impl"]): row["median_ms"] / stock[row["case"]] for row in rows if row["impl"] != _STOCK}


def _fluid_npu(tree: Path, words: list[str], simulated: bool = False) -> str:
    """What a tree's ``fluid-npu`` prints, on the simulated NPU or as the words say."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", _RUN]
    if simulated:
        command += ["sim", "exec", "--", *command]
    done = subprocess.run([*command, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare_commits.py: fluid-npu {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _compared_bits(other: Path, folder: Path, a: argparse.Namespace) -> tuple[str, bool]:
    here, there = (_git("rev-parse", "--short", commit) for commit in ("HEAD", a.commit))
    on = "2 ranks on a CPU" if a.bits == "cpu" else "2 simulated NPUs"
    lines = [f"scripts/compare_commits.py {a.commit} --bits {a.bits}: {here} against {there}, {on}; {_MODEL}"]
    differ = False
    for number, settings in enumerate(_SETTINGS):
        trained = []
        for name, tree in (("other", other), ("this", ROOT)):
            out = folder / f"{name}{number}"
            words = ["train", "--device", a.bits, *_MODEL.split(), *settings.split(), "--out", str(out)]
            _fluid_npu(tree, words, simulated=a.bits == "npu")
            trained.append(_tensors(out))
        one, two = trained
        both = one.keys() & two.keys()
        apart = sorted((one.keys() ^ two.keys()) | {name for name in both if not torch.equal(one[name], two[name])})
        differ |= bool(apart)
        verdict = f"{', '.join(apart)} differ" if apart else "all equal"
        lines.append(f"{settings}: {len(one)} tensors, {verdict}")
    return "\n".join(lines), differ


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Those of a run's only checkpoint, by name."""
    (metadata,) = (run / "checkpoints").rglob(".metadata")
    reader = FileSystemReader(metadata.parent)
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _compared(runs: dict[str, list[dict[tuple[str, str], float]]], a: argparse.Namespace) -> tuple[str, bool]:
    here, there = (_git("rev-parse", "--short", commit) for commit in ("HEAD", a.commit))
    lines = [
        f"scripts/compare_commits.py {a.commit} --pairs {a.pairs} --cases {' '.join(a.cases)} --rounds {a.rounds}: "
        f"{here} against {there}, fp32, 2 ranks on a CPU",
        "this tree's milliseconds over the other's, each over stock's of its run; below 1 is faster",
    ]
    slower = False
    for cell in runs["this"][0]:
        this, other = (np.array([run[cell] for run in runs[name]]) for name in ("this", "other"))
        ratio = paired_ratio(this, other)
        slower |= ratio.low > 1
        lines.append(f"{cell[0]}, {cell[1]}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    return "\n".join(lines), slower


if __name__ == "__main__":
    sys.exit(main())
