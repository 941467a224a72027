"""Everything below the paths is either shown or named with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluid_npu.report.build import markdown_of, write_report
from fluid_npu.report.sources import collect
from tests.support import results

ROOT = Path(__file__).resolve().parents[2]


def test_benches_runs_and_order_records_are_found(tmp_path: Path) -> None:
    results.write_benches(tmp_path / "benches")
    results.write_run(tmp_path / "runs" / "first")
    results.write_order(tmp_path / "order")
    found = collect([tmp_path])
    kinds = sorted((source.kind, source.name) for source in found.sources)
    benches = sorted(("bench", f"benches/{name}") for name in results.BENCHES)
    assert kinds == [*benches, ("order", "order"), ("run", "runs/first")]


def test_every_file_is_shown_or_named(tmp_path: Path) -> None:
    results.write_run(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "half.txt").write_text("hello")
    (tmp_path / "half.json").write_text('{"bench": "overlap", "rows": [')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "future.json").write_text(json.dumps({**results.layer(), "schema": 2}))
    (tmp_path / "empty.json").write_text(json.dumps({**results.layer(), "rows": []}))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    named = {Path(one.path).relative_to(tmp_path).as_posix(): one.reason for one in collect([tmp_path]).unread}
    assert set(named) == {
        "notes.txt",
        "half.txt",
        "half.json",
        "list.json",
        "other.json",
        "future.json",
        "empty.json",
        "binary.jsonl",
        "run/config.json",
        "run/checkpoints/step_000030",
    }
    assert named["half.txt"] == "the text of half.json"
    assert "no JSON" in named["half.json"]
    assert "'bench' is None, known are train-step, overlap" in named["other.json"]
    assert "schema 2 is newer" in named["future.json"]
    assert "without rows" in named["empty.json"]
    assert "1 file(s) of a run's step_000030" in named["run/checkpoints/step_000030"]


def test_a_result_without_a_key_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    broken = results.overlap()
    del broken["rows"][1]["exposed_ms"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    (tmp_path / "whole.json").write_text(json.dumps(results.layer()))
    written = write_report([tmp_path], tmp_path / "out")
    assert written.results == ["layer: whole"]
    (only,) = written.unread
    assert only.path.endswith("broken.json") and "the key 'exposed_ms' is missing" in only.reason


def test_a_metrics_line_cut_by_a_kill_is_named_with_its_number(tmp_path: Path) -> None:
    results.write_run(tmp_path / "run", steps=4)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    found = collect([tmp_path])
    assert len(found.sources[0].data["rows"]) == 4
    assert [one.reason for one in found.unread if one.path.endswith("metrics.jsonl")] == [
        "line(s) 5 are no metrics; the others are shown"
    ]


def test_a_file_given_twice_is_shown_once(tmp_path: Path) -> None:
    results.write_benches(tmp_path)
    assert len(collect([tmp_path, tmp_path / "layer.json"]).sources) == len(results.BENCHES)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        collect([tmp_path, tmp_path / "nowhere"])


RECORDED = sorted((ROOT / "benchmarks").rglob("*.json"))


def test_every_recorded_bench_of_the_repository_is_shown() -> None:
    shown, unread = markdown_of(RECORDED)
    assert not unread
    assert sum(line.startswith("## ") for line in shown.splitlines()) == len(RECORDED) > 0


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["newest", "every"])
def test_plots_of_recorded_benches_can_be_drawn(every: bool, tmp_path: Path) -> None:
    newest = {json.loads(path.read_text()).get("bench"): path for path in RECORDED}  # folders' names end in their date
    drawn = RECORDED if every else list(newest.values())
    written = write_report(drawn, tmp_path)
    assert len(written.results) == len(drawn) and len(written.plots) >= len(newest)
