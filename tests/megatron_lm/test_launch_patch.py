"""``fluid-npu megatron-lm``: on a stand-in checkout that has the few lines the patches look for."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest

from fluid_npu.cli import main
from fluid_npu.megatron_lm.launch_patch import parse, supported_lines

ADDED = "import fluid_npu.megatron_adaptor"
# What follows `import torch` in the script of each line.
AFTER = {"0.12": "from functools import partial", "0.16": "", "0.18": "", "0.19": ""}


def checkout(folder: Path, line: str = "0.16", *, git: bool = True) -> Path:
    """A checkout whose script imports torch and then Megatron, committed."""
    info = folder / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text(f"MAJOR = 0\nMINOR = {line.split('.')[1]}\nPATCH = 1\nPRE_RELEASE = ''\n")
    script = folder / "pretrain_gpt.py"
    script.write_text(f"import os\n\nimport torch\n{AFTER[line]}\nfrom megatron.training import pretrain\n")
    script.chmod(0o755)
    if git:
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as upstream"]):
            identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
            subprocess.run(["git", *identity, "-C", str(folder), *words], check=True)
    return script


def run(action: str, script: Path, *words: str) -> int:
    return main(["megatron-lm", action, str(script.parent), *words])


@pytest.mark.parametrize("line", supported_lines())
def test_the_line_goes_in_once_after_torch_and_comes_out_again(line: str, tmp_path: Path) -> None:
    script = checkout(tmp_path / "lm", line)
    before = script.read_text()
    assert run("status", script) == 1
    assert run("apply", script) == 0 == run("apply", script)
    lines = script.read_text().splitlines()
    assert lines.count(ADDED) == 1 and lines[lines.index(ADDED) - 1] == "import torch"
    assert stat.S_IMODE(script.stat().st_mode) == 0o755
    assert run("status", script) == 0
    assert run("revert", script) == 0 == run("revert", script)
    assert script.read_text() == before
    assert sorted(path.name for path in script.parent.iterdir()) == [".git", "megatron", "pretrain_gpt.py"]


def test_every_supported_line_has_a_manifest_of_its_own() -> None:
    from fluid_npu.adaptor.manifest import manifest_names

    assert [f"megatron_lm-{line}" for line in supported_lines()] == [n for n in manifest_names() if "_lm-" in n]


def test_git_itself_applies_the_patches(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "patches" / "megatron_lm"
    for line in supported_lines():
        script = checkout(tmp_path / line, line)
        command = ["git", "-C", str(script.parent), "apply", "--unidiff-zero", str(folder / f"{line}.patch")]
        subprocess.run(command, check=True)
        assert ADDED in script.read_text().splitlines()


def test_without_git_the_context_decides(tmp_path: Path) -> None:
    script = checkout(tmp_path / "lm", git=False)
    assert run("apply", script) == 0
    assert ADDED in script.read_text().splitlines()


def test_beside_the_line_of_mindspeed(tmp_path: Path) -> None:
    script = checkout(tmp_path / "lm")
    theirs = "import mindspeed.megatron_adaptor"
    script.write_text(script.read_text().replace("import torch\n", f"import torch\n{theirs}\n"))
    assert run("apply", script) == 0
    lines = script.read_text().splitlines()
    assert lines[lines.index("import torch") + 1 :][:2] == [theirs, ADDED]
    assert run("revert", script) == 0
    assert theirs in script.read_text() and ADDED not in script.read_text()


REFUSED = {
    "no checkout": (lambda script: script.unlink(), "no pretrain_gpt.py there; give the folder of a Megatron-LM"),
    "uncommitted changes": (
        lambda script: script.write_text(script.read_text() + "print('mine')\n"),
        "uncommitted changes; commit or stash them .*or add the line",
    ),
    "an unknown script": (
        lambda script: commit(script, "from torch import nn\n"),
        r"not the script that 0.16.patch knows \(0 places fit\).*after `import torch`",
    ),
    "an unsupported version": (
        lambda script: edit(script.parent / "megatron/core/package_info.py", "MINOR = 16", "MINOR = 14"),
        "its megatron.core is 0.14.1; there are launch patches for 0.12, 0.16, 0.18, 0.19. Check out a tag",
    ),
    "no version": (
        lambda script: (script.parent / "megatron/core/package_info.py").write_text(""),
        "no 'MAJOR' there; is this Megatron-LM",
    ),
    "Windows line ends": (
        lambda script: script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n")),
        "Windows line ends",
    ),
}


def commit(script: Path, text: str) -> None:
    script.write_text(text)
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *identity, "-C", str(script.parent), "commit", "-qam", "x"], check=True)


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_to_do_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = checkout(tmp_path / "lm")
    change, message = REFUSED[case]
    change(script)
    before = script.read_bytes() if script.exists() else None
    assert run("apply", script, "--json") == 2
    shown = capsys.readouterr()
    import re

    assert re.search(message, shown.err.replace("\n", " ")), shown.err
    assert json.loads(shown.out)["error"] in shown.err
    assert (script.read_bytes() if script.exists() else None) == before


def test_json_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = checkout(tmp_path / "lm")
    assert run("apply", script, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["applied"], result["changed"], result["megatron_core"]) == (True, True, "0.16.1")
    assert run("status", script, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["applied"], result["changed"]) == (True, False)


def test_a_patch_that_does_more_than_one_line_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one line"):
        parse("x.patch", "@@ -1,1 +1,2 @@\n import torch\n+import a\n+import b\n")
