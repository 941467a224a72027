"""GPT models with Fluid layers under Megatron's DDP: equal to stock within 1e-5, to the serialised twin bitwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.device import NAME
from tests.support.gpt import Run, far_apart, same_bits, shard, train_all

TOLERANCE = 1e-5
Ranks = Callable[..., list[Any]]

#: Features of Megatron's MoE that must come out as in stock, on two ranks with EP 2.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "aux_and_z_loss": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_z_loss_coeff": 1e-3,
    },
    "sequence_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2},
    "deepseek_router": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_bias_update_rate": 1e-2,
    },
    "capacity": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "probs"},
    "capacity_padded": {"moe_expert_capacity_factor": 1.25, "moe_pad_expert_input_to_capacity": True},
    "shared_experts": {"moe_shared_expert_intermediate_size": 40},
    "full_recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe_recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "act_recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    "one_expert_a_rank": {"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    "dense_first_layer": {"moe_layer_freq": [0, 1]},
}


def compare(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What differs from stock by more than the tolerance."""
    return {
        "losses": [
            (a, b) for a, b in zip(stock["losses"], ours["losses"], strict=True) if abs(a - b) > TOLERANCE * abs(a)
        ],
        "grads": far_apart(ours["grads"], stock["grads"], TOLERANCE),
        "weights": far_apart(ours["weights"], stock["weights"], TOLERANCE),
    }


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_stock_and_twin(feature: str, run_ranks: Ranks) -> None:
    config = FEATURES[feature]
    run = Run(config=config, micro_batches=2, block="moe_layer_freq" in config)
    # Megatron 0.16.1 recomputes "moe_act" only in grouped experts: stock keeps the activation, same numbers.
    stock_config = {} if feature == "act_recompute" else config
    runs = [replace(run, impl="stock", config=stock_config), replace(run, impl="off"), run, replace(run, impl="twin")]
    for stock, off, overlapped, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        assert not any(compare(stock, overlapped).values()), compare(stock, overlapped)
        for other in (off, twin):
            assert overlapped["losses"] == other["losses"]
            assert not same_bits(overlapped["grads"], other["grads"])
            assert not same_bits(overlapped["weights"], other["weights"])
        assert overlapped["stats"]["completed_dw_tasks"] == overlapped["stats"]["total_dw_tasks"] > 0


def test_twenty_steps_stay_equal_to_the_twin_bit_for_bit(run_ranks: Ranks) -> None:
    run = Run(steps=20, micro_batches=2, ddp={"overlap_grad_reduce": True}, spec={"carry_over": True})
    for overlapped, twin in run_ranks(
        2, train_all, [run, replace(run, impl="twin")], sizes={"expert_model_parallel_size": 2}
    ):
        assert overlapped["losses"] == twin["losses"]
        assert not same_bits(overlapped["weights"], twin["weights"])
        assert not same_bits(overlapped["grads"], twin["grads"])


DDP: dict[str, dict[str, Any]] = {
    "overlap_grad_reduce": {"ddp": {"overlap_grad_reduce": True, "bucket_size": 2000}},
    "not_fused": {"config": {"gradient_accumulation_fusion": False}, "ddp": {"overlap_grad_reduce": True}},
    "distributed_optimizer": {"distributed_optimizer": True, "optimizer": "adam"},
    "distributed_optimizer_overlap": {
        "distributed_optimizer": True,
        "optimizer": "adam",
        "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000},
    },
    "four_micro_batches": {"micro_batches": 4, "ddp": {"overlap_grad_reduce": True}},
}


@pytest.mark.parametrize("name", DDP)
def test_ddp_variants_equal_the_plain_path(name: str, run_ranks: Ranks) -> None:
    """Four ranks, EP 2: experts too are reduced over data-parallel ranks."""
    run = Run(**{"micro_batches": 2, **DDP[name]})
    runs = [replace(run, impl="stock"), replace(run, impl="off"), run]
    for stock, off, overlapped in run_ranks(4, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        # Adam divides by the root of a squared gradient: tiny differences of tiny gradients grow.
        tolerance = 1e-3 if run.optimizer == "adam" else TOLERANCE
        assert not far_apart(overlapped["weights"], stock["weights"], tolerance)
        assert overlapped["losses"] == off["losses"]
        assert not same_bits(overlapped["weights"], off["weights"])


@pytest.mark.parametrize("bucket", [0, 2000, 10**7], ids=["no_overlap", "bucket_each", "one_bucket"])
def test_carried_over_dw_lands_before_backward_returns(bucket: int, run_ranks: Ranks) -> None:
    """FC2's and the router's dW run beside the combine of the layer below, under a DDP that takes late gradients.

    With one bucket for all, Megatron reduces it when the last hook of the first step's set has fired: a hook that is
    never called would let the reduction start before the weight's gradient has landed.
    """
    ddp = {"delay_wgrad_compute": True, "overlap_grad_reduce": bucket > 0, "bucket_size": bucket or None}
    run = Run(micro_batches=2, config={"num_layers": 3}, ddp=ddp, spec={"carry_over": True})
    without = {**ddp, "delay_wgrad_compute": False}
    runs = [replace(run, impl="off", ddp=without), replace(run, ddp=without), run, replace(run, impl="twin")]
    for off, unflagged, carried, twin in run_ranks(4, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        for other, same in ((unflagged, off), (twin, carried)):
            assert other["losses"] == same["losses"]
            assert not same_bits(other["weights"], same["weights"])
        # On an NPU autograd's dW of the router and one added to main_grad are two operators, which round differently.
        assert not far_apart(carried["weights"], off["weights"], 0.0 if NAME == "cpu" else TOLERANCE)
        assert carried["regions"]["layer 3 fc2"] == carried["regions"]["layer 3 router"]
        assert carried["regions"]["layer 3 fc2"] == "backward of moe_combine AllToAll of layer 2"
        assert carried["regions"]["layer 3 fc1"] == "backward of moe_dispatch AllToAll of layer 3"
        # Below the lowest layer there is no combine: its FC2 stays with its own dispatch.
        assert carried["regions"]["layer 1 fc2"] == "backward of moe_dispatch AllToAll of layer 1"
        assert carried["regions"]["layer 1 router"] == "at once"
        assert unflagged["regions"]["layer 3 fc2"] == "backward of moe_dispatch AllToAll of layer 3"


@pytest.mark.parametrize("tp", [1, 2])
def test_expert_tensor_parallelism(tp: int, run_ranks: Ranks) -> None:
    """Experts split over two tensor ranks on four ranks with EP 2, against stock without any split.

    Stock itself cannot run this on gloo: its uneven all-gather is refused, and its norms refuse tensor parallelism.
    """
    whole = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    split = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "tensor_model_parallel_size": tp}
    run = Run(micro_batches=2, block=True)
    stock = run_ranks(4 // tp, train_all, [replace(run, impl="stock")], sizes=whole)
    ours = run_ranks(4, train_all, [run, replace(run, impl="twin")], sizes=split)
    for rank, (overlapped, twin) in enumerate(ours):
        assert not same_bits(overlapped["weights"], twin["weights"])
        assert not same_bits(overlapped["grads"], twin["grads"])
        data_rank, tp_rank = divmod(rank, tp)
        reference = stock[data_rank][0]
        assert overlapped["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
        everything = {name: value for (other,) in stock for name, value in other["weights"].items()}
        for name, value in overlapped["weights"].items():
            part = (rank % 2, 2) if ".experts." in name else (tp_rank, tp)
            error = far_apart({name: value}, {name: shard(name, everything[name], *part)}, TOLERANCE)
            assert not error, error
