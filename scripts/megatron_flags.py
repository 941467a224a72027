"""Writes fluid_npu/cluster/megatron_flags.txt: which flags pretrain_gpt.py of each Megatron-LM version takes.

    python scripts/megatron_flags.py 0.12.1=CHECKOUT 0.16.1=CHECKOUT ... mindspeed=CHECKOUT

Each checkout is read in a process of its own, which builds Megatron's own parser; packages that are not installed
are replaced by empty stand-ins, since a parser needs none of them. Torch must be installed. MindSpeed's flags are read
from the source of its features, without running it.
"""

from __future__ import annotations

import abc
import argparse
import ast
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "fluid_npu" / "cluster" / "megatron_flags.txt"
HEADER = """\
# Flags of Megatron-LM's pretrain_gpt.py: name, kind of its values, versions that have it.
# Kinds: switch (no value), int, float, str, and + or * or ? for how many; {a,b} are the only values allowed.
# Source: add_megatron_arguments() of megatron/training/arguments.py, github.com/NVIDIA/Megatron-LM, tags core_vX;
# "mindspeed": add_argument() calls below mindspeed/features_manager, github.com/Ascend/MindSpeed, master 028de58c.
# Written by scripts/megatron_flags.py; not edited by hand.
"""


# What Megatron-LM imports without asking whether it is there.
NEEDED = ("six", "regex", "triton", "pydantic", "yaml", "requests", "sentencepiece", "transformers")


class _AnyName(abc.ABCMeta):
    """Every attribute of a stand-in, and the result of every call, is the stand-in: it serves as type and decorator."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        return _Anything


class _Anything(metaclass=_AnyName):
    def __init_subclass__(cls, **settings: Any) -> None:
        """Takes what pydantic's base classes take."""


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves packages as objects that have every name. First on the meta path it hides them, last it fills gaps."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(name == package or name.startswith(package + ".") for package in self.packages):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__version__ = "3.0.0"  # type: ignore[attr-defined]
        module.__getattr__ = lambda name: getattr(_Anything, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def flags_of_checkout(checkout: str) -> dict[str, str]:
    """Flag to kind, for the Megatron-LM in ``checkout``; must be called in a fresh process."""
    sys.path.insert(0, checkout)
    # Before the stand-ins: these ask whether there is a triton.
    import torch._inductor.runtime.triton_heuristics
    import torch.utils.flop_counter  # noqa: F401

    if not hasattr(typing, "override"):  # Python 3.12 has it, and so do the newest checkouts expect
        typing.override = lambda method: method  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _StandIns("megatron.rl"))  # reinforcement learning: no flags of its own, many packages
    sys.meta_path.append(_StandIns(*NEEDED))
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found = {}
    for action in parser._actions:
        for flag in action.option_strings:
            if flag.startswith("--"):
                found[flag] = _kind(action)
    found.pop("--help", None)
    return found


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        values = [getattr(value, "name", value) for value in action.choices]
        kind = "{" + ",".join(str(value) for value in values) + "}"
    else:
        kind = action.type.__name__ if action.type in (int, float) else "str"
    return kind + (str(action.nargs) if action.nargs in ("+", "*", "?") else "")


def flags_of_mindspeed(checkout: str) -> dict[str, str]:
    """Flag to kind, from the ``add_argument`` calls of MindSpeed's features; a type that is not literal is str."""
    found = {}
    for path in sorted(Path(checkout, "mindspeed", "features_manager").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args):
                continue
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            settings = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            found.update({name: _literal_kind(settings) for name in names if str(name).startswith("--")})
    return found


def _literal_kind(settings: dict[str, ast.expr]) -> str:
    text = {name: ast.unparse(value).strip("'") for name, value in settings.items()}
    if text.get("action", "").startswith("store_"):
        return "switch"
    choices = settings.get("choices")
    if isinstance(choices, (ast.List, ast.Tuple)) and all(isinstance(item, ast.Constant) for item in choices.elts):
        return "{" + ",".join(str(item.value) for item in choices.elts) + "}"  # type: ignore[attr-defined]
    kind = text.get("type", "str")
    many = text.get("nargs", "")
    return (kind if kind in ("int", "float") else "str") + (many if many in ("+", "*", "?") else "")


def _read(checkout: str) -> dict[str, str]:
    command = [sys.executable, __file__, "--one", checkout]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table_text(versions: dict[str, dict[str, str]]) -> str:
    """One line for each flag and kind, versions in the order given."""
    rows: dict[tuple[str, str], list[str]] = {}
    for version, flags in versions.items():
        for flag, kind in flags.items():
            rows.setdefault((flag, kind), []).append(version)
    lines = [f"{flag} {kind} {','.join(where)}\n" for (flag, kind), where in sorted(rows.items())]
    return HEADER + "".join(lines)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(flags_of_checkout(argv[1])))
        return 0
    pairs = [word.partition("=") for word in argv]
    if not pairs or not all(equals for _, equals, _ in pairs):
        print(f"usage: {Path(__file__).name} VERSION=CHECKOUT ...", file=sys.stderr)
        return 2
    readers = {"mindspeed": flags_of_mindspeed}
    TABLE.write_text(table_text({name: readers.get(name, _read)(checkout) for name, _, checkout in pairs}))
    print(f"wrote {TABLE.name}: {len(TABLE.read_text().splitlines()) - len(HEADER.splitlines())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
