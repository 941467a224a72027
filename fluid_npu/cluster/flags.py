"""The flags of Megatron-LM's pretrain_gpt.py, as facts in megatron_flags.txt, and a reader of a command line.

Megatron's own parser is not used: it needs Megatron-LM and torch, and says nothing about other versions. What is
checked here is what argparse would check: unknown flags, missing and extra values, types and choices.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fluid_npu.adaptor.megatron_lm.flags import FLAGS
from fluid_npu.cluster.problem import Problem

#: Megatron-LM versions whose flags are known, oldest first; 0.12.1 is the one that MindSpeed supports.
LINES = ("0.12.1", "0.16.1", "0.18.2", "0.19.0")


@dataclass(frozen=True)
class Flag:
    """One flag: ``kind`` is switch, int, float, str or choices; ``many`` is '', '+', '*' or '?'."""

    name: str
    kind: str
    choices: tuple[str, ...]
    many: str
    owner: str = "megatron"
    """Who brings it: megatron, mindspeed or fluid."""

    @classmethod
    def of(cls, name: str, kind: str, owner: str) -> Flag:
        """From the second column of megatron_flags.txt."""
        many = kind[-1] if kind[-1] in "+*?" else ""
        kind = kind.removesuffix(many) if many else kind
        if kind.startswith("{"):
            return cls(name, "choices", tuple(kind.strip("{}").split(",")), many, owner)
        return cls(name, kind, (), many, owner)


@dataclass(frozen=True)
class Arguments:
    """A command line that was read: a flag's value is True for a switch, a list where several are allowed."""

    values: Mapping[str, Any]
    line: str

    def __contains__(self, flag: str) -> bool:
        return flag in self.values

    @property
    def of_mindspeed(self) -> list[str]:
        """Flags that only MindSpeed knows."""
        known = known_flags(self.line)
        return [flag for flag in self.values if known[flag].owner == "mindspeed"]

    def get(self, flag: str, default: Any = None) -> Any:
        """The value of a flag, or what Megatron takes without it."""
        return self.values.get(flag, default)


@cache
def known_flags(line: str) -> Mapping[str, Flag]:
    """Flags of one Megatron-LM version of ``LINES``, MindSpeed's and ours; an earlier owner's keeps the name."""
    found: dict[str, Flag] = {}
    for owner, version in (("megatron", line), ("mindspeed", "mindspeed")):
        for name, kind, versions in _rows():
            if version in versions:
                found.setdefault(name, Flag.of(name, kind, owner))
    found.update({name: _ours(name, settings) for name, settings in FLAGS})
    return found


def _ours(name: str, settings: Mapping[str, Any]) -> Flag:
    """One of the flags that ``import fluid_npu.megatron_adaptor`` adds to Megatron's parser."""
    if settings.get("action") == "store_true":
        return Flag(name, "switch", (), "", "fluid")
    if "choices" in settings:
        return Flag(name, "choices", tuple(settings["choices"]), "", "fluid")
    kind = settings.get("type", str)
    return Flag(name, kind.__name__ if isinstance(kind, type) else "str", (), "", "fluid")


def _rows() -> Iterator[tuple[str, str, list[str]]]:
    text = resources.files("fluid_npu.cluster").joinpath("megatron_flags.txt").read_text(encoding="utf-8")
    for row in text.splitlines():
        if not row.startswith("#"):
            name, kind, versions = row.split()
            yield name, kind, versions.split(",")


def nearest_line(version: str) -> str:
    """The newest known version that is not newer than ``version``, such as '0.17.0' -> '0.16.1'."""
    wanted = _numbers(version)[:2]
    return max((line for line in LINES if _numbers(line)[:2] <= wanted), key=_numbers, default=LINES[0])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def read(words: Sequence[str], line: str) -> tuple[Arguments, list[Problem]]:
    """Reads a command line as Megatron-LM of version ``line`` would.

    Returns:
        What could be read, and one Problem for each flag that could not.
    """
    known = known_flags(line)
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, given in _split(words, known):
        flag = known.get(name)
        if flag is None:
            problems.append(_unknown(name, line))
            continue
        if name in values:
            problems.append(_bad(name, _text(given), "given twice, and the last one would count", "remove one"))
        value, rule, fix = _value(flag, given)
        if rule:
            problems.append(_bad(name, _text(given), rule, fix))
        else:
            values[name] = value
    return Arguments(values, line), problems


def _split(words: Sequence[str], known: Mapping[str, Flag]) -> Iterator[tuple[str, list[str]]]:
    """A flag with the words up to the next flag; '--a=b' is '--a b'. Negative numbers are values."""
    name, given = "", list[str]()
    for word in words:
        if word.startswith("--"):
            if name or given:
                yield name, given
            name, equals, first = word.partition("=")
            given = [first] if equals else []
        else:
            given.append(word)
    if name or given:
        yield name, given


def _value(flag: Flag, given: list[str]) -> tuple[Any, str, str]:
    """``(value, rule it breaks or '', fix)``."""
    if flag.kind == "switch":
        return (True, "", "") if not given else (None, "takes no value", f"write {flag.name} alone")
    if flag.many in ("", "+") and not given:
        return None, "needs a value", f"write {flag.name} {_example(flag)}"
    if flag.many in ("", "?") and len(given) > 1:
        return None, f"takes one value, not {len(given)}", "quote the value, or remove what follows it"
    try:
        values = [_convert(flag, word) for word in given]
    except ValueError:
        return None, f"must be {_example(flag)}", f"write {flag.name} {_example(flag)}"
    return (values if flag.many in ("+", "*") else values[0] if values else None), "", ""


def _convert(flag: Flag, word: str) -> Any:
    if flag.kind == "choices" and word not in flag.choices:
        raise ValueError(word)
    return {"int": int, "float": float}.get(flag.kind, str)(word)


def _example(flag: Flag) -> str:
    if flag.kind == "choices":
        return "one of " + ", ".join(flag.choices)
    return {"int": "a whole number", "float": "a number"}.get(flag.kind, "a value")


def _unknown(name: str, line: str) -> Problem:
    if not name:
        return _bad("the first argument", "", "is a value without a flag", "write the flag before it")
    others = [version for version in LINES if name in known_flags(version)]
    close = difflib.get_close_matches(name, known_flags(line), n=1)
    if others:
        rule = f"Megatron-LM {line} has no such flag; it is in {', '.join(others)}"
    else:
        rule = f"no such flag in Megatron-LM {line}, MindSpeed or fluid_npu"
    return _bad(name, "", rule, f"did you mean {close[0]}?" if close else "remove it, or set MEGATRON_VERSION")


def _bad(flag: str, value: str, rule: str, fix: str) -> Problem:
    return Problem(kind="flag", flag=flag, value=value, rule=rule, fix=fix)


def _text(given: list[str]) -> str:
    return " ".join(given)
