"""Two records of one program on the simulated NPU, made independently: the simulator's and the Python recorder's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.order.checker import check
from fluid_npu.order.records import Entry, read_folder

ROOT = Path(__file__).resolve().parents[2]
#: (kind, function with the fault, words of the line that comes too early)
FAULTS = {
    ("read-before-write", "no_wait_before_the_side_stream", "matmul", "add"),
    ("write-under-read", "overwritten_under_the_side_stream", "clone", "zero_"),
    ("read-before-write", "fused_operator_reads_too_early", "mul_", "swiglu"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two records' folders, and what the program printed."""
    folder = tmp_path_factory.mktemp("order")
    (folder / "simulator").mkdir()
    command = [sys.executable, "-m", "fluid_npu", "sim", "exec", "--order", str(folder / "simulator"), "--"]
    program = [sys.executable, "-W", "ignore", "tests/support/order_on_npu.py", str(folder / "python")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *program], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout)
    return {"simulator": folder / "simulator", "python": folder / "python", "printed": folder / "printed"}


def own(name: str) -> str:
    """'mul_' for aten::mul_.Tensor and for aclnnInplaceMul alike."""
    word = name.removeprefix("aten::").removeprefix("npu::npu_").removeprefix("aclnn").partition(".")[0]
    return {"mm": "matmul", "SwiGlu": "swiglu"}.get(word, word)


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
@pytest.mark.parametrize("source", ["simulator", "python"])
def test_each_fault_is_named_and_the_mended_programs_are_clean(source: str, folders: dict[str, Path]) -> None:
    ranks = read_folder(folders[source])
    report = check(ranks)
    found = {
        (f.kind, f.second.line.rpartition(" in ")[2], own(f.first.name), own(f.second.name)) for f in report.findings
    }
    if source == "simulator":  # clone is a copy_ into fresh memory there
        found = {(kind, where, first.replace("copy_", "clone"), second) for kind, where, first, second in found}
    assert found == FAULTS, "\n".join(map(str, report.findings))
    for finding in report.findings:
        assert finding.count == 1 and "tests/support/order_on_npu.py:" in finding.first.line
    # What the fused operator writes is seen when it has run.
    swiglu = [entry for entry in ranks[0] if own(entry.name) == "swiglu"]
    assert all(len(entry.writes) == 1 and entry.writes[0] not in entry.reads for entry in swiglu) and len(swiglu) == 2


def test_both_saw_the_same_streams(folders: dict[str, Path]) -> None:
    programs = {program for _, program, _, _ in FAULTS}

    def shape(entries: list[Entry], operator: str) -> list[int]:
        """On which stream an operator ran; streams are numbered in the order in which the programs use them."""
        streams: dict[str | None, int] = {}
        ours = [
            e for e in entries if e.kind == "op" and e.line.rpartition(" in ")[2] in programs and e.stream != "host"
        ]
        used = [(own(e.name), streams.setdefault(e.stream, len(streams))) for e in ours]
        return [number for name, number in used if name == operator]

    simulator, python = (read_folder(folders[source])[0] for source in ("simulator", "python"))
    for operator, times in (("matmul", 2), ("add", 2), ("zero_", 2), ("mul_", 2), ("swiglu", 2)):
        assert shape(simulator, operator) == shape(python, operator), operator
        assert len(shape(python, operator)) == times


def test_changes_of_the_device_s_events_are_noticed(folders: dict[str, Path]) -> None:
    lines = [line for line in folders["printed"].read_text().splitlines() if "->" in line]
    assert lines[0] == "unchanged -> right"
    assert len(lines) == 4 and all(line.endswith("-> noticed") for line in lines[1:]), lines
