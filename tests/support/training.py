"""A tiny model and data set to train in tests, in processes of ``run_ranks`` or through the command line."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fluid_npu.train.config import TrainConfig, validate
from tests.support.device import NAME

VOCAB = 300
CUT = {"vocab_size": VOCAB, "seq_length": 32, "micro_batch_size": 2}
WORDS = ("expert", "router", "token", "gate", "layer", "dispatch", "combine", "gradient", "hidden", "weight")


@functools.cache
def data_prefix() -> str:
    """A data set of random sentences, built once per test process."""
    from fluid_npu.train.data.build import build

    folder = Path(tempfile.mkdtemp(prefix="fluid-data-"))
    source = random.Random(0)
    lines = [" ".join(source.choices(WORDS, k=12)) + ".\n" for _ in range(4000)]
    for part in range(8):
        (folder / f"text{part}.txt").write_text("".join(lines[part::8]))
    build([folder], folder / "tiny", VOCAB)
    return str(folder / "tiny")


def tiny(out: str | Path, **changes: Any) -> TrainConfig:
    """A run of the preset h64, cut further, on two processes."""
    values: dict[str, Any] = {
        "preset": "h64",
        "cut": CUT,
        "data": data_prefix(),
        "device": NAME,
        "dtype": "fp32",
        "steps": 20,
        "lr": 5e-3,
        "warmup_steps": 3,
        "checkpoint_every": 1000,
        "out": str(out),
        "timeout": 60.0,  # rank 0 may have to make matplotlib's font cache while the other waits for it
    }
    return validate(TrainConfig(**{**values, **changes}))


def train_here(config_text: str, start: dict[str, Any] | str | None = None) -> dict[str, Any]:
    """Trains as a rank of ``run_ranks``; returns losses, digests of all weights and what the run chose.

    ``start`` are weights of the whole model by global name, to begin with instead of random ones; 'kept' returns
    this rank's random ones.
    """
    from fluid_npu.mcore.convert import load_weights, weights_by_name
    from fluid_npu.train import loop
    from fluid_npu.train.metrics import read_metrics
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    place = join(config, store())
    runs: list[loop.Run] = []
    beginning: dict[str, Any] = {}
    build = loop.Run

    def kept(*args: Any) -> loop.Run:
        runs.append(build(*args))
        if start == "kept":
            beginning.update({name: value.clone() for name, value in weights_by_name(runs[-1].chunks).items()})
        elif start is not None:
            load_weights(start, runs[-1].chunks)
        return runs[-1]

    loop.Run = kept  # type: ignore[assignment, misc]
    summary = loop.train(config, place)
    rows = read_metrics(config.out)
    return {
        "summary": summary,
        "start": beginning,
        "losses": {row["step"]: row["loss"] for row in rows},
        "weights": {name: digest(value) for name, value in _parameters(runs[0])},
        "expert_weights": [name for name in dict(_parameters(runs[0])) if "experts" in name],
    }


def _parameters(run: Any) -> Iterator[tuple[str, Any]]:
    """Of all chunks, under names that do not repeat."""
    for index, chunk in enumerate(run.chunks):
        for name, value in chunk.named_parameters():
            yield (name if len(run.chunks) == 1 else f"chunk {index} {name}"), value


def digest(tensor: Any) -> str:
    """Of the exact bits."""
    return hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()


def store() -> dist.Store:
    """A second store of the ``run_ranks`` job."""
    name = [os.path.join(tempfile.gettempdir(), f"board-{os.getpid()}-{random.random()}")]
    dist.broadcast_object_list(name, src=0)
    return dist.FileStore(name[0], dist.get_world_size())


def flags(config: TrainConfig) -> list[str]:
    """The command line of a configuration, where it differs from the default."""
    default = TrainConfig()
    words = []
    for name, value in json.loads(config.to_json()).items():
        if name == "cut":
            words += [word for key, size in value.items() for word in (f"--{key.replace('_', '-')}", str(size))]
        elif value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def start_cli(*words: str, **settings: Any) -> subprocess.Popen[str]:
    """``fluid-npu WORDS`` as a process whose output is captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("env", {})}
    command = [sys.executable, "-m", "fluid_npu", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **settings)
