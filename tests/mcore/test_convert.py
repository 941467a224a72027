"""Weights and gradients carried between stock SequentialMLP and grouped experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.device import NAME, here


def _models(**cuts: dict[str, int]) -> list[Any]:
    from fluid_npu.train.config import TrainConfig
    from fluid_npu.train.model import build_model, build_model_config

    models = []
    for impl in ("stock", "fluid"):
        config = TrainConfig(preset="h64", device=NAME, impl=impl, cut=cuts.get(impl, {}))
        models.append(here(build_model(config, build_model_config(config, "fp32"), "off")))
    return models


def _round_trip() -> dict[str, Any]:
    from fluid_npu.mcore.convert import copy_weights, weights_by_name

    stock, fluid = _models()
    before = {name: value.clone() for name, value in weights_by_name(stock).items()}
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    different = not torch.equal(weights_by_name(fluid)[name], before[name])
    copy_weights(stock, fluid)
    first = 4 * dist.get_rank()
    experts = fluid.decoder.layers[1].mlp.experts
    fc1 = experts.weight1.view(experts.fc1_view)[2]
    fc2 = experts.weight2.view(experts.fc2_view)[2]
    found = {
        "fc1": torch.equal(fc1.t(), before[f"decoder.layers.1.mlp.experts.{first + 2}.linear_fc1.weight"]),
        "fc2": torch.equal(fc2.t(), before[f"decoder.layers.1.mlp.experts.{first + 2}.linear_fc2.weight"]),
        "same_names": weights_by_name(fluid).keys() == before.keys(),
        "different": different,
    }
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
    copy_weights(fluid, stock)
    found["back"] = all(torch.equal(value, before[name]) for name, value in weights_by_name(stock).items())
    return found


def _gradients() -> dict[str, Any]:
    from fluid_npu.mcore.convert import gradients_by_name

    _, fluid = _models()
    experts = fluid.decoder.layers[0].mlp.experts
    numbers = torch.arange(experts.weight1.numel(), dtype=torch.float32)
    experts.weight1.main_grad = here(numbers.view(experts.weight1.shape))
    grads = gradients_by_name(fluid)
    name = f"decoder.layers.0.mlp.experts.{4 * dist.get_rank() + 3}.linear_fc1.weight"
    view = grads[name]
    view.mul_(0.0)
    return {
        "shape": tuple(view.shape),
        "writes_through": float(experts.weight1.main_grad.view(experts.fc1_view)[3].abs().sum()) == 0.0,
        "none_is_zero": float(grads["decoder.final_layernorm.weight"].abs().sum()) == 0.0,
    }


def _mismatch() -> str:
    from fluid_npu.mcore.convert import copy_weights

    stock, fluid = _models(fluid={"layers": 1, "moe_ffn": 32})
    before = [parameter.clone() for parameter in fluid.parameters()]
    try:
        copy_weights(stock, fluid)
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, fluid.parameters(), strict=True)), "something was copied"
        return str(error)
    return ""


EP2 = {"expert_model_parallel_size": 2}


def test_weights_travel_both_ways_under_global_expert_numbers(run_ranks: Callable[..., list[Any]]) -> None:
    for rank in run_ranks(2, _round_trip, sizes=EP2):
        assert all(rank.values()), rank


def test_gradients_are_views_in_the_stock_layout(run_ranks: Callable[..., list[Any]]) -> None:
    for rank in run_ranks(2, _gradients, sizes=EP2):
        assert rank == {"shape": (256, 64), "writes_through": True, "none_is_zero": True}


def test_what_does_not_match_is_named_and_nothing_copied(run_ranks: Callable[..., list[Any]]) -> None:
    message = run_ranks(1, _mismatch, sizes={})[0]
    assert "only the source has decoder.layers.1." in message


@pytest.mark.parametrize("wrapped", [0, 2])
def test_unwrap_finds_the_model_inside(wrapped: int) -> None:
    from fluid_npu.mcore.convert import unwrap

    inner: torch.nn.Module = torch.nn.Linear(2, 2)
    outer = inner
    for _ in range(wrapped):
        holder = torch.nn.Module()
        holder.module = outer
        outer = holder
    assert unwrap(outer) is inner
