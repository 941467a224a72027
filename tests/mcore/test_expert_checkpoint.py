"""Distributed checkpoints exchanged with stock SequentialMLP and legacy GroupedMLP, both ways, and across EP sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpt import Run, fill, make_config, make_model, same_bits

Ranks = Callable[..., list[Any]]


def save(run: Run, folder: str, metadata: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """Saves a filled model and returns its weights by global name."""
    from megatron.core import dist_checkpointing

    from fluid_npu.mcore.convert import weights_by_name

    model = make_model(run, make_config(run))
    fill(model, run)
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), folder)
    return {name: value.clone() for name, value in weights_by_name(model).items()}


def load(run: Run, folder: str, metadata: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """Loads into a model of other weights."""
    from megatron.core import dist_checkpointing

    from fluid_npu.mcore.convert import weights_by_name

    model = make_model(run, make_config(run))
    state = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), folder)
    model.load_state_dict(state)
    return {name: value.clone() for name, value in weights_by_name(model).items()}


@pytest.mark.parametrize("singletons", [False, True], ids=["stacked", "singletons"])
@pytest.mark.parametrize(
    "direction", ["stock_to_ours", "ours_to_stock", "grouped_to_ours", "ours_to_grouped", "ours_ep2_to_ours_ep1"]
)
def test_exchange_with_stock(direction: str, singletons: bool, run_ranks: Ranks, tmp_path: Path) -> None:
    metadata = {"singleton_local_shards": True} if singletons else None
    stock, ours = Run(impl="grouped" if "grouped" in direction else "stock"), Run()
    source, target = (stock, ours) if direction.endswith("_to_ours") else (ours, stock)
    if direction == "ours_ep2_to_ours_ep1":
        source, target = ours, replace(ours, ep=1)
    written = run_ranks(2, save, source, str(tmp_path), metadata, sizes={"expert_model_parallel_size": 2})
    read = run_ranks(target.ep, load, target, str(tmp_path), metadata, sizes={"expert_model_parallel_size": target.ep})
    if target.ep == 2:
        for a, b in zip(written, read, strict=True):
            assert not same_bits(a, b)
    else:
        assert not same_bits({**written[0], **written[1]}, read[0])
