"""The launch door: what ``import fluid_npu.megatron_adaptor`` does. That all doors give one model: tests/lines."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.doors import WORDS, launch, model_of, through_megatron
from tests.support.gpt import Run, batch, make_config


def launched(folder: str) -> dict[str, Any]:
    """A launch with a report: what was parsed, applied and written."""
    from fluid_npu import adaptor

    args = launch(
        folder,
        *WORDS,
        "--gemm-gradient-accumulation-fusion",
        "--fluid-report",
        f"{folder}/report",
        "--fluid-twin-every",
        "2",
    )
    rows = [state.patch.target for state in adaptor.status() if state.applied]
    importlib.reload(sys.modules["fluid_npu.megatron_adaptor"])
    training = importlib.import_module("megatron.training.training")
    again = [state.patch.target for state in adaptor.status() if state.applied]
    run = Run(config={"gradient_accumulation_fusion": False})
    config = make_config(run)
    model = model_of(through_megatron(config), config)

    def step(_data: Any, chunks: Any) -> None:
        chunks[0](**batch(torch.distributed.get_rank(), 0, 0)).float().mean().backward()

    training.train(step, [model], *[None] * 8)
    fused = [module.fuse_dw for module in model.modules() if hasattr(module, "fuse_dw")]
    return {"args": vars(args), "once": rows == again, "fused": fused}


def test_a_launch_validates_switches_on_and_reports(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks = run_ranks(2, launched, str(tmp_path), sizes={"expert_model_parallel_size": 2})
    for outcome in ranks:
        assert outcome["once"], "a second import changes nothing"
        assert outcome["fused"] == [True, True], "--gemm-gradient-accumulation-fusion reaches the experts"
        assert outcome["args"]["validated"] and outcome["args"]["moe_grouped_gemm"], "hidden during validation only"
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["steps"] == 6 and report["overlap"] == "dw"
    assert {"device", "overlap"} <= {choice["what"] for choice in report["choices"]}
    hits = {patch["target"].rpartition(".")[2]: patch["hits"] for patch in report["patches"]}
    assert hits["train_step"] == 6 and hits["get_gpt_decoder_block_spec"] == 1
    assert any(target.endswith("get_gpt_mtp_block_spec") for target in report["never_reached"])
    assert report["totals"]["total_dw_tasks"] == 6 * 2 * 2 == report["totals"]["completed_dw_tasks"]
    assert report["totals"]["a2a_bytes"] > 0 and report["communication_ms_per_twin"] > 0
    text = (tmp_path / "report" / "report.txt").read_text()
    assert "device: cpu (--fluid-device cpu)" in text and "Applied and never reached" in text


def test_without_megatron_lm_the_import_says_where_to_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fluid_npu.megatron_adaptor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "no megatron.training on the path" in done.stderr and "Start pretrain_gpt.py from its checkout" in done.stderr
    )
