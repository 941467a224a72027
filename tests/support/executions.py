"""Every execution of a small schedule, step by step: which operation may start before which other one has ended.

Shares no code with the checker: streams are queues, the host fills them and may block, and all interleavings are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fluid_npu.order.records import HOST, Entry

#: What a queue holds: (what, operation or event, how often it was recorded).
Task = tuple[str, Any, int]


class Machine:
    """Hosts and streams of all ranks. A state is how far each has come; what has happened follows from it."""

    def __init__(self, ranks: Mapping[int, Sequence[Entry]]) -> None:
        self.ranks = [
            [entry for entry in ranks[rank] if entry.kind not in ("process", "group")] for rank in sorted(ranks)
        ]
        self.queues: dict[Any, list[tuple[int, Task]]] = {}
        self.hosts = [list(self._program(rank, entries)) for rank, entries in enumerate(self.ranks)]
        self.parts: dict[int, list[tuple[int, int]]] = {}
        for rank, entries in enumerate(self.ranks):
            collectives = [entry for entry in entries if entry.kind == "collective"]
            for place, entry in enumerate(collectives):
                self.parts.setdefault(place, []).append((rank, entry.number))
        self.peers = {part: parts for parts in self.parts.values() for part in parts}

    def _program(self, rank: int, entries: Sequence[Entry]) -> Iterator[list[Task]]:
        """What each step of the host waits for; what it submits goes to the queues with the step's number."""
        recorded: dict[str | None, int] = {}
        for step, entry in enumerate(entries, 1):
            name = (rank, entry.number)
            tasks: list[Task] = []
            if entry.kind == "op":
                tasks = [("start", name, 0), ("end", name, 0)]
            elif entry.kind == "collective":
                tasks = [("start", name, 0), ("meet", name, 0), ("end", name, 0)]
            elif entry.kind == "landed":
                tasks = [("ended", (rank, entry.of), 0)]
            elif entry.kind == "record":
                recorded[entry.event] = recorded.get(entry.event, 0) + 1
                tasks = [("mark", (rank, entry.event), recorded[entry.event])]
            elif entry.kind == "wait" or (entry.kind == "sync" and entry.event is not None):
                tasks = [("marked", (rank, entry.event), recorded.get(entry.event, 0))]
            elif entry.kind == "sync":
                tasks = [("drained", (rank, entry.stream), step)]
            stream = HOST if entry.kind == "sync" else entry.stream
            if entry.kind == "collective" and stream is None:
                stream = f"lane {entry.number}"
            if stream == HOST:
                yield tasks
                continue
            queue = self.queues.setdefault((rank, stream), [])
            if entry.after:
                mine = [count for count, _ in self.queues.get((rank, entry.after), [])]
                queue.append((step, ("drained", (rank, entry.after), mine[-1] + 1 if mine else 0)))
            queue += [(step, task) for task in tasks]
            yield []

    def explore(self) -> set[tuple[Any, Any]]:
        """(a, b): b may start before a has ended."""
        self.keys = list(self.queues)
        first = (tuple(0 for _ in self.hosts), tuple(0 for _ in self.hosts), tuple(0 for _ in self.keys))
        seen, todo, early = {first}, [first], set()
        names = [(rank, e.number) for rank, es in enumerate(self.ranks) for e in es if e.kind in ("op", "collective")]
        while todo:
            state = todo.pop()
            started, ended, _ = self._facts(state)
            early |= {(a, b) for b in started for a in names if a != b and a not in ended}
            for later in self._steps(state):
                if later not in seen:
                    seen.add(later)
                    todo.append(later)
        return early

    def _facts(self, state: Any) -> tuple[set[Any], set[Any], dict[Any, int]]:
        hosts, inside, places = state
        done = [task for key, place in zip(self.keys, places, strict=True) for _, task in self.queues[key][:place]]
        for program, step, part in zip(self.hosts, hosts, inside, strict=True):
            done += [task for tasks in program[:step] for task in tasks]
            done += program[step][:part] if step < len(program) else []
        marks: dict[Any, int] = {}
        for what, name, count in done:
            if what == "mark":
                marks[name] = max(count, marks.get(name, 0))
        return ({n for w, n, _ in done if w == "start"}, {n for w, n, _ in done if w == "end"}, marks)

    def _steps(self, state: Any) -> Iterator[Any]:
        hosts, inside, places = state
        facts = self._facts(state)
        for rank, program in enumerate(self.hosts):
            step = hosts[rank]
            if step == len(program):
                continue
            tasks, part = program[step], inside[rank]
            if part < len(tasks) and not self._possible(tasks[part], facts, places):
                continue
            more = part + 1 < len(tasks)
            yield (_with(hosts, rank, step + (not more)), _with(inside, rank, part + 1 if more else 0), places)
        for index, key in enumerate(self.keys):
            place, queue = places[index], self.queues[key]
            if place == len(queue) or queue[place][0] > hosts[key[0]]:
                continue
            if self._possible(queue[place][1], facts, places):
                yield (hosts, inside, _with(places, index, place + 1))

    def _possible(self, task: Task, facts: Any, places: Sequence[int]) -> bool:
        what, name, count = task
        started, ended, marks = facts
        if what == "marked":
            return marks.get(name, 0) >= count
        if what == "ended":
            return name in ended
        if what == "meet":
            return all(part in started for part in self.peers[name])
        if what == "drained":  # everything submitted there before that step of the host
            if name not in self.queues:
                return True
            before = sum(1 for step, _ in self.queues[name] if step < count)
            return places[self.keys.index(name)] >= before
        return True


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def conflicts(ranks: Mapping[int, Sequence[Entry]]) -> set[frozenset[Any]]:
    """Pairs of operations of one rank that touch the same bytes, one writing, and may run at the same time."""
    early = Machine(ranks).explore()
    found = set()
    for rank, entries in ranks.items():
        operations = [entry for entry in entries if entry.kind in ("op", "collective")]
        for place, a in enumerate(operations):
            for b in operations[place + 1 :]:
                one, other = (rank, a.number), (rank, b.number)
                # b was submitted later: that a may start before b has ended says nothing.
                if _touch(a, b) and (one, other) in early:
                    found.add(frozenset((one, other)))
    return found


def _touch(a: Entry, b: Entry) -> bool:
    pairs = [(x, y) for x in a.writes for y in (*b.reads, *b.writes)] + [(x, y) for x in a.reads for y in b.writes]
    return any(x.alloc == y.alloc and x.start < y.stop and y.start < x.stop for x, y in pairs)
