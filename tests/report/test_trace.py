"""Traces are Chrome trace JSON with microseconds, ranks as processes and lanes as threads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fluid_npu.report import plots
from fluid_npu.report.build import write_report
from tests.support import results


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trace")
    results.write_benches(folder / "in" / "benches")
    results.write_run(folder / "in" / "run")
    results.write_order(folder / "in" / "order")
    with pytest.MonkeyPatch.context() as without:
        without.setattr(plots, "can_draw", lambda: False)
        written = write_report([folder / "in"], folder / "out")
    names = [path.relative_to(folder / "out" / "traces").as_posix() for path in written.traces]
    return {
        name.split("-", 1)[1]: json.loads(path.read_text()) for name, path in zip(names, written.traces, strict=True)
    }


def test_every_record_with_times_gives_a_trace(traces: dict[str, Any]) -> None:
    assert sorted(name for name in traces if "/" not in name) == [
        "benches-overlap-W0-overlapped.trace.json",
        "benches-overlap-W0-twin.trace.json",
        "order-order.trace.json",
        "run-run.trace.json",
        "run-step29-overlapped.trace.json",
        "run-step30-twin.trace.json",
    ]


def test_events_are_complete_in_microseconds_and_lanes_are_named(traces: dict[str, Any]) -> None:
    events = traces["benches-overlap-W0-twin.trace.json"]["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 4
    first = next(event for event in complete if event["pid"] == 1 and event["name"] == "communication piece")
    assert (first["ts"], first["dur"]) == (2000.0, 4500.0)
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {names[event["pid"], event["tid"]] for event in complete} == set(results.LANES)
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 1"}


def test_every_event_has_what_analysers_ask_for(traces: dict[str, Any]) -> None:
    for trace in traces.values():
        for event in trace["traceEvents"]:
            assert event["ph"] in "XM" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
            assert event["ts"] >= 0
            if event["ph"] == "X":
                assert event["dur"] >= 0 and event["cat"] and event["args"]["stream"] == event["tid"]


def test_each_rank_has_a_file_in_the_form_of_pytorchs_profiler(traces: dict[str, Any]) -> None:
    assert sorted(name for name in traces if name.startswith("order-order/")) == [
        "order-order/rank0.json",
        "order-order/rank1.json",
    ]
    trace = traces["benches-overlap-W0-overlapped/rank1.json"]
    assert trace["distributedInfo"] == {"rank": 1, "world_size": 2}
    names = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert set(names) == {"compute piece", "ncclKernel_AllToAll (communication piece)"}
    assert {event["pid"] for event in trace["traceEvents"]} == {1}


def test_a_collective_of_an_order_record_lasts_until_its_wait(traces: dict[str, Any]) -> None:
    events = traces["order-order.trace.json"]["traceEvents"]
    dispatch = next(event for event in events if event["name"] == "dispatch" and event["pid"] == 0)
    assert dispatch["ts"] == 0.0
    assert dispatch["dur"] == pytest.approx(5000.0, abs=1e-3)
    mm = next(event for event in events if event["name"] == "mm" and event["pid"] == 0)
    assert mm["ts"] == pytest.approx(2000.0, abs=1e-3) and mm["args"]["line"] == "x.py:3"


def test_steps_of_a_run_follow_each_other(traces: dict[str, Any]) -> None:
    steps = [event for event in traces["run-run.trace.json"]["traceEvents"] if event["ph"] == "X"]
    assert [event["ts"] for event in steps] == pytest.approx([50_000.0 * n for n in range(30)])
    assert steps[9]["name"] == "serialised twin 10" and steps[0]["args"]["loss"] == pytest.approx(7.95)
