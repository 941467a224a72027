"""Every rule that a simulated operator enforces cites its source and has a test that it refuses; read from the C++."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluid_npu.sim import sources
from tests.sim.npu.test_contracts import CASES, CHECKED_BEFORE

OPERATORS = sorted(path for path in sources.all_files() if path.parent.name == "opapi" and path.suffix == ".cpp")
NOT_SIMULATED = '"fluid-sim"'


def arguments(text: str, start: int) -> list[str]:
    """The arguments of a call whose opening bracket is just before ``start``."""
    parts, depth, begin, quoted = [], 0, start, False
    for place in range(start, len(text)):
        letter = text[place]
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter in "({[":
            depth += 1
        elif letter in ")}]" and depth == 0:
            return [*parts, text[begin:place].strip()]
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    raise AssertionError("a call without an end")


def rules(path: Path) -> Iterator[tuple[str, str]]:
    """(rule, source) of each ``require`` in a file; a rule with two texts gives both, a joined one its last part."""
    text = path.read_text(encoding="utf-8")
    for call in re.finditer(r"\brequire\(", text):
        _, rule, *_, source = arguments(text, call.end())
        literals = re.findall(r'"([^"]*)"', rule)
        for literal in literals if "?" in rule else literals[-1:]:
            yield literal, source


def all_rules() -> list[tuple[str, str, str]]:
    return [(path.stem, rule, source) for path in OPERATORS for rule, source in rules(path) if path.stem != "core"]


def test_the_rules_are_found() -> None:
    assert len(all_rules()) > 50
    assert ("swiglu", "the input is contiguous", "kSource") in all_rules()


@pytest.mark.parametrize("file, rule, source", [case for case in all_rules() if case[2] != NOT_SIMULATED])
def test_each_rule_has_a_call_that_it_refuses(file: str, rule: str, source: str) -> None:
    assert re.fullmatch(r"k\w+|source", source), "a rule cites a document, by a constant of its file"
    tested = any(part in rule or rule.strip() in part for _, _, part in CASES.values())
    assert tested != (rule in CHECKED_BEFORE), f"{file}.cpp: no case in tests/sim/npu/test_contracts.py for {rule!r}"
