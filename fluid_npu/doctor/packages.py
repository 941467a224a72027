"""Package versions, and whether their combination is one that was tested, one that may work, or one that cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution

from fluid_npu.doctor.finding import Item

VersionOf = Callable[[str], str | None]

PYTHONS = {(3, 10): "import, nightly", (3, 11): "every commit", (3, 12): "2 x H200, 2026-11-21"}
#: Where each torch was run; the range is that of pyproject.toml.
TORCHES = {(2, 7): "every test, CPU, 2026-11-21", (2, 11): "2 x H200, 2026-11-21", (2, 13): "every commit, CPU"}
TORCH_RANGE = ((2, 6), (2, 13))
PYPI_NEEDS_312 = (0, 17)
NEEDS_TRITON = (0, 18)  # seen at 0.18.2: transformer/moe/paged_stash.py imports it unguarded
_OTHERS = ("numpy", "tokenizers", "tqdm", "tensorboard", "einops", "psutil")


def installed_version(project: str) -> str | None:
    """The version of a distribution on this path; None where it is not installed.

    Not ``importlib.metadata.version``: MindSpeed wraps that to answer for packages that are not there.
    """
    try:
        return distribution(project).version
    except PackageNotFoundError:
        return None


def package_items(
    python: tuple[int, int], version_of: VersionOf, lines: Mapping[str, str] | Sequence[str], torch_problem: str = ""
) -> list[Item]:
    """Python, torch, megatron-core and what stands beside them.

    ``lines``: the supported Megatron lines ('0.16'); ``torch_problem``: why torch does not import, if it does not.
    """
    torch, megatron = version_of("torch"), version_of("megatron-core")
    return [
        python_item(python),
        torch_item(torch, torch_problem),
        megatron_item(megatron, lines, python),
        *_torch_npu_items(version_of("torch-npu"), torch),
        *_triton_items(megatron, version_of("triton") or version_of("pytorch-triton")),
        _others_item(version_of),
    ]


def python_item(python: tuple[int, int]) -> Item:
    """3.10 to 3.12."""
    name = ".".join(map(str, python))
    if python in PYTHONS:
        return Item(name="Python", level="ok", text=f"{name} (tested: {PYTHONS[python]})")
    return Item(
        name="Python",
        level="wrong",
        text=f"{name}: 3.10, 3.11 and 3.12 are supported",
        fix="make a virtual environment with one of them",
    )


def torch_item(version: str | None, problem: str = "") -> Item:
    """2.6 to 2.13; the text says where this one was tested, if it was."""
    fix = "pip install torch (2.6 to 2.13)"
    if version is None:
        return Item(name="torch", level="wrong", text="not installed", fix=fix)
    if problem:
        return Item(name="torch", level="wrong", text=f"{version} cannot be imported: {problem}", fix=f"re{fix[4:]}")
    minor = minor_of(version)
    low, high = TORCH_RANGE
    if minor is None or not low <= minor <= high:
        return Item(name="torch", level="wrong", text=f"{version} is outside 2.6 to 2.13", fix=fix)
    if minor in TORCHES:
        return Item(name="torch", level="ok", text=f"{version} (tested: {TORCHES[minor]})")
    tested = ", ".join(f"{major}.{minor}" for major, minor in TORCHES)
    return Item(name="torch", level="note", text=f"{version} is in the range and not tested; tested are {tested}")


def megatron_item(version: str | None, lines: Mapping[str, str] | Sequence[str], python: tuple[int, int]) -> Item:
    """A line with a manifest of ours; 0.17 and later come from PyPI for Python 3.12 alone."""
    allowed = ", ".join(lines)
    if version is None:
        fix = "pip install 'megatron-core>=0.16.1,<0.17'"
        return Item(name="megatron-core", level="wrong", text="not installed", fix=fix)
    line = ".".join(version.split(".")[:2])
    if line not in lines:
        text = f"{version}: supported lines are {allowed}"
        return Item(name="megatron-core", level="wrong", text=text, fix="pip install 'megatron-core>=0.16.1,<0.17'")
    minor = minor_of(version)
    if minor is not None and minor >= PYPI_NEEDS_312 and python < (3, 12):
        text = f"{version}, for Python 3.12 on PyPI: an unpacked wheel works here but for its compiled data helper"
        return Item(name="megatron-core", level="note", text=text)
    return Item(name="megatron-core", level="ok", text=f"{version} (supported lines: {allowed})")


def _torch_npu_items(torch_npu: str | None, torch: str | None) -> list[Item]:
    if torch_npu is None:
        return []
    return [torch_npu_match(torch_npu, torch)]


def torch_npu_match(torch_npu: str, torch: str | None) -> Item:
    """torch_npu is built against one release of torch: 2.7.1.post2 for 2.7.1."""
    wanted, have = _release(torch_npu), _release(torch or "")
    if wanted == have:
        return Item(name="torch-npu", level="ok", text=f"{torch_npu}, built for this torch")
    return Item(
        name="torch-npu",
        level="wrong",
        text=f"{torch_npu} is built for torch {wanted}; torch is {torch or 'not installed'}",
        fix=f"pip install torch=={wanted}, or the torch-npu of torch {have or '2.7.1'}",
    )


def _triton_items(megatron: str | None, triton: str | None) -> list[Item]:
    minor = minor_of(megatron or "")
    if minor is None or minor < NEEDS_TRITON or triton is not None:
        return []
    text = f"not installed, and megatron-core {megatron} imports it on every device"
    return [Item(name="triton", level="wrong", text=text, fix="pip install --no-deps triton")]


def _others_item(version_of: VersionOf) -> Item:
    found = {name: version_of(name) for name in _OTHERS}
    missing = [name for name, version in found.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    if missing:
        fix = f"pip install {' '.join(missing)}"
        return Item(name="others", level="wrong", text=f"missing: {', '.join(missing)}; {text}", fix=fix)
    return Item(name="others", level="ok", text=text)


def minor_of(version: str) -> tuple[int, int] | None:
    """(2, 13) of '2.13.0+cpu'; None of what is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _release(version: str) -> str:
    match = re.match(r"\d+\.\d+(\.\d+)?", version)
    return match[0] if match else ""
