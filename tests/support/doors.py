"""The three doors on the installed line: Layer Spec, ``adapt([...])``, a launch of Megatron-LM; what each builds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
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
    from fluid_npu.adaptor.megatron_lm.startup import megatron_line

    megatron_training.install(Path(folder, f"training-{torch.distributed.get_rank()}"), megatron_line())
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
    """What each door builds and trains on this rank of two; the launch stays in force."""
    import fluid_npu
    from fluid_npu.adaptor.manifest import installed_manifests

    refused = {feature for manifest in installed_manifests([]) for feature in manifest.refused}
    features = [name for name in ("moe", "grouped_mlp", "token_dispatcher") if name not in refused]
    run = Run(config={"gradient_accumulation_fusion": False, "moe_layer_freq": [0, 1]})
    config = make_config(run)
    stock = text(through_megatron(config))
    specs = {"spec": through_spec(config)}
    with fluid_npu.adapt(features):
        specs["adapt"] = through_megatron(config)
        results = {"adapt": train(specs["adapt"], config, run)}
    restored = text(through_megatron(config)) == stock
    results["spec"] = train(specs["spec"], config, run)
    launch(folder, *WORDS)
    specs["launch"] = through_megatron(config)
    results["launch"] = train(specs["launch"], config, run)
    texts = {door: text(spec) for door, spec in specs.items()}
    return {"results": results, "specs": texts, "stock": stock, "restored": restored, "features": features}


def text(spec: Any) -> str:
    """A spec as one string, to be compared between doors."""
    return json.dumps(plain(spec), default=repr, sort_keys=True)
