"""What ``scripts/gpu_attention.py`` profiles, its order of parts and its one archive."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_block import config

ROOT = Path(__file__).resolve().parents[2]


def script() -> Any:
    """scripts/gpu_attention.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_attention", ROOT / "scripts" / "gpu_attention.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_attention"] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


def profiled() -> str:
    from fluid_npu.bench.block_ops import measure
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    one = config("mixtral-8x7b")
    options = {"impls": ["stock-te", "ours-attention-chunks"], "activation": "preset"}
    return str(measure(one, options, join(one, store()))["text"])


@pytest.mark.host
def test_the_parts_of_an_iteration_and_the_operators_of_a_step(run_ranks: Callable[..., list[Any]]) -> None:
    text = run_ranks(2, profiled)[0]
    assert "== stock with TE, ring: left out, Transformer Engine runs on CUDA alone" in text
    line = next(line for line in text.splitlines() if line.startswith("ms of each part of an iteration"))
    assert [part.split()[0] for part in line.split(": ")[1].split(", ")] == ["clear", "forward", "backward", "reduce"]
    assert re.search(r"host profiled: \d+ calls of operators", text) and "  waits for the device: " in text
    assert re.search(r"^ +\d+ x +[\d.]+ us  \S", text, re.MULTILINE), "operators by time"


def test_pairs_run_in_the_order_given_and_leave_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = script(), []

    def run(part: Any, work: Path, limit: float) -> None:
        ran.append((part.regime, part.name, part.environment.get("NCCL_P2P_DISABLE")))
        part.status = "ok"
        (work / f"{part.regime}-{part.name}").mkdir()
        (work / f"{part.regime}-{part.name}" / "block.json").write_text("{}")

    monkeypatch.setattr(module, "_run", run)
    asked = ["gpu_attention.py", str(tmp_path), "--device", "cpu", "--tiny", "--order", "p2p-off:ops", "nvlink:dbrx"]
    monkeypatch.setattr(sys, "argv", asked)
    assert module.main() == 0 and ran == [("p2p-off", "ops", "1"), ("nvlink", "dbrx", None)]
    assert {path.name for path in tmp_path.iterdir()} == {"attention.txt", "attention.json", "parts.tar.gz"}
    with tarfile.open(tmp_path / "parts.tar.gz") as packed:
        assert {"p2p-off-ops/block.json", "nvlink-dbrx/block.json"} <= set(packed.getnames())


def test_a_pair_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'nvlink:dbrxx': REGIME:PART of nvlink, p2p-off"):
        script()._pair("nvlink:dbrxx")
