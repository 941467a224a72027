"""A complete job for the check of fluid_npu.cluster: what a script passes, and the files that it names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fluid_npu.cluster.checks import Checked, check_job
from fluid_npu.cluster.plan import Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("scripts/pretrain_*.sh"))
NAMES = [path.stem.removeprefix("pretrain_") for path in SCRIPTS if path.stem != "pretrain_gpt_cpu"]
#: Prints its arguments, one on a line, as the interpreter that a script calls.
_RECORDER = '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n'


@dataclass(frozen=True)
class Job:
    """The arguments that a script hands to the check: ``settings`` before --, ``words`` after, and its environment."""

    settings: dict[str, str]
    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def preset(self) -> str:
        return self.settings["--preset"]

    def cluster(self, **changes: Any) -> Cluster:
        """The machines that the script names; node 0 has a name that others can reach."""
        values = {"nodes": int(self.settings["--nnodes"]), "per_node": int(self.settings["--nproc-per-node"])}
        return Cluster(**{**values, "master_addr": "node0", **changes})

    def check(
        self,
        *extra: str,
        without: Sequence[str] = (),
        env: dict[str, str] | None = None,
        megatron: str = "",
        version: str = "",
        files: bool = False,
        **cluster: Any,
    ) -> Checked:
        """Checks the job with flags replaced by ``extra`` and others taken out."""
        given = [word for word in extra if word.startswith("--")]
        words = [*drop(self.words, [*given, *without]), *extra]
        return check_job(
            words,
            self.cluster(**cluster),
            preset=self.preset,
            megatron=megatron,
            version=version,
            env={**self.env, **(env or {})},
            look_for_files=files,
        )


def drop(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Words without some flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = word not in flags
        if keep:
            kept.append(word)
    return kept


def run_script(name: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs scripts/NAME.sh by this interpreter, with an environment without this machine's HCCL settings."""
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *arguments]
    environment = {**clean_environment(), "PYTHON": sys.executable, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def clean_environment() -> dict[str, str]:
    """This process's environment without what the scripts set or read."""
    ours = ("HCCL_", "ASCEND_", "TASK_QUEUE", "CUDA_DEVICE", "MULTI_STREAM", "FLUID_OVERLAP", "MASTER_", "NODE_RANK")
    named = ("NNODES", "MEGATRON", "MEGATRON_VERSION", "DATA", "TOKENIZER", "OUT", "PYTHON", "NPUS_PER_NODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in named}


@cache
def job_of(name: str) -> Job:
    """What scripts/pretrain_NAME.sh --dry-run asks the check, and the environment it prints."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorder = Path(folder, "python")
        recorder.write_text(_RECORDER)
        recorder.chmod(0o755)
        done = run_script(f"pretrain_{name}", "--dry-run", env={"PYTHON": str(recorder)})
    assert done.returncode == 0, done.stderr
    recorded, _, printed = done.stdout.partition("\nenvironment of every node:\n")
    lines = recorded.splitlines()
    assert lines[:4] == ["-m", "fluid_npu", "cluster", "check"], lines[:4]
    split = lines.index("--")
    settings = dict(zip(lines[4:split:2], lines[5:split:2], strict=True))
    exports = [line.split("export ", 1)[1] for line in printed.splitlines() if line.startswith("  export ")]
    env = {name: value.replace("\\", "") for name, _, value in (line.partition("=") for line in exports)}
    return Job(settings, tuple(lines[split + 1 :]), env)


def make_checkout(folder: Path, version: str = "0.12.1", patched: bool = True, mindspeed: bool = True) -> Path:
    """A folder that looks like a Megatron-LM checkout; only its launch line and version are there."""
    (folder / "megatron" / "core").mkdir(parents=True)
    major, minor, patch = version.split(".")
    info = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"
    (folder / "megatron" / "core" / "package_info.py").write_text(info)
    line = "import fluid_npu.megatron_adaptor\n" if patched else ""
    theirs = "import mindspeed.megatron_adaptor\n" if mindspeed else ""
    (folder / "pretrain_gpt.py").write_text(f"import torch\n{theirs}{line}")
    return folder


def make_files(folder: Path) -> dict[str, str]:
    """Data, tokenizer and checkout, as the variables of a script."""
    for suffix in (".bin", ".idx"):
        (folder / f"text{suffix}").write_bytes(b"x")
    (folder / "tokenizer").mkdir()
    megatron = make_checkout(folder / "megatron-lm")
    return {"MEGATRON": str(megatron), "DATA": str(folder / "text"), "TOKENIZER": str(folder / "tokenizer")}
