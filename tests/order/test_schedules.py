"""Known schedules: each is wrong in one way, which the checker names, and right when that way is mended.

A schedule yields (kind, name of the operation that should come first, name of the one that comes too early).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluid_npu.order.checker import check
from tests.support.schedules import COMM, COMPUTE, SIDE, Job, Rank

Found = tuple[str, str, str]
Schedule = Callable[[Job, bool], Found]
SCHEDULES: dict[str, tuple[int, Schedule]] = {}


def schedule(world: int = 1) -> Callable[[Schedule], Schedule]:
    def register(function: Schedule) -> Schedule:
        SCHEDULES[function.__name__] = (world, function)
        return function

    return register


@schedule(2)
def no_wait_after_the_alltoall(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        rank.op("pack", writes="rows")
        work = rank.async_a2a("dispatch", "rows", "received")
        if good:
            rank.land(work)
        rank.op("fc1", "received", "h")
    return "read-before-write", "alltoall (dispatch)", "fc1"


@schedule(2)
def no_wait_after_a_gloo_alltoall(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        rank.op("pack", writes="rows", on="host")
        work = rank.gloo_a2a("dispatch", "rows", "received")
        if good:
            rank.land(work, on="host")
        rank.op("fc1", "received", "h", on="host")
    return "read-before-write", "alltoall (dispatch)", "fc1"


@schedule()
def comm_stream_does_not_wait_for_the_writer(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("pack", writes="rows")
    rank.record("packed")
    if good:
        rank.wait("packed", on=COMM)
    rank.a2a("dispatch", "rows", "received")
    return "read-before-write", "pack", "alltoall (dispatch)"


@schedule()
def event_recorded_before_the_writer(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    if not good:
        rank.record("packed")
    rank.op("pack", writes="rows")
    if good:
        rank.record("packed")
    rank.wait("packed", on=COMM)
    rank.a2a("dispatch", "rows", "received")
    return "read-before-write", "pack", "alltoall (dispatch)"


@schedule()
def wait_for_the_wrong_event(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.record("start")
    rank.op("dX", writes="dx")
    rank.record("dx ready")
    rank.wait("dx ready" if good else "start", on=SIDE)
    rank.op("dW", "dx", "dw", on=SIDE)
    return "read-before-write", "dX", "dW"


@schedule()
def wait_on_the_wrong_stream(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("copy", writes="weights", on=SIDE)
    rank.record("copied", on=SIDE)
    rank.wait("copied", on=COMPUTE if good else COMM)
    rank.op("fc1", "weights", "h")
    return "read-before-write", "copy", "fc1"


@schedule()
def wait_submitted_after_the_reader(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("copy", writes="weights", on=SIDE)
    rank.record("copied", on=SIDE)
    if good:
        rank.wait("copied")
    rank.op("fc1", "weights", "h")
    if not good:
        rank.wait("copied")
    return "read-before-write", "copy", "fc1"


@schedule()
def source_overwritten_in_flight(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("pack", writes="rows")
    work = rank.async_a2a("dispatch", "rows", "received")
    if good:
        rank.land(work)
    rank.op("pack again", writes="rows")
    return "write-under-read", "alltoall (dispatch)", "pack again"


@schedule()
def part_of_the_source_overwritten_in_flight(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("pack", writes="rows[0:48]")
    rank.async_a2a("dispatch", "rows[0:48]", "received")
    rank.op("tail", writes="rows[48:64]" if good else "rows[40:64]")
    return "write-under-read", "alltoall (dispatch)", "tail"


@schedule(2)
def double_buffer_reused_without_acknowledgement(job: Job, good: bool) -> Found:
    """Rank 0 puts three chunks into two buffers of rank 1."""
    sender, receiver = job.ranks
    for chunk in range(3):
        if good and chunk == 2:
            sender.add("await", event="free 0", stream=COMM)
        sender.op(f"put {chunk}", writes=f"1:buffer{chunk % 2}", on=COMM)
        sender.add("signal", event=f"chunk {chunk}", stream=COMM)
        receiver.add("await", event=f"chunk {chunk}", stream=COMPUTE)
        receiver.op(f"use {chunk}", f"buffer{chunk % 2}", f"out{chunk}")
        receiver.add("signal", event=f"free {chunk}", stream=COMPUTE)
    return "remote-write-in-use", "use 0", "put 2"


@schedule(2)
def remote_write_before_the_buffer_is_ready(job: Job, good: bool) -> Found:
    sender, receiver = job.ranks
    receiver.op("clear", writes="window")
    receiver.add("signal", event="ready", stream=COMPUTE)
    if good:
        sender.add("await", event="ready", stream=COMM)
    sender.op("put", "rows", "1:window", on=COMM)
    sender.add("signal", event="there", stream=COMM)
    receiver.add("await", event="there", stream=COMPUTE)
    receiver.op("use", "window", "out")
    return "remote-write-in-use", "clear", "put"


@schedule(2)
def remote_data_read_without_waiting_for_its_flag(job: Job, good: bool) -> Found:
    sender, receiver = job.ranks
    sender.op("put", "rows", "1:window", on=COMM)
    sender.add("signal", event="there", stream=COMM)
    receiver.add("await", event="there", stream=COMPUTE if good else SIDE)
    receiver.op("use", "window", "out")
    return "remote-write-in-use", "use", "put"


@schedule(2)
def a_barrier_that_one_rank_passes_on_another_stream(job: Job, good: bool) -> Found:
    """Rank 0 puts into rank 1's window after a barrier; rank 1 must have used the window before it came there."""
    sender, receiver = job.ranks
    receiver.op("use", "window", "out")
    for rank in job.ranks:
        rank.add("collective", name="barrier", group="all", stream=COMM, after=COMPUTE if good else None)
    sender.op("put", "rows", "1:window", on=COMM)
    return "remote-write-in-use", "use", "put"


@schedule()
def freed_in_flight(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.alloc("rows")
    rank.op("pack", writes="rows")
    work = rank.async_a2a("dispatch", "rows", "received")
    if good:
        rank.land(work)
    rank.free("rows")
    return "freed-in-flight", "alltoall (dispatch)", "free of allocation rows"


@schedule()
def freed_in_flight_over_gloo(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.alloc("rows", on=None)
    work = rank.gloo_a2a("dispatch", "rows", "received")
    if good:
        rank.land(work, on="host")
    rank.free("rows")
    return "freed-in-flight", "alltoall (dispatch)", "free of allocation rows"


@schedule()
def freed_without_record_stream(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.alloc("x")
    rank.op("make", writes="x")
    rank.record("made")
    rank.wait("made", on=SIDE)
    rank.op("use", "x", "y", on=SIDE)
    rank.free("x", told=[SIDE] if good else [])
    return "freed-in-flight", "use", "free of allocation x"


@schedule()
def block_reused_for_another_tensor_in_flight(job: Job, good: bool) -> Found:
    """Seen by addresses: the pool's memory is one allocation, and the new tensor gets the bytes of the old one."""
    (rank,) = job.ranks
    rank.op("make", writes="pool[0:32]")
    rank.record("made")
    rank.wait("made", on=SIDE)
    rank.op("use", "pool[0:32]", "y", on=SIDE)
    if good:
        rank.record("used", on=SIDE)
        rank.wait("used")
    rank.op("new tensor", writes="pool[0:32]")
    return "write-under-read", "use", "new tensor"


@schedule(2)
def collectives_in_another_order(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        names = ["combine", "dispatch"] if rank.rank and not good else ["dispatch", "combine"]
        for name in names:
            rank.land(rank.async_a2a(name, f"{name} rows", f"{name} received"))
    return "collective-order", "alltoall (dispatch)", "alltoall (combine)"


@schedule(2)
def one_rank_leaves_a_collective_out(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        rank.async_a2a("dispatch", "rows", "received")
        if good or rank.rank == 0:
            rank.async_a2a("combine", "out", "merged")
    return "collective-order", "alltoall (dispatch)", "alltoall (combine)"


@schedule(2)
def splits_that_do_not_fit(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        sends = (8, 16) if rank.rank == 0 else (32, 8)
        receives = (8, 32) if rank.rank == 0 else ((16, 8) if good else (24, 8))
        rank.land(rank.async_a2a("dispatch", "rows", "received", sends=sends, receives=receives))
    return "collective-order", "alltoall (dispatch)", "alltoall (dispatch)"


@schedule(3)
def groups_crossed_on_two_ranks(job: Job, good: bool) -> Found:
    """Ranks 0 and 1 are in both groups, and start their collectives the other way round."""
    for rank in job.ranks:
        if rank.rank < 2:
            rank.add("group", group="pair", ranks=(0, 1))
        crossed = rank.rank == 1 and not good
        for group in ("pair", "all") if crossed else ("all", "pair"):
            if group == "all" or rank.rank < 2:
                rank.a2a(group, f"{group} rows", f"{group} received", on=COMM, group=group)
    return "collective-order", "alltoall (all)", "alltoall (pair)"


@schedule(2)
def dw_reads_gradients_before_they_arrive(job: Job, good: bool) -> Found:
    for rank in job.ranks:
        work = rank.async_a2a("backward of combine", "dout", "dy")
        if good:
            rank.land(work)
        rank.op("dW of FC2", "a dy", "main_grad")
        if not good:
            rank.land(work)
    return "read-before-write", "alltoall (backward of combine)", "dW of FC2"


@schedule()
def main_grad_accumulated_on_two_streams(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("dW of micro-batch 1", "x1", "main_grad")
    if good:
        rank.record("first")
        rank.wait("first", on=SIDE)
    rank.op("dW of micro-batch 2", "x2", "main_grad", on=SIDE)
    return "two-writes", "dW of micro-batch 1", "dW of micro-batch 2"


@schedule()
def gradients_reduced_before_dw_has_landed(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("dW", "x dy", "main_grad", on=SIDE)
    rank.record("landed", on=SIDE)
    if good:
        rank.wait("landed")
    rank.async_a2a("reduce", "main_grad", "main_grad")
    return "read-before-write", "dW", "alltoall (reduce)"


@schedule()
def host_reads_a_copy_that_has_not_ended(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("counts", writes="counts")
    rank.op("copy to host", "counts", "pinned")
    if good:
        rank.record("copied")
        rank.add("sync", event="copied")
    rank.op("numpy", "pinned", on="host")
    return "read-before-write", "copy to host", "numpy"


@schedule()
def synchronised_with_the_wrong_stream(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.op("copy to host", "counts", "pinned", on=SIDE)
    rank.add("sync", stream=SIDE if good else COMPUTE)
    rank.op("numpy", "pinned", on="host")
    return "read-before-write", "copy to host", "numpy"


@schedule()
def event_recorded_again_before_the_wait(job: Job, good: bool) -> Found:
    """A wait is for the last record before it; the side stream must hear of the writer's, not of an earlier one."""
    (rank,) = job.ranks
    rank.record("e")
    if not good:
        rank.wait("e", on=SIDE)
    rank.op("make", writes="x")
    rank.record("e")
    if good:
        rank.wait("e", on=SIDE)
    rank.op("use", "x", "y", on=SIDE)
    return "read-before-write", "make", "use"


@schedule()
def wait_for_an_event_that_nobody_recorded(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    if good:
        rank.record("e", on=SIDE)
    rank.wait("e")
    return "empty-wait", "wait", "wait"


@schedule()
def used_after_it_was_freed(job: Job, good: bool) -> Found:
    (rank,) = job.ranks
    rank.alloc("x")
    rank.op("make", writes="x")
    if not good:
        rank.free("x")
    rank.op("use", "x", "y")
    return "used-after-free", "free of allocation x", "use"


@schedule(2)
def two_ranks_wait_for_each_others_signal(job: Job, good: bool) -> Found:
    one, other = job.ranks
    for rank, mine, theirs in ((one, "a", "b"), (other, "b", "a")):
        turn = good and rank is one
        if turn:
            rank.add("signal", event=mine, stream=COMPUTE)
        rank.add("await", event=theirs, stream=COMPUTE)
        rank.op(f"work {rank.rank}", writes="x")
        if not turn:
            rank.add("signal", event=mine, stream=COMPUTE)
    return "never-ordered", "work 0", "work 1"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_fault_is_named(name: str) -> None:
    world, write = SCHEDULES[name]
    job = Job(world)
    expected = write(job, False)
    report = check(job.record)
    found = {(finding.kind, finding.first.name, finding.second.name) for finding in report.findings}
    assert expected in found, "\n".join(map(str, report.findings)) or "nothing was found"
    for finding in report.findings:  # both lines are in the schedule
        assert name in finding.first.line and name in finding.second.line


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_mended_schedule_passes(name: str) -> None:
    world, write = SCHEDULES[name]
    job = Job(world)
    write(job, True)
    report = check(job.record)
    assert report.clean, "\n".join(map(str, report.findings))


def test_there_are_enough_of_them() -> None:
    assert len(SCHEDULES) >= 20


def test_host_order_is_no_order_of_streams() -> None:
    """Submitted one after the other, and as a simulator with one thread would run them: still unordered."""
    rank = Rank(0, 1)
    rank.op("make", writes="x")
    rank.op("use", "x", on=SIDE)
    (finding,) = check({0: rank.entries}).findings
    assert finding.kind == "read-before-write"


def test_a_wait_that_adds_nothing_is_listed() -> None:
    rank = Rank(0, 1)
    rank.op("make", writes="x")
    rank.record("made")
    for _ in range(2):
        rank.wait("made", on=SIDE)  # the second time round nothing new
    rank.wait("made", on=SIDE)
    rank.op("use", "x", on=SIDE)
    report = check({0: rank.entries})
    assert report.clean and len(report.redundant) == 1 and report.redundant[0].startswith("wait at ")


def test_a_repeated_fault_is_one_finding() -> None:
    rank = Rank(0, 1)
    for _ in range(5):
        rank.op("make", writes="x")
        rank.op("use", "x", on=SIDE)
    kinds = {finding.kind: finding.count for finding in check({0: rank.entries}).findings}
    assert kinds == {"read-before-write": 5, "write-under-read": 4}
