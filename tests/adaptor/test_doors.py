"""The three doors: Layer Spec, ``adapt([...])``, ``import fluid_npu.megatron_adaptor``; and what the last one does."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support import gpt, megatron_training
from tests.support.gpt import Run, batch, fill, make_config

WORDS = [
    *("--moe-grouped-gemm", "--num-experts", "8", "--expert-model-parallel-size", "2", "--disable-bias-linear"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    # The stand-in is not the source that the rows were written against.
    *("--fluid-device", "cpu", "--fluid-overlap", "dw", "--fluid-fingerprints", "warn"),
]


def through_spec(config: Any) -> Any:
    """Door 1."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec

    return get_fluid_moe_block_spec(config)


def through_megatron(config: Any) -> Any:
    """Doors 2 and 3: Megatron's own function, as it is now."""
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )


def launch(folder: str, *words: str) -> Any:
    """Door 3: a launch with these words, up to where pretrain_gpt.py builds its model."""
    megatron_training.install(Path(folder, str(torch.distributed.get_rank())))
    sys.argv = ["pretrain_gpt.py", *words]
    importlib.import_module("fluid_npu.megatron_adaptor")
    training = importlib.import_module("megatron.training")
    training.initialize_megatron()
    return training.get_args()


def plain(spec: Any) -> Any:
    """A spec as data: classes by name, parameters, submodules."""
    if isinstance(spec, functools.partial):
        return [plain(spec.func), [plain(item) for item in spec.args], plain(spec.keywords)]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return {field.name: plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, dict):
        return {key: plain(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [plain(item) for item in spec]
    if isinstance(spec, type) or callable(spec):
        return f"{spec.__module__}.{spec.__qualname__}"
    return type(spec).__name__ if type(spec).__module__.startswith("fluid_npu") else spec


def model_of(block: Any, config: Any) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel

    options = dict(position_embedding_type="rope", share_embeddings_and_output_weights=False)
    return GPTModel(config, block, vocab_size=gpt.VOCAB, max_sequence_length=gpt.SEQUENCE, **options)


def train(block: Any, config: Any, run: Run) -> dict[str, Any]:
    """What a block's model consists of, and its losses and gradients in two steps."""
    model = model_of(block, config)
    fill(model, run)
    losses = []
    for step in range(2):
        loss = model(**batch(torch.distributed.get_rank(), step, 0)).float().mean()
        loss.backward()
        losses.append(loss.detach())
    return {
        "modules": {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()},
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "losses": torch.stack(losses),
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def all_doors(folder: str) -> dict[str, Any]:
    import fluid_npu

    run = Run(config={"gradient_accumulation_fusion": False, "moe_layer_freq": [0, 1]})
    config = make_config(run)
    stock = through_megatron(config)
    specs = {"spec": through_spec(config)}
    with fluid_npu.adapt(["moe", "grouped_mlp", "token_dispatcher"]):
        specs["adapt"] = through_megatron(config)
        results = {"adapt": train(specs["adapt"], config, run)}
    assert plain(through_megatron(config)) == plain(stock), "rolled back"
    results["spec"] = train(specs["spec"], config, run)
    launch(folder, *WORDS)
    specs["launch"] = through_megatron(config)
    results["launch"] = train(specs["launch"], config, run)
    return {"results": results, "specs": {door: plain(spec) for door, spec in specs.items()}, "stock": plain(stock)}


def test_three_doors_one_model(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks = run_ranks(2, all_doors, str(tmp_path), sizes={"expert_model_parallel_size": 2})
    for outcome in ranks:
        doors, specs = outcome["results"], outcome["specs"]
        first = doors["spec"]
        assert any(name.endswith("FluidMoELayer") for name in first["modules"].values())
        assert "FluidMoELayer" in str(specs["spec"]) and "FluidMoELayer" not in str(outcome["stock"])
        for door in ("adapt", "launch"):
            other = doors[door]
            assert specs[door] == specs["spec"]
            assert other["modules"] == first["modules"] and other["shapes"] == first["shapes"]
            assert torch.equal(other["losses"], first["losses"])
            assert all(torch.equal(other["grads"][name], grad) for name, grad in first["grads"].items())
    assert torch.isfinite(ranks[0]["results"]["spec"]["losses"]).all()


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
