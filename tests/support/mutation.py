"""Small changes of the engine's order: found in its source by what is called there, made while a module is imported.

Looked for are waits, event records, what keeps a buffer alive, acknowledgements, hand-overs of work, and the order of
the queue. A mutant is one change at one place. Standard library only, so that it can be installed before anything else.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("comm", "schedule", "mcore", "ops", "device")
#: Files that are no part of a schedule, and why.
LEFT_OUT = {
    "fluid_npu/comm/progress.py": "heartbeats of a watching thread",
    **{
        f"fluid_npu/comm/transports/{name}.py": "not the collective: tests/comm and tests/order/test_transports.py"
        for name in (
            ("peer_copy", "peer_memory", "peer_host", "peer_cuda", "peer_watch", "peer_open", "host_lane")
            + ("shared_files", "agreement", "choose", "self_check", "calibration", "few_ctas", "pairwise")
            + ("own_groups", "hccl_aicpu")
        )
    },
    "fluid_npu/schedule/lanes.py": "measures a schedule from outside; the engine runs without it",
    **{
        f"fluid_npu/{name}.py": f"not in tests/support/mutant_case.py: {where}"
        for where, names in {
            "tests/device/test_device_splits.py, on CUDA": ("comm/device_splits",),
            "tests/comm/test_two_level.py": ("comm/transports/two_level",),
            "tests/ops/test_parallel_linear.py, tests/mcore/test_linear.py, tests/schedule/test_late_weight.py": (
                *("comm/tensor_parallel", "ops/parallel_linear", "ops/linear_parts", "ops/dense_linear"),
                *("mcore/linear", "schedule/late_weight"),
            ),
            "tests/comm/test_ulysses.py, tests/mcore/test_attention_overlap.py, tests/ops/test_ring_attention.py": (
                *("comm/ulysses", "mcore/attention_chunks", "mcore/context", "ops/ring_fused"),
            ),
            "tests/schedule/test_graphed.py, tests/mcore/test_graph.py, tests/mcore/test_agreed_room.py": (
                *("schedule/graphed", "mcore/agreed_room", "mcore/store_round"),
            ),
            "tests/mcore/test_once_per_node.py, on four ranks": ("mcore/node_plan",),
            "no schedule: what kernels are measured by, and what they agree on": (
                *("device/kernels/agreement", "device/kernels/gemm_beside", "device/kernels/gemm_timing"),
                "device/kernels/groups",
            ),
        }.items()
        for name in names
    },
}

#: Calls that are statements of their own; without them nothing waits, is marked, handed over or told.
_DROPPED = {
    "wait": "wait",
    "land": "wait",
    "synchronize": "wait",
    "record": "event",
    "fill": "hook",
    "submit": "hook",
    "queue_callback": "hook",
    "defer": "hook",
    "defer_dw": "hook",
    "landed": "hook",
    "hook": "hook",
    "_run": "queue",
    "append": "queue",
    "start_forward": "launch",
    "start_backward": "launch",
}
#: Receivers of ``append`` that are the queue; other lists are counters.
_QUEUES = {"_queue", "kept"}
#: Assignments by which one part tells another that it is done.
_TOLD = {"grad_added_to_main_grad", "grad", "_queue", "skip_backward_post_hook"}
#: Calls that must keep their order: a statement with one must not change places with a next one that has one too.
_IN_ORDER = {"wait", "fill", "land", "land_backward", "collect", "landed", "hook", "run", "record", "start", "cpu"}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change. ``index`` counts the places of its file."""

    path: str
    index: int
    line: int
    kind: str
    change: str

    @property
    def module(self) -> str:
        """'fluid_npu.comm.all_to_all'."""
        return self.path.removesuffix(".py").replace("/", ".")

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self.change}"


@dataclass
class _Site:
    line: int
    kind: str
    change: str
    apply: Callable[[], None]


def all_mutants() -> list[Mutant]:
    """Those of the engine, by file and line."""
    found: list[Mutant] = []
    for package in PACKAGES:
        for path in sorted((ROOT / "fluid_npu" / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name in LEFT_OUT:
                continue
            for index, site in enumerate(_sites(ast.parse(path.read_text(encoding="utf-8")))):
                found.append(Mutant(path=name, index=index, line=site.line, kind=site.kind, change=site.change))
    return found


def mutated(mutant: Mutant) -> ast.Module:
    """The changed syntax tree of the mutant's file."""
    tree = ast.parse((ROOT / mutant.path).read_text(encoding="utf-8"))
    site = _sites(tree)[mutant.index]
    assert (site.line, site.change) == (mutant.line, mutant.change), "the file has changed since the list was made"
    site.apply()
    return ast.fix_missing_locations(tree)


def _sites(tree: ast.Module) -> list[_Site]:
    found = [site for block in _blocks(tree) for site in _in_block(block)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += _early_releases(node)
    found += _in_expressions(tree)
    return sorted(found, key=lambda site: (site.line, site.kind, site.change))


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    """Statement lists of functions."""
    found: dict[int, list[ast.stmt]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and not isinstance(node, ast.ClassDef):
                    found[id(block)] = block
    return list(found.values())


def _in_block(block: list[ast.stmt]) -> Iterator[_Site]:
    for place, statement in enumerate(block):
        text = _one_line(statement)
        kind = _dropped_kind(statement)
        if kind:
            yield _Site(statement.lineno, kind, f"without {text}", lambda p=place: _replace(block, p, ast.Pass()))
        following = block[place + 1] if place + 1 < len(block) else None
        if following is not None and _must_follow(statement, following):
            change = f"{_one_line(following)} before {text}"
            yield _Site(statement.lineno, "order", change, lambda p=place: _swap(block, p))


def _must_follow(first: ast.stmt, second: ast.stmt) -> bool:
    """Whether changing their places changes an order and leaves a program that can run."""
    if isinstance(second, (ast.Return, ast.Raise)) or isinstance(first, ast.If) or _needs(second, first):
        return False
    told = _dropped_kind(first) == "acknowledgement"
    return bool(_IN_ORDER & _called(second)) and (told or bool(_IN_ORDER & _called(first)))


def _dropped_kind(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        name = _name(statement.value.func)
        owner = _name(statement.value.func.value) if isinstance(statement.value.func, ast.Attribute) else ""
        return "" if name == "append" and owner not in _QUEUES else _DROPPED.get(name, "")
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
        constant = isinstance(statement.value, ast.Constant) and statement.value.value is not True
        return "" if constant or statement.targets[0].attr not in _TOLD else "acknowledgement"
    return ""


def _early_releases(owner: ast.ClassDef) -> Iterator[_Site]:
    """Attributes that some method sets to None: what they keep alive is let go by the method that sets them."""
    let_go = {
        target.attr
        for node in ast.walk(owner)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, (ast.Constant, ast.Tuple))
        and _holds_none(node.value)
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    }
    for method in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
        for name in sorted(let_go):
            setter = next((s for s in ast.walk(method) if _sets(s, name)), None)
            if setter is None:
                continue
            release = ast.parse(f"self.{name} = None").body[0]
            add = lambda m=method, r=release: m.body.append(r)
            yield _Site(setter.lineno, "keep-alive", f"self.{name} is let go in {method.name}", add)


def _holds_none(value: ast.expr) -> bool:
    return any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(value))


def _sets(node: ast.AST, name: str) -> bool:
    """self.name = something that is not None."""
    if isinstance(node, ast.AnnAssign):
        targets: Sequence[ast.expr] = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return False
    named = any(isinstance(t, ast.Attribute) and t.attr == name and _name(t.value) == "self" for t in targets)
    return named and node.value is not None and not isinstance(node.value, (ast.Constant, ast.Tuple))


def _in_expressions(tree: ast.Module) -> Iterator[_Site]:
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for place, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.AST) and id(node) not in statements:
                    put = lambda new, p=parent, f=field, v=value, i=place: _put(p, f, v, i, new)
                    yield from _in_expression(node, put)


def _in_expression(node: ast.AST, put: Callable[[ast.AST], None]) -> Iterator[_Site]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, owner = node.func.attr, node.func.value
        if name == "land":
            yield _Site(
                node.lineno, "wait", f"{_one_line(node)} does not wait", lambda: put(_attribute(owner, "output"))
            )
        elif name == "wait":
            yield _Site(node.lineno, "wait", f"{_one_line(node)} does not wait", lambda: put(_call("unwaited", owner)))
        elif name == "popleft":
            newest = ast.Call(_attribute(owner, "pop"), [], [])
            yield _Site(node.lineno, "queue", "the newest task first", lambda: put(newest))
            other = ast.IfExp(_call("rank_is_odd"), newest, copy.deepcopy(node))
            yield _Site(node.lineno, "queue", "the newest task first on every second rank", lambda: put(other))
        elif name == "fits":
            yield _Site(node.lineno, "queue", "no task is carried", lambda: put(ast.Constant(True)))
            carries = ast.UnaryOp(ast.Not(), _attribute(owner, "carry"))
            yield _Site(node.lineno, "queue", "a task is carried past the combine", lambda: put(carries))
        elif name == "apply" and _name(owner) == "_Wait":
            changed = copy.deepcopy(node)
            changed.args[0] = ast.Call(_attribute(changed.args[0], "detach"), [], [])
            yield _Site(node.lineno, "edge", "the wait does not know its launch", lambda: put(changed))


def _put(parent: ast.AST, field: str, value: Any, place: int, new: ast.AST) -> None:
    if isinstance(value, list):
        value[place] = new
    else:
        setattr(parent, field, new)


def _replace(block: list[ast.stmt], place: int, new: ast.stmt) -> None:
    block[place] = new


def _swap(block: list[ast.stmt], place: int) -> None:
    block[place], block[place + 1] = block[place + 1], block[place]


def _called(node: ast.AST) -> set[str]:
    return {_name(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}


def _needs(later: ast.stmt, earlier: ast.stmt) -> bool:
    """Whether the later statement reads a name that the earlier one assigns: swapped it could not run at all."""
    stored = {n.id for n in ast.walk(earlier) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return any(isinstance(n, ast.Name) and n.id in stored for n in ast.walk(later))


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _attribute(owner: ast.expr, name: str) -> ast.Attribute:
    return ast.Attribute(copy.deepcopy(owner), name, ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    """A call of a function of this module, which the changed module need not import."""
    importing = ast.parse(f"__import__('tests.support.mutation', fromlist=['x']).{name}", mode="eval").body
    return ast.Call(importing, [copy.deepcopy(argument) for argument in arguments], [])


def _one_line(node: ast.AST, limit: int = 70) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


# ---- what changed modules call


def unwaited(pending: Any) -> Any:
    """What ``pending.wait()`` gives, without waiting for it."""
    exchange = getattr(pending, "_exchange", None)
    flight = getattr(exchange, "_forward", None)
    if flight is None:
        return None
    flight.abandoned, flight._work = flight._work, None
    return pending.wait()


def rank_is_odd() -> bool:
    """Of this process."""
    return int(os.environ.get("RANK", "0")) % 2 == 1


# ---- importing a changed module


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.used = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, ROOT / self.mutant.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        self.used = True
        code = compile(mutated(self.mutant), str(ROOT / self.mutant.path), "exec")
        exec(code, vars(module))


def install(mutant: Mutant) -> None:
    """Makes the change in this process. Raises RuntimeError when its module is imported already."""
    if mutant.module in sys.modules:
        raise RuntimeError(f"{mutant.module} is imported already; install a mutant before")
    sys.meta_path.insert(0, _Importer(mutant))
