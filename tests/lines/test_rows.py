"""Each row of the features ``cpu`` and ``no_te`` prevents something, on every line but 0.16, which has it in CI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.adaptor.manifest import read_manifest
from tests.lines.test_lines import LINES, ROOT, SOURCE, megatron_lines
from tests.support.prevents import PREVENTS, wrong


def test_it_is_known_of_every_row_what_it_prevents() -> None:
    manifests = ["torch", *(f"megatron_core-{version.rpartition('.')[0]}" for version in LINES)]
    rows = [row for name in manifests for row in read_manifest(name).rows if row.feature in ("cpu", "no_te")]
    assert {row.target for row in rows} == set(PREVENTS), "a row that prevents nothing is dead"


@pytest.mark.nightly  # a minute a line
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", [line for line in LINES if line != SOURCE])
def test_every_row_of_the_line_prevents_what_it_says(version: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-W", "ignore", "tests/support/prevents.py", str(result)]
    environment = megatron_lines.environment(version)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"megatron-core {version}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    for outcome in json.loads(result.read_text()):
        assert len(outcome) >= 17 and wrong(outcome) == []
