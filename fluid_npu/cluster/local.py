"""Runs a job with tiny sizes on this machine: Megatron-LM's own pretrain_gpt.py, or our trainer where there is none."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fluid_npu.cluster import files, flags, tiny
from fluid_npu.cluster.checks import choose_line

#: What Megatron-LM needs on a CPU over gloo (docs/MEGATRON_LM.md); a random tokenizer and no data.
ON_A_CPU = (
    *("--fluid-device", "cpu", "--distributed-backend", "gloo", "--no-rope-fusion", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-persist-layer-norm", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "255"),
)


#: Module and package of what megatron/training imports and neither fluid_npu nor megatron-core installs.
_TRAINING_CODE = {
    **{name: name for name in ("six", "triton", "pydantic", "regex", "sentencepiece")},
    "yaml": "pyyaml",
}


class LocalError(ValueError):
    """The arguments cannot be tried; the message names them and the fix."""


def run(words: Sequence[str], *, preset: str, megatron: str, version: str, steps: int, out: str) -> int:
    """Prints what changed, then runs; returns the exit code.

    Args:
        words: Megatron-LM's arguments of the real job.
        preset: the model; with no Megatron-LM, the trainer's preset.
        megatron: the checkout, or '' for the trainer.

    Raises:
        LocalError: flags that Megatron-LM would not take, a preset that the trainer needs, a checkout without our line.
    """
    args, problems = flags.read(words, choose_line(megatron, version).value)
    if problems:
        raise LocalError("\n  ".join(problem.text() for problem in problems))
    values, changes = tiny.shrink(args, steps)
    print("local: the same arguments with tiny sizes on two CPU processes")
    for change in changes:
        print(f"  {change.text()}")
    command = _megatron(megatron, values) if megatron else _trainer(preset, values, out)
    print(f"local: {' '.join(command[1:] if command[0] == sys.executable else command)}", flush=True)
    return subprocess.run(command, env=_environment(), check=False).returncode


def _trainer(preset: str, values: dict[str, object], out: str) -> list[str]:
    """Without Megatron-LM: `fluid-npu train`, which has real Megatron-Core and no argument parser of Megatron-LM."""
    if preset == "none":
        raise LocalError("--preset none: without --megatron our trainer runs, and needs a preset; name one")
    mapped, left_out = tiny.trainer_flags(preset, values)
    print("local: MEGATRON is not set, so our own trainer runs (Megatron-Core without Megatron-LM's pretrain_gpt.py);")
    print(f"  it has no counterpart for {', '.join(left_out)}")
    return [sys.executable, "-m", "fluid_npu", "train", "--device", "cpu", *mapped, *(["--out", out] if out else [])]


def _megatron(megatron: str, values: dict[str, object]) -> list[str]:
    """With Megatron-LM: its pretrain_gpt.py under torchrun."""
    problems = files.check_checkout(megatron)
    if problems:
        raise LocalError(problems[0].text())
    if "--multi-latent-attention" in values:
        raise LocalError(
            "--multi-latent-attention: with --transformer-impl local only MindSpeed makes Megatron-LM take it, and "
            "MindSpeed has no CPU; unset MEGATRON to try the script with our own trainer"
        )
    missing = [package for module, package in _TRAINING_CODE.items() if importlib.util.find_spec(module) is None]
    if missing:
        fix = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise LocalError(f"MEGATRON {megatron}: its training code needs more than fluid_npu installs; {fix}")
    replaced = {word for word in ON_A_CPU if word.startswith("--")}
    kept = {flag: value for flag, value in values.items() if flag not in replaced}
    launch = ["--nnodes", "1", "--nproc-per-node", str(tiny.RANKS), "--master-port", str(_free_port())]
    script = str(Path(megatron, "pretrain_gpt.py"))
    return [sys.executable, "-m", "torch.distributed.run", *launch, script, *tiny.words_of(kept), *ON_A_CPU]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    """One thread for each process; torch.compile, which Megatron's fused functions use, needs a compiler: off."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
