"""scripts/first_run_on_npu.sh on the simulated NPU: every part passes and one archive holds the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["machine", "doctor", "operators", "contracts", "parity", "train"]


def first_run(*words: str, simulated: bool = True) -> subprocess.CompletedProcess[str]:
    before = [sys.executable, "-m", "fluid_npu", "sim", "exec", "--"] if simulated else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    command = [*before, "bash", "scripts/first_run_on_npu.sh", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
def test_the_quick_run_leaves_one_report_to_send_back(tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = first_run("--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"Send back {out}.tar.gz" in done.stdout
    with tarfile.open(f"{out}.tar.gz") as archive:
        names = {name.removeprefix("report/") for name in archive.getnames()}
        texts = [archive.extractfile(m).read().decode() for m in archive.getmembers() if m.isfile()]  # type: ignore[union-attr]
    assert names >= {"report.txt", "report.json", "summary.json", "metrics.jsonl", *(f"{part}.txt" for part in PARTS)}
    report = json.loads((out / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == PARTS and report["quick"] is True
    assert all(part["verdict"] == "passed" and part["exit_code"] == 0 for part in report["parts"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 20
    assert "simulated: 1" in (out / "report.txt").read_text()
    for path in (str(ROOT), str(tmp_path), sys.prefix, str(Path.home())):
        assert not any(path in text for text in texts), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quik"], "unknown argument --quik; allowed: --quick, --nproc N, --out DIR"),
        (["--nproc"], "--nproc needs a value"),
        (["--nproc", "x"], "--nproc x: must be a number above 0"),
        (["--nproc", "3"], "--nproc 3: must be even"),
        (["--out", "scripts"], "--out scripts: it or scripts.tar.gz exists"),
        (["--out", "nowhere/report"], "no NPU can be used: "),
    ],
)
def test_what_cannot_start_is_named(words: list[str], message: str) -> None:
    done = first_run(*words, simulated=False)
    assert done.returncode == 2 and f"error: {message}" in done.stderr, done.stdout + done.stderr
