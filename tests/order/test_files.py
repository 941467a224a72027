"""Records as files: what is written is read back, what cannot be read is named; the command and its exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fluid_npu.cli import main
from fluid_npu.order.records import RecordError, read_folder, write
from tests.support.schedules import SIDE, Job


def job(good: bool) -> Job:
    made = Job(2)
    for rank in made.ranks:
        rank.op("make", writes="x")
        rank.record("made")
        if good:
            rank.wait("made", on=SIDE)
        rank.op("use", "x[0:8]", "y", on=SIDE)
        rank.land(rank.gloo_a2a("counts", "c", "d", sends=(4, 4), receives=(4, 4)), on="host")
    return made


def saved(folder: Path, good: bool = True, timed: bool = False) -> Path:
    """``timed``: each entry takes half a millisecond, one begins with each millisecond."""
    for rank, entries in job(good).record.items():
        if timed:
            entries = [replace(e, at=1.0 + i / 1e3, until=1.0005 + i / 1e3) for i, e in enumerate(entries)]
        write(folder / f"rank{rank}.jsonl", entries)
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    saved(tmp_path)
    found = read_folder(tmp_path)
    assert set(found) == set(job(True).record)
    for rank, entries in found.items():
        for read, made in zip(entries, job(True).record[rank], strict=True):
            assert {**vars(read), "line": ""} == {**vars(made), "line": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be of kind 'process'"),
        ('{"kind": "op"}', "first line must be of kind 'process'"),
        (
            '{"kind": "process"}\n{"kind": "jump"}',
            r"rank0.jsonl:2: kind 'jump' is unknown; allowed are agreed, alloc, await",
        ),
        ('{"kind": "process"}\n{"kind": "op", "colour": 1}', "rank0.jsonl:2: not an entry .*colour"),
        ('{"kind": "process"}\n{"kind"', "rank0.jsonl:2: not an entry"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rank0.jsonl").write_text(text)
    with pytest.raises(RecordError, match=message):
        read_folder(tmp_path)


def test_two_records_of_one_rank_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"kind": "process", "rank": 3}\n')
    with pytest.raises(RecordError, match="b.jsonl: rank 3 has two records here"):
        read_folder(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-order", str(saved(tmp_path))]) == 0
    assert "0 finding(s) in the records of 2 rank(s)" in capsys.readouterr().out
    saved(tmp_path, good=False, timed=True)
    assert main(["check-order", str(tmp_path), "--redundant", "--trace", str(tmp_path / "trace")]) == 1
    out = capsys.readouterr().out
    assert "read-before-write: the second reads what the first writes" in out
    assert "first:  rank 0: make on npu:0/1, submitted at job:" in out
    assert main(["check-order", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    kinds = {finding["kind"]: finding for finding in report["findings"]}
    assert not report["clean"] and kinds["read-before-write"]["second"]["name"] == "use"
    trace = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in trace if event["name"] == "thread_name"} >= {SIDE, "communication"}
    used = [event["dur"] for event in trace if event["ph"] == "X" and event["name"] == "use"]
    assert used == [pytest.approx(500)] * 2


def test_the_command_refuses_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-order", str(tmp_path / "nowhere")]) == 2
    assert main(["check-order", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is no folder" in err and "no *.jsonl in it" in err
