"""A Megatron-LM checkout on disk: its version, its ``pretrain_gpt.py``, and what git says of that file."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = "pretrain_gpt.py"
_VERSION = "megatron/core/package_info.py"


class CheckoutError(ValueError):
    """The folder is no Megatron-LM checkout that can be worked on; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """``version`` is that of the checkout's megatron.core; ``text`` is the script as it stands."""

    folder: Path
    version: str
    text: str

    @property
    def script(self) -> Path:
        """Path of pretrain_gpt.py."""
        return self.folder / SCRIPT

    @property
    def line(self) -> str:
        """'0.16' for 0.16.1."""
        return ".".join(self.version.split(".")[:2])

    def committed(self) -> str | None:
        """The script as git has it at HEAD; None where the folder is no git work tree or git is not installed."""
        try:
            shown = subprocess.run(
                ["git", "-C", str(self.folder), "show", f"HEAD:./{SCRIPT}"], capture_output=True, check=False
            )
        except FileNotFoundError:
            return None
        return shown.stdout.decode("utf-8") if shown.returncode == 0 else None


def open_checkout(folder: Path) -> Checkout:
    """Reads what is needed. Raises CheckoutError for a folder that is not a Megatron-LM checkout."""
    script, info = folder / SCRIPT, folder / _VERSION
    missing = [str(path.relative_to(folder)) for path in (script, info) if not path.is_file()]
    if missing:
        raise CheckoutError(
            f"CHECKOUT {folder}: no {' and no '.join(missing)} there; give the folder of a Megatron-LM git checkout, "
            "which holds pretrain_gpt.py (the megatron-core wheel does not)"
        )
    text = script.read_bytes().decode("utf-8")
    if "\r" in text:
        raise CheckoutError(f"{script}: has Windows line ends; check it out with core.autocrlf=false")
    return Checkout(folder=folder, version=_version(info), text=text)


def _version(info: Path) -> str:
    values: dict[str, object] = {}
    for node in ast.parse(info.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values.update({name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)})
    try:
        return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"
    except KeyError as error:
        raise CheckoutError(f"{info}: no {error} there; is this Megatron-LM?") from error
