"""What a page shows: its Python blocks, its shell lines, the files that it names; and running the first on ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"`(fluid-npu [^`]+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
# `pretrain_<preset>.sh`, `pretrain_{a,b}.sh` and `*.toml` name many files: such a name is none itself.
_PATH = re.compile(r"(?<![\w/.-])((?:scripts|docs|tests|fluid_npu|patches)/[\w./-]*\w(?![\w./-]*[<{*])|\.ci/run)")
_SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Snippet:
    """A block of code and where it begins, as 'README.md:12'."""

    where: str
    text: str


def blocks(page: Path, *languages: str) -> list[Snippet]:
    """The fenced blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(f"{page.name}:{text[: match.start()].count(chr(10)) + 2}", match[2])
        for match in _BLOCK.finditer(text)
        if match[1] in languages
    ]


def commands(page: Path) -> list[str]:
    """The ``fluid-npu`` command lines of a page, in blocks and in the text, without the program's name."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, *_SHELLS) for line in block.text.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *_SPAN.findall(text)]:
        for program in ("fluid-npu ", "-m fluid_npu "):
            before, program_here, words = line.partition(program)
            if program_here and not before.startswith("#"):
                found.append(words.partition(" #")[0].strip())
    return found


def named_files(page: Path) -> set[str]:
    """Files of the repository that a page names or links to, relative to its root."""
    text = page.read_text(encoding="utf-8")
    root = page.parent if (page.parent / "pyproject.toml").exists() else page.parent.parent
    links = {str((page.parent / link).resolve().relative_to(root.resolve())) for link in _LINK.findall(text)}
    return links | set(_PATH.findall(text))


def run_snippets(snippets: list[Snippet]) -> None:
    """Executes blocks one after another in one namespace, as a reader would; on each of two expert-parallel ranks."""
    from megatron.core import parallel_state

    from tests.support.gpt import Run, make_config

    names: dict[str, Any] = {
        "__name__": "page",
        "config": make_config(Run()),
        "group": parallel_state.get_expert_model_parallel_group(),
    }
    for snippet in snippets:
        exec(compile(snippet.text, snippet.where, "exec"), names)
