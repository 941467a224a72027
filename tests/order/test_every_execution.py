"""Random schedules: the checker finds a conflict exactly when some execution has one, and names only such pairs."""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fluid_npu.order.checker import check
from tests.support.executions import conflicts
from tests.support.schedules import COMPUTE, SIDE, Job, Rank

STREAMS = st.sampled_from([COMPUTE, SIDE, "host"])
BUFFERS = st.sampled_from(["x", "y", "x[0:8]", "x[4:16]"])
STEPS = st.one_of(
    st.tuples(st.just("op"), STREAMS, BUFFERS, st.booleans()),
    st.tuples(st.just("op"), STREAMS, BUFFERS, st.booleans()),
    st.tuples(st.just("record"), st.sampled_from([COMPUTE, SIDE]), st.sampled_from("ef")),
    st.tuples(st.just("wait"), st.sampled_from([COMPUTE, SIDE]), st.sampled_from("ef")),
    st.tuples(st.just("sync"), st.sampled_from([COMPUTE, SIDE, "e"])),
    st.tuples(st.just("land"), STREAMS),
)
#: How a collective is issued: on a stream, on one that waits for computing, or in a thread of its own.
COLLECTIVES = st.lists(st.sampled_from(["stream", "after", "own"]), max_size=2)


def submit(rank: Rank, steps: list, collectives: list[str], places: list[int]) -> None:
    """The steps with the collectives put between them."""
    issued: list[int] = []
    recorded = set()
    for place, step in enumerate(steps):
        for kind in (kind for kind, where in zip(collectives, places, strict=True) if where == place):
            stream = None if kind == "own" else SIDE
            issued.append(rank.a2a("c", "x", "y", on=stream, after=COMPUTE if kind == "after" else None))
        if step[0] == "op":
            _, stream, buffer, write = step
            rank.op("op", "" if write else buffer, buffer if write else "", on=stream)
        elif step[0] == "record":
            rank.record(step[2], on=step[1])
            recorded.add(step[2])
        elif step[0] == "wait" and step[2] in recorded:
            rank.wait(step[2], on=step[1])
        elif step[0] == "sync" and (step[1] != "e" or "e" in recorded):
            rank.add("sync", **({"event": "e"} if step[1] == "e" else {"stream": step[1]}))
        elif step[0] == "land" and issued:
            rank.land(issued[-1], on=step[1])


@settings(max_examples=120, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_against_every_execution(data: st.DataObject) -> None:
    job = Job(data.draw(st.integers(1, 2)))
    collectives = data.draw(COLLECTIVES) if len(job.ranks) > 1 else []
    for rank in job.ranks:
        steps = data.draw(st.lists(STEPS, min_size=2, max_size=7 if len(job.ranks) == 1 else 4))
        places = sorted(data.draw(st.tuples(*[st.integers(0, len(steps) - 1)] * len(collectives))))
        submit(rank, steps, collectives, list(places))
    real = conflicts(job.record)
    found = {
        frozenset(((one.rank, one.number), (other.rank, other.number)))
        for finding in check(job.record).findings
        if finding.kind != "collective-order"
        for one, other in [(finding.first, finding.second)]
    }
    assert found <= real
    assert bool(found) == bool(real)
