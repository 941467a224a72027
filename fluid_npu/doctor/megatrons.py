"""Two Megatrons on the path: a checkout on PYTHONPATH and a wheel in site-packages. Which one wins, part by part.

``megatron`` is a namespace package: ``megatron.core`` comes from the first folder of the path that has it, and
``megatron.training`` (on PyPI from 0.18 on) from the first that has that. The two can be of different versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluid_npu.doctor.finding import Item

_UNKNOWN = "unknown version"


@dataclass(frozen=True, kw_only=True)
class Portion:
    """One folder of the path that has a ``megatron``. ``core``: its version, None without ``megatron/core``."""

    root: str
    core: str | None
    training: bool


def find_portions(path: Sequence[str]) -> list[Portion]:
    """The folders of ``path`` with a megatron, in order and each once. Imports nothing."""
    found: dict[str, Portion] = {}
    for entry in path:
        root = Path(entry or os.curdir)
        folder = root / "megatron"
        key = str(root.resolve())
        core = (folder / "core" / "__init__.py").is_file()
        training = (folder / "training" / "__init__.py").is_file()
        if core or training:
            found[key] = Portion(root=key, core=_core_version(folder) if core else None, training=training)
    return list(found.values())


def megatron_items(
    portions: Sequence[Portion], metadata: str | None, on_pythonpath: Callable[[str], bool]
) -> list[Item]:
    """What is imported and what is shadowed.

    ``metadata``: the installed distribution's version, which pip and other tools go by; ``on_pythonpath``: whether a
    folder is on PYTHONPATH.
    """
    cores = [portion for portion in portions if portion.core is not None]
    if not cores:
        return [Item(name="megatron.core", level="wrong", text="not on the path", fix="pip install megatron-core")]
    winner = cores[0]
    text = f"{winner.core} from {_place(winner, on_pythonpath)}"
    items = [Item(name="megatron.core", level="ok", text=text)]
    for other in cores[1:]:
        items.append(_shadowed(other, winner, on_pythonpath))
    if metadata is not None and winner.core not in (metadata, _UNKNOWN):
        items.append(_metadata_lies(metadata, winner))
    training = next((portion for portion in portions if portion.training), None)
    if training is not None:
        items.append(_training_item(training, winner, on_pythonpath))
    return items


def imported_core(portions: Sequence[Portion]) -> str | None:
    """The version of the ``megatron.core`` that an import takes; None where there is none or it does not say."""
    found = next((portion.core for portion in portions if portion.core is not None), None)
    return None if found == _UNKNOWN else found


def here_item(cwd: Portion | None, portions: Sequence[Portion]) -> list[Item]:
    """A Megatron-LM checkout in the current folder, which wins when ``pretrain_gpt.py`` is started in it."""
    if cwd is None or cwd.root in {portion.root for portion in portions}:
        return []
    text = (
        f"{cwd.core or 'no core'} in the current folder: python pretrain_gpt.py puts its own folder first on the path"
    )
    return [Item(name="here", level="note", text=text)]


def _shadowed(other: Portion, winner: Portion, on_pythonpath: Callable[[str], bool]) -> Item:
    text = f"{other.core} in {_place(other, on_pythonpath)} is shadowed and never imported"
    if other.core == winner.core:
        return Item(name="second megatron", level="note", text=text)
    fix = f"take {winner.root} off PYTHONPATH" if on_pythonpath(winner.root) else "pip uninstall megatron-core"
    return Item(name="second megatron", level="warn", text=text, fix=f"keep one: {fix}, or make both the same version")


def _metadata_lies(metadata: str, winner: Portion) -> Item:
    return Item(
        name="metadata",
        level="warn",
        text=f"pip and importlib.metadata say {metadata}, imported is {winner.core}: ours goes by what is imported, "
        "other tools may not",
        fix=f"pip install megatron-core=={winner.core}, or take {winner.root} off the path",
    )


def _training_item(training: Portion, winner: Portion, on_pythonpath: Callable[[str], bool]) -> Item:
    place = _place(training, on_pythonpath)
    if training.root == winner.root or training.core == winner.core:
        return Item(name="megatron.training", level="ok", text=f"from {place}")
    return Item(
        name="megatron.training",
        level="wrong",
        text=f"from {place}, which is {training.core or _UNKNOWN}: two versions would be mixed",
        fix=f"put {training.root} before {winner.root} on PYTHONPATH",
    )


def _place(portion: Portion, on_pythonpath: Callable[[str], bool]) -> str:
    kind = "PYTHONPATH" if on_pythonpath(portion.root) else "site-packages" if "-packages" in portion.root else "path"
    return f"{portion.root} ({kind})"


def _core_version(folder: Path) -> str:
    try:
        text = (folder / "core" / "package_info.py").read_text(encoding="utf-8")
    except OSError:
        return _UNKNOWN
    numbers = [re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    extra = re.search(r"^PRE_RELEASE = ['\"](.*)['\"]", text, re.M)
    if not all(numbers):
        return _UNKNOWN
    return ".".join(match[1] for match in numbers if match) + (extra[1] if extra else "")
