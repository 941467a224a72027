"""Fingerprints of upstream source: what a patch was written against, and whether it is still there.

Three forms:

* ``source:<hash>``: the statements of the source file that bind the name (definitions, assignments, imports, also
  inside ``if`` and ``try``), read as a syntax tree: comments, docstrings and layout do not count; the signature,
  defaults, annotations and decorators do. A re-exported function or class of the same package is followed to the file
  that defines it. For a constant it is the assignments. For a module under a name (``import torch``) it is the import
  and every call through that name that gives a literal device, which is what such rows are about. What the running
  object is does not matter, so another patch system changes no fingerprint.
* ``signature:<text>``: names and defaults of the parameters; for a C function, which has none to read, the first line
  of its documentation. For packages of which one row serves many versions (torch).
* ``absent``: nothing may be there (kind ``add``).

The hash is of our own printout of the tree without empty fields, so it is the same on Python 3.10 to 3.13.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fluid_npu.adaptor.patch import ABSENT, Patch, PatchError
from fluid_npu.adaptor.providers import upstream
from fluid_npu.adaptor.target import MISSING, Slot, resolve

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def fingerprint_of(target: str, form: str = "source") -> str:
    """The fingerprint of what is installed. ``form`` is 'source' or 'signature'.

    Raises PatchError when the target does not exist or has neither source nor signature.
    """
    slot = resolve(target)
    if slot.visible is MISSING:
        raise PatchError(f"{target}: does not exist; was it renamed or removed upstream?")
    if form == "signature":
        return f"signature:{signature_text(upstream(slot.visible))}"
    statements = binding_statements(slot)
    if not statements:
        raise PatchError(f"{target}: no statement of its source file binds it; use the form 'signature'")
    text = "\n".join([*(printed(node) for node in statements), *_device_literals(slot)])
    return f"source:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def current_fingerprint(patch: Patch) -> str:
    """The fingerprint of the patch's target as installed now, in the form that the row uses."""
    if patch.kind == "add":
        return ABSENT
    form = patch.fingerprint.partition(":")[0]
    return fingerprint_of(patch.target, form if form == "signature" else "source")


def signature_text(raw: Any) -> str:
    """Parameters with defaults, without annotations: ``(device=None)``; of a C function the first line of its doc.

    Raises PatchError for an object that has neither.
    """
    function = unwrapped(raw)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        lines = (getattr(function, "__doc__", None) or "").strip().splitlines()
        if not lines:
            raise PatchError(f"{raw!r} has neither a signature nor documentation; use the form 'source'") from None
        return lines[0].strip()
    return str(inspect.Signature([item.replace(annotation=inspect.Parameter.empty) for item in parameters]))


def unwrapped(raw: Any) -> Any:
    """The function inside a staticmethod, classmethod or property; anything else as it is."""
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__
    if isinstance(raw, property):
        return raw.fget
    return raw


def binding_statements(slot: Slot) -> list[ast.stmt]:
    """The statements of the source that bind the slot's name, in order; empty when there is no source for it."""
    return _statements(*_home(slot))


def _statements(module_name: str, path: list[str]) -> list[ast.stmt]:
    module = sys.modules.get(module_name)
    source = getattr(module, "__file__", None)
    if source is None or not source.endswith(".py"):
        return []
    body: list[ast.stmt] = _parsed(Path(source)).body
    for part in path[:-1]:
        body = [inner for node in _bound(body, part) if isinstance(node, ast.ClassDef) for inner in node.body]
    found = list(_bound(body, path[-1]))
    if len(found) == 1 and isinstance(found[0], ast.ImportFrom):
        return _followed(module_name, found[0]) or found
    return found


def _followed(module_name: str, node: ast.ImportFrom) -> list[ast.stmt]:
    """The statements behind ``from .other import name``, where that is of the same package and not a module."""
    package = getattr(sys.modules[module_name], "__package__", None) or module_name
    parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
    source = node.module or "" if node.level == 0 else f"{parent}.{node.module}" if node.module else parent
    if source.split(".")[0] != module_name.split(".")[0] or source == module_name:
        return []
    return _statements(source, [node.names[0].name])


def _home(slot: Slot) -> tuple[str, list[str]]:
    """The module whose source binds the slot, and the path in it."""
    holder, attribute = slot.holder, slot.attribute
    if isinstance(holder, type):
        owner = next((base for base in holder.__mro__ if attribute in vars(base)), holder)
        return owner.__module__, [*owner.__qualname__.split("."), attribute]
    value = upstream(slot.visible)
    defined = getattr(value, "__module__", None)
    same_package = isinstance(defined, str) and defined.split(".")[0] == holder.__name__.split(".")[0]
    if same_package and (isinstance(value, type) or inspect.isfunction(value)) and "<" not in value.__qualname__:
        return str(defined), value.__qualname__.split(".")
    return holder.__name__, [attribute]


def _device_literals(slot: Slot) -> tuple[str, ...]:
    """Where the slot is a module under a name: the calls through it that say ``device='...'``, as text."""
    if not isinstance(slot.visible, ModuleType) or not isinstance(slot.holder, ModuleType):
        return ()
    source = slot.holder.__file__
    return _calls_with_device(Path(source), slot.attribute) if source else ()


@lru_cache(maxsize=256)
def _calls_with_device(source: Path, name: str) -> tuple[str, ...]:
    calls = [node for node in ast.walk(_parsed(source)) if isinstance(node, ast.Call)]
    return tuple(
        printed(call)
        for call in calls
        if any(key.arg == "device" and isinstance(key.value, ast.Constant) for key in call.keywords)
        and next((leaf.id for leaf in ast.walk(call.func) if isinstance(leaf, ast.Name)), None) == name
    )


def definition(slot: Slot) -> _Definition | None:
    """The last ``def`` or ``class`` among the binding statements, or None."""
    found = [node for node in binding_statements(slot) if isinstance(node, _Definition)]
    return found[-1] if found else None


@lru_cache(maxsize=256)
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _bound(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Statements of a scope that bind ``name``, looking into if, try, with and loops but not into functions."""
    for node in body:
        if isinstance(node, _Definition):
            if node.name == name:
                yield node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            aliases = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == name]
            if aliases:
                yield _only(node, aliases)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
            if name in names:
                yield node
        else:
            for inner in _blocks(node):
                yield from _bound(inner, name)


def _only(node: ast.Import | ast.ImportFrom, aliases: list[ast.alias]) -> ast.stmt:
    if isinstance(node, ast.Import):
        return ast.Import(names=aliases)
    return ast.ImportFrom(module=node.module, names=aliases, level=node.level)


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            yield block
    for handler in getattr(node, "handlers", []):
        yield handler.body


def printed(node: Any) -> str:
    """A syntax tree as text, without docstrings, positions, string kinds and empty fields."""
    if isinstance(node, ast.AST):
        parts = []
        for name, value in ast.iter_fields(node):
            if name in ("kind", "type_comment", "ctx") or value is None or value == []:
                continue
            if name == "body" and isinstance(node, _Definition):
                value = _without_docstring(value)
            parts.append(f"{name}={printed(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(printed(item) for item in node)}]"
    return repr(node)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[1:] if text else body
