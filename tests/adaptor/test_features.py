"""The feature ``late_gradients``, and the row of ``moe`` for multi-token prediction: what fails without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fluid_npu.adaptor import Registry, adapt, select
from fluid_npu.mcore.moe_layer import FluidMoELayer
from tests.support.gpt import Run, make_config, same_bits, train

MTP = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_mtp_block_spec"


def late_by_feature_and_by_hand() -> dict[str, Any]:
    """Where each weight gradient was computed, and what differs in the bits."""
    # Two steps: Megatron reduces during the backward from the second one on.
    run = Run(steps=2, config={"num_layers": 3}, spec={"carry_over": True}, ddp={"overlap_grad_reduce": True})
    by_hand = train(replace(run, ddp={**run.ddp, "delay_wgrad_compute": True}))
    with adapt(["late_gradients"]):
        by_feature = train(run)
    without = train(run)
    bits = [same_bits(other[what], by_hand[what]) for other in (by_feature, without) for what in ("grads", "weights")]
    regions = {"hand": by_hand["regions"], "feature": by_feature["regions"], "without": without["regions"]}
    return {"regions": regions, "bits": bits}


def test_late_gradients_lets_carry_over_carry_as_a_ddp_with_delay_wgrad_compute_does(
    run_ranks: Callable[..., list[Any]],
) -> None:
    for found in run_ranks(2, late_by_feature_and_by_hand, sizes={"expert_model_parallel_size": 2}):
        regions = found["regions"]
        assert regions["feature"] == regions["hand"] != regions["without"]
        beside = [regions[way]["layer 1 fc2"] == "end of backward" for way in ("feature", "without")]
        assert beside == [True, False], "FC2 of the lowest layer is left for the last reduction"
        assert found["bits"] == [[]] * 4


def mtp_specs() -> tuple[str, str]:
    """The experts' layer in the spec for multi-token prediction, and what Megatron says without our row."""
    from megatron.core.models.gpt import gpt_layer_specs

    config = make_config(Run(config={"mtp_num_layers": 1}))

    def made() -> Any:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(8, True, normalization="RMSNorm")
        return gpt_layer_specs.get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)

    with adapt(["moe"]):
        spec = made().layer_specs[0].submodules
    layer = getattr(spec, "mtp_model_layer", None) or spec.transformer_layer
    registry = Registry()
    registry.apply([row for row in select(["moe"]) if row.target != MTP])
    try:
        made()
        failed = "nothing failed"
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    finally:
        registry.rollback()
    return layer.submodules.mlp.module.__name__, failed


@pytest.mark.filterwarnings("ignore")
def test_multi_token_prediction_gets_our_layer_and_would_refuse_it_without_the_row(
    run_ranks: Callable[..., list[Any]],
) -> None:
    ((name, failed),) = run_ranks(1, mtp_specs, sizes={})
    assert name == FluidMoELayer.__name__
    assert failed.startswith("ValueError: Invalid spec"), failed
