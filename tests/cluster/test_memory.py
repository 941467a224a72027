"""The estimate against what is published and what is measured.

Measured is a real model of Megatron on two gloo ranks: bytes of its parameters, DDP gradient buffers and distributed
optimizer, and the storages that autograd keeps after one MoE layer. docs/CLUSTERS.md quotes the differences.
"""

from __future__ import annotations

import math

import pytest

from fluid_npu.cluster import activations, flags, memory
from fluid_npu.cluster.parameters import held_by_stage
from fluid_npu.cluster.plan import Cluster, Plan
from fluid_npu.train.config import TrainConfig
from tests.support.cluster_job import NAMES, job_of

#: mixtral-tiny as Megatron-LM's flags, on two ranks.
TINY = """
--num-layers 4 --hidden-size 256 --ffn-hidden-size 896 --num-attention-heads 8 --group-query-attention
--num-query-groups 2 --seq-length 256 --normalization RMSNorm --swiglu --untie-embeddings-and-output-weights
--num-experts 8 --moe-router-topk 2 --vocab-size 4096 --make-vocab-size-divisible-by 1
--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --micro-batch-size 4 --global-batch-size 8
--use-distributed-optimizer --attention-dropout 0 --attention-softmax-in-fp32
"""


def tiny(*extra: str) -> Plan:
    args, problems = flags.read([*TINY.split(), *extra], "0.16.1")
    assert not problems
    return Plan(Cluster(nodes=1, per_node=2, imbalance=1.0), args)


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_of_a_script_have_the_published_number_of_parameters(name: str) -> None:
    checked = job_of(name).check()
    assert checked.preset is not None
    assert math.isclose(checked.plan.model.total_params(), checked.preset.published["total"], rel_tol=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_what_all_devices_hold_together_is_the_model(name: str) -> None:
    """Norms, router and padding of the vocabulary are on several devices: at most 0.5 % more."""
    plan = job_of(name).check().plan
    held = sum(
        plan.tp * held_by_stage(plan, stage).dense + plan.ep * plan.etp * held_by_stage(plan, stage).expert
        for stage in range(plan.pp)
    )
    whole = plan.model.total_params()
    assert whole <= held <= 1.005 * whole


def measured(preset: str, dtype: str) -> dict[str, int]:
    from tests.support.cluster_memory import measure

    return measure(TrainConfig(preset=preset, distributed_optimizer=True, overlap="dw"), dtype)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.nightly)])
def test_weights_gradients_and_optimizer_are_what_megatron_holds(run_ranks, dtype: str) -> None:  # type: ignore[no-untyped-def]
    sizes = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    ranks = run_ranks(2, measured, "mixtral-tiny", dtype, sizes=sizes)
    plan = tiny("--bf16") if dtype == "bf16" else tiny()
    parts = memory.estimate(plan, {})[0].parts
    for found in ranks:
        held = held_by_stage(plan, 0)
        assert held.total == found["parameters"]
        assert {name: found[name] for name in ("weights", "gradients", "optimizer")} == {
            name: parts[name] for name in ("weights", "gradients", "optimizer")
        }
    # Rows differ by rank, the estimate has their mean.
    layer = sum(found["layer"] for found in ranks) / 2
    assert math.isclose(activations.full_layer(plan, moe=True), layer, rel_tol=0.02)
    assert sum(found["rows"] for found in ranks) == 2 * activations.rows(plan)


def test_the_first_stage_holds_the_most_micro_batches() -> None:
    plan = job_of("mixtral_8x7b").check().plan
    assert [memory.layers_in_flight(plan, stage) for stage in range(4)] == [32, 24, 16, 8]


def test_interleaved_stages_hold_what_megatron_warms_up() -> None:
    """(PP - rank - 1) x 2 + (VPP - 1) x PP + 1 parts of a stage: 35 of 3 layers, one of which is the embedding."""
    plan = job_of("qwen3_235b_a22b").check().plan
    assert memory.layers_in_flight(plan, 1) == (2 * 2 + 7 * 4 + 1) * 3
    assert memory.layers_in_flight(plan, 2) == (1 * 2 + 7 * 4 + 1) * 3


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        (("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"), ()),
        (("--tensor-model-parallel-size", "4"), ()),
        (("--recompute-modules", "moe"), ()),
        (("--use-fused-rmsnorm",), ()),
    ],
)
def test_what_saves_memory_lowers_the_estimate(changes: tuple[str, ...], without: tuple[str, ...]) -> None:
    job = job_of("mixtral_8x7b")
    without = ("--recompute-modules",) if "full" in changes else without
    less = job.check(*changes, without=without).estimates[0].parts["activations"]
    assert less < job.check().estimates[0].parts["activations"]


def test_imbalance_and_more_micro_batches_raise_the_estimate() -> None:
    job = job_of("mixtral_8x7b")
    usual = job.check().estimates[0].total
    assert job.check(imbalance=2.0).estimates[0].total > usual
    assert job.check(without=["--use-distributed-optimizer", "--overlap-param-gather"]).estimates[0].total > usual
