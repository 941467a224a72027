"""Applies ``patches/megatron_lm/<line>.patch``: one line after ``import torch``, found by its context, not its number.

A line that MindSpeed's users add by hand (``import mindspeed.megatron_adaptor``) may stand there already. Anything else
that differs from what the patch knows, or from what git has, is refused: the user's changes are not ours to touch.
"""

from __future__ import annotations

import ast
import os
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fluid_npu.megatron_lm.checkout import Checkout, CheckoutError

#: Lines that other adaptors' users add; they may stand before or after ours.
_NEIGHBOURS = ("import mindspeed.megatron_adaptor",)


@dataclass(frozen=True, kw_only=True)
class LaunchPatch:
    """The added line and the lines before and after it."""

    name: str
    before: tuple[str, ...]
    added: str
    after: tuple[str, ...]


def supported_lines() -> list[str]:
    """Megatron-LM lines that have a patch, oldest first."""
    folder = resources.files("fluid_npu.patches").joinpath("megatron_lm")
    names = [entry.name.removesuffix(".patch") for entry in folder.iterdir() if entry.name.endswith(".patch")]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def patch_for(checkout: Checkout) -> LaunchPatch:
    """The patch of the checkout's line. Raises CheckoutError for an unsupported one."""
    lines = supported_lines()
    if checkout.line not in lines:
        raise CheckoutError(
            f"CHECKOUT {checkout.folder}: its megatron.core is {checkout.version}; there are launch patches for "
            f"{', '.join(lines)}. Check out a tag of one of these lines, for example core_v0.16.1"
        )
    name = f"{checkout.line}.patch"
    source = resources.files("fluid_npu.patches").joinpath("megatron_lm", name)
    return parse(name, source.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> LaunchPatch:
    """Reads a unified diff of one hunk that adds one line. Raises CheckoutError for another."""
    body = [line for line in text.splitlines() if not line.startswith(("--- ", "+++ ", "@@ "))]
    added = [index for index, line in enumerate(body) if line.startswith("+")]
    if len(added) != 1 or any(line.startswith("-") for line in body):
        raise CheckoutError(f"{name}: a launch patch adds exactly one line")
    at = added[0]
    strip = lambda lines: tuple(line[1:] for line in lines)
    return LaunchPatch(name=name, before=strip(body[:at]), added=body[at][1:], after=strip(body[at + 1 :]))


def is_applied(checkout: Checkout, patch: LaunchPatch) -> bool:
    """Whether the line is in the script, wherever a user put it."""
    return patch.added in checkout.text.splitlines()


def apply(checkout: Checkout, patch: LaunchPatch) -> bool:
    """Adds the line; False when it is there already. Raises CheckoutError, changing nothing, for an unknown script."""
    if is_applied(checkout, patch):
        return False
    _refuse_other_changes(checkout, patch)
    lines = checkout.text.splitlines(keepends=True)
    lines.insert(_place(checkout, patch), patch.added + "\n")
    _write(checkout, "".join(lines))
    return True


def revert(checkout: Checkout, patch: LaunchPatch) -> bool:
    """Takes the line out; False when it is not there. Everything else in the file stays."""
    lines = checkout.text.splitlines(keepends=True)
    kept = [line for line in lines if line.rstrip("\n") != patch.added]
    if len(kept) == len(lines):
        return False
    _write(checkout, "".join(kept))
    return True


def _refuse_other_changes(checkout: Checkout, patch: LaunchPatch) -> None:
    committed = checkout.committed()
    if committed is not None and _plain(committed, patch) != _plain(checkout.text, patch):
        raise CheckoutError(
            f"{checkout.script}: has uncommitted changes; commit or stash them (git -C {checkout.folder} stash push "
            f"{checkout.script.name}), or add the line `{patch.added}` after `import torch` yourself"
        )


def _plain(text: str, patch: LaunchPatch) -> list[str]:
    return [line for line in text.splitlines() if line not in (patch.added, *_NEIGHBOURS)]


def _place(checkout: Checkout, patch: LaunchPatch) -> int:
    """The index of the new line: after the patch's lines before it, and after a neighbour's."""
    lines = checkout.text.splitlines()
    found = []
    for index in range(len(lines)):
        if tuple(lines[max(0, index - len(patch.before)) : index]) != patch.before:
            continue
        at = index
        while at < len(lines) and lines[at] in _NEIGHBOURS:
            at += 1
        if tuple(lines[at : at + len(patch.after)]) == patch.after:
            found.append(at)
    if len(found) != 1:
        raise CheckoutError(
            f"{checkout.script}: not the script that {patch.name} knows ({len(found)} places fit). Add the line "
            f"`{patch.added}` yourself, after `import torch` and before anything of megatron is imported"
        )
    return found[0]


def _write(checkout: Checkout, text: str) -> None:
    """Replaces the file in one step, keeping its mode. Raises CheckoutError if the result would not be Python."""
    script = checkout.script
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise CheckoutError(f"{script}: is not valid Python ({error}); nothing was changed") from error
    handle, temporary = tempfile.mkstemp(dir=script.parent, prefix=f".{script.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            out.write(text)
        os.chmod(temporary, script.stat().st_mode)
        os.replace(temporary, script)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
