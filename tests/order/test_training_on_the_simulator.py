"""``fluid-npu train`` with overlap and carry-over on two simulated NPUs: the simulator's order record is clean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.order.checker import check
from fluid_npu.order.records import Entry, read_folder
from tests.support.training import VOCAB, data_prefix


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
@pytest.mark.parametrize("preset", ["h64", pytest.param("mixtral-tiny", marks=pytest.mark.nightly)])
def test_an_overlapped_training_step_is_clean(preset: str, tmp_path: Path) -> None:
    flags = {"preset": preset, "nproc": 2, "dtype": "bf16", "device": "npu", "steps": 1, "overlap": "dw"}
    flags |= {"data": data_prefix(), "vocab-size": VOCAB, "out": tmp_path / "out"}
    words = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--carry-over"]
    fluid = [sys.executable, "-W", "ignore", "-m", "fluid_npu"]
    command = [*fluid, "sim", "exec", "--order", str(tmp_path / "order"), "--", *fluid, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = read_folder(tmp_path / "order")
    report = check(ranks)
    assert len(ranks) == 2 and report.clean, "\n".join(map(str, report.findings))
    # No wait between streams is there in vain. (Host synchronisations may be: for a clock, or inside a blocking copy.)
    assert not [line for line in report.redundant if line.startswith("wait ")]
    for entries in ranks.values():
        assert exchanged_beside_dw(entries)
        # Nodes of autograd that are C++ have no Python line of their own thread; everything of ours has.
        ours = [entry for entry in entries if entry.kind == "collective" or entry.name.startswith("aclnnGrouped")]
        assert len(ours) > 30 and all(".py:" in entry.line for entry in ours)


def exchanged_beside_dw(entries: list[Entry]) -> bool:
    """Whether a grouped matmul, which can only be a dW, was submitted between an AllToAll and the next wait."""
    places = [place for place, entry in enumerate(entries) if entry.name == "HcclAlltoAllV"]
    for place in places:
        behind = entries[place + 1 :]
        wait = next((number for number, entry in enumerate(behind) if entry.kind == "wait"), len(behind))
        if any(entry.name.startswith("aclnnGroupedMatmul") for entry in behind[:wait]):
            return True
    return False
