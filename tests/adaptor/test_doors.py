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

from tests.support.doors import WORDS, launch, model_of, through_megatron, train
from tests.support.gpt import Run, batch, make_config, same_bits


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


FULL = ["--fluid-overlap", "full", "--fluid-moe-chunks", "2", "--fluid-dispatch", "plain"]


def launched_in_chunks(folder: str) -> dict[str, Any]:
    """What a launch with ``FULL`` builds and trains, and what the Layer Spec does with the same words and without."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec

    run = Run(config={"gradient_accumulation_fusion": False, "moe_layer_freq": [0, 1]})
    config = make_config(run)
    found = {"dw": train(get_fluid_moe_block_spec(config), config, run)}
    found["spec"] = train(get_fluid_moe_block_spec(config, overlap="full", chunks=2), config, run)
    launch(folder, *WORDS, *FULL)
    found["launch"] = train(through_megatron(config), config, run)
    model = model_of(through_megatron(config), config)
    chunks = [tuple(module.chunks) for module in model.modules() if hasattr(module, "token_dispatcher")]
    return {"found": found, "chunks": chunks}


def test_a_launch_in_chunks_trains_as_the_layer_spec_and_as_one_piece(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for rank in run_ranks(2, launched_in_chunks, str(tmp_path), sizes={"expert_model_parallel_size": 2}):
        assert rank["chunks"] == [(2, "as asked")]
        launch, *others = (rank["found"][door] for door in ("launch", "spec", "dw"))
        for other in others:
            assert torch.equal(launch["losses"], other["losses"])
            assert not same_bits(launch["grads"], other["grads"])


LOCAL = ["--fluid-overlap", "full", "--fluid-moe-chunks", "1", "--fluid-local-first", "--fluid-moe-cuda-graph", "auto"]


def launched_with_local_rows_first(folder: str) -> dict[str, Any]:
    """What a launch with ``LOCAL`` builds and trains, and what the Layer Spec does with the same words."""
    from fluid_npu.device import choice
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec

    run = Run(config={"gradient_accumulation_fusion": False, "moe_layer_freq": [0, 1]})
    config = make_config(run)
    found = {"spec": train(get_fluid_moe_block_spec(config, overlap="full", chunks=1, local_first=True), config, run)}
    launch(folder, *WORDS, *LOCAL, "--overlap-grad-reduce")
    found["launch"] = train(through_megatron(config), config, run)
    model = model_of(through_megatron(config), config)
    first = [tuple(module.local_first) for module in model.modules() if hasattr(module, "token_dispatcher")]
    said = {what: one for what, one in choice.announced()}
    return {"found": found, "first": first, "said": said}


def test_a_launch_with_local_rows_first_trains_as_the_layer_spec(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for rank in run_ranks(2, launched_with_local_rows_first, str(tmp_path), sizes={"expert_model_parallel_size": 2}):
        assert rank["first"] == [(True, "as asked")]
        recorded, reduced = (rank["said"][what] for what in ("recorded MoE layers", "last reduction of gradients"))
        assert not recorded.value and "use dispatch='static' or 'once-per-rank'" in recorded.reason
        assert reduced.value == "nothing" and "--fluid-carry-over" in reduced.reason
        launch, spec = (rank["found"][door] for door in ("launch", "spec"))
        assert torch.equal(launch["losses"], spec["losses"]) and not same_bits(launch["grads"], spec["grads"])


def launched_over_peer_copies(folder: str) -> dict[str, Any]:
    """What a launch with another transport trains, over which one, and what the Layer Spec does without."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec
    from fluid_npu.schedule.live import get_backward_scheduler

    run = Run(config={"gradient_accumulation_fusion": False, "moe_layer_freq": [0, 1]})
    config = make_config(run)
    found: dict[str, Any] = {"spec": train(get_fluid_moe_block_spec(config), config, run)}
    launch(folder, *WORDS, "--fluid-a2a-transport", "peer-copy")
    found["launch"] = train(through_megatron(config), config, run)
    model = model_of(through_megatron(config), config)
    return {**found, "name": get_backward_scheduler(model).transport.name}


def test_a_launch_chooses_its_transport(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for rank in run_ranks(2, launched_over_peer_copies, str(tmp_path), sizes={"expert_model_parallel_size": 2}):
        assert rank["name"] == "peer-copy"
        assert torch.equal(rank["launch"]["losses"], rank["spec"]["losses"])
        assert not same_bits(rank["launch"]["grads"], rank["spec"]["grads"])


def launched_with_ctas(folder: str) -> tuple[str, int]:
    """What a launch asks of the transports."""
    from fluid_npu.adaptor import transport
    from fluid_npu.adaptor.moe import binder
    from fluid_npu.comm.transports import CollectiveTransport
    from fluid_npu.device import Choice

    asked: list[tuple[str, int]] = []

    def choose(wanted: str, *rest: Any, ctas: int, **more: Any) -> Choice[Any]:
        asked.append((wanted, ctas))
        return Choice(CollectiveTransport(), "there is no NCCL here")

    transport.choose_transport = choose
    launch(folder, *WORDS, "--fluid-a2a-transport", "high-priority", "--fluid-a2a-ctas", "16")
    binder()
    return asked[0]


def test_a_launch_says_how_many_ctas(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    found = run_ranks(2, launched_with_ctas, str(tmp_path), sizes={"expert_model_parallel_size": 2})
    assert found == [("high-priority", 16)] * 2


def too_early() -> str:
    from fluid_npu.adaptor import adapt
    from fluid_npu.adaptor.moe import binder

    with adapt(["moe"], a2a_transport="peer-copy"):
        try:
            binder()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_a_transport_needs_the_groups_of_the_job(run_ranks: Callable[..., list[Any]]) -> None:
    assert "call parallel_state.initialize_model_parallel() before" in run_ranks(1, too_early)[0]


def attention_of_a_launch(folder: str) -> list[int]:
    """In how many parts the attentions of a launch compute their heads."""
    launch(
        folder, *WORDS, "--context-parallel-size", "2", "--fluid-attention-chunks", "2", "--fluid-interleave-batches"
    )
    config = make_config(Run(config={"context_parallel_size": 2, "num_query_groups": 4, "cp_comm_type": "ulysses"}))
    model = model_of(through_megatron(config), config)
    assert all(layer.interleave_batches for layer in model.decoder.layers)
    return [len(m.head_chunks.chunks) for m in model.modules() if getattr(m, "head_chunks", None) is not None]


def test_a_launch_hands_its_attention_chunks_on(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    sizes = {"expert_model_parallel_size": 2, "context_parallel_size": 2}
    assert run_ranks(2, attention_of_a_launch, str(tmp_path), sizes=sizes) == [[2, 2], [2, 2]]


def test_without_megatron_lm_the_import_says_where_to_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fluid_npu.megatron_adaptor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "no megatron.training on the path" in done.stderr and "Start pretrain_gpt.py from its checkout" in done.stderr
    )
