"""The six recipes have no errors as they stand, and each planted mistake is found with flag, value and fix."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cluster_job import NAMES, job_of


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_as_it_stands(name: str) -> None:
    checked = job_of(name).check()
    assert [problem.text() for problem in checked.problems] == []
    assert checked.exit_code == 0


def planted(kind: str, script: str, message: str, *extra: str, **changes: Any) -> Any:
    return pytest.param(kind, script, message, extra, changes, id=f"{kind}: {message[:60]}")


MISTAKES = [
    planted("overlap", "mixtral_8x7b", "--moe-fb-overlap: another engine", "--moe-fb-overlap"),
    planted("dtype", "mixtral_8x7b", "--fp16: Megatron 0.12.1 takes no expert", "--fp16", without=["--bf16"]),
    planted("flag", "mixtral_8x7b", "--num-expert: no such flag", "--num-expert", "8"),
    planted("cluster", "mixtral_8x7b", "NODE_RANK 4: must be from 0 to 3", node_rank=4),
    planted("cluster", "mixtral_8x7b", "NNODES 0: must be at least 1", nodes=0),
    planted(
        "cluster", "mixtral_8x7b", "MASTER_ADDR localhost: the other 3 nodes cannot reach it", master_addr="localhost"
    ),
    planted("cluster", "mixtral_8x7b", "MASTER_PORT 80: must be from 1024", master_port=80),
    planted("size", "mixtral_8x7b", "--micro-batch-size 0: must be at least 1", "--micro-batch-size", "0"),
    planted(
        "world",
        "mixtral_8x7b",
        "--pipeline-model-parallel-size 4: TP x PP x CP = 2 x 4 x 1 = 8 must divide",
        nodes=5,
        per_node=6,
    ),
    planted(
        "world", "mixtral_8x7b", "--expert-model-parallel-size 8: ETP x EP x PP = 1 x 8 x 4 = 32 must divide", nodes=3
    ),
    planted(
        "heads",
        "mixtral_8x7b",
        "--tensor-model-parallel-size 16: must divide --num-query-groups 8; use --tensor-model-parallel-size 8",
        "--tensor-model-parallel-size",
        "16",
    ),
    planted(
        "heads",
        "mixtral_8x7b",
        "--expert-tensor-parallel-size 3: must divide --moe-ffn-hidden-size 14336",
        "--expert-tensor-parallel-size",
        "3",
    ),
    planted(
        "layers", "mixtral_8x7b", "--pipeline-model-parallel-size 4: must divide the 31 layers", "--num-layers", "31"
    ),
    planted(
        "layers",
        "deepseek_v3",
        "--decoder-last-pipeline-num-layers 4: leaves 57 of --num-layers 61 for 7 stages",
        "--decoder-last-pipeline-num-layers",
        "4",
    ),
    planted(
        "layers",
        "qwen3_235b_a22b",
        "--num-layers-per-virtual-pipeline-stage 5: must divide the 24 layers of a stage",
        "--num-layers-per-virtual-pipeline-stage",
        "5",
    ),
    planted(
        "layers",
        "qwen3_235b_a22b",
        "--num-layers-per-virtual-pipeline-stage 3: needs --pipeline-model-parallel-size of at least 2",
        "--pipeline-model-parallel-size",
        "1",
    ),
    planted(
        "batch",
        "qwen3_235b_a22b",
        "--global-batch-size 1088: gives 17 micro-batches; interleaved stages need",
        "--global-batch-size",
        "1088",
    ),
    planted(
        "batch",
        "mixtral_8x7b",
        "--global-batch-size 130: must be a multiple of micro-batch x data-parallel ranks = 1 x 4 = 4",
        "--global-batch-size",
        "130",
    ),
    planted(
        "experts",
        "mixtral_8x7b",
        "--expert-model-parallel-size 16: must divide --num-experts 8",
        "--expert-model-parallel-size",
        "16",
    ),
    planted(
        "experts", "mixtral_8x7b", "--moe-router-topk 9: must be at most --num-experts 8", "--moe-router-topk", "9"
    ),
    planted(
        "experts",
        "mixtral_8x7b",
        "--tensor-model-parallel-size 2: with --expert-model-parallel-size 8 Megatron needs --sequence-parallel",
        without=["--sequence-parallel"],
    ),
    planted("sequence", "mixtral_8x7b", "--seq-length 4095: must be a multiple of 2", "--seq-length", "4095"),
    planted("sequence", "mixtral_8x7b", "--seq-length 4096: must be a multiple of 20", "--context-parallel-size", "5"),
    planted(
        "sequence",
        "mixtral_8x7b",
        "--max-position-embeddings 2048: must be at least --seq-length 4096",
        "--max-position-embeddings",
        "2048",
    ),
    planted("dtype", "mixtral_8x7b", "--fp16: cannot be given together with --bf16", "--fp16"),
    planted(
        "dtype",
        "mixtral_8x7b",
        "--overlap-param-gather: needs --use-distributed-optimizer",
        without=["--use-distributed-optimizer"],
    ),
    planted(
        "overlap",
        "mixtral_8x7b",
        "--moe-token-dispatcher-type allgather: --fluid-overlap full hides an AllToAll",
        "--fluid-overlap",
        "full",
        "--moe-token-dispatcher-type",
        "allgather",
    ),
    planted(
        "overlap",
        "mixtral_8x7b",
        "--moe-token-dispatcher-type allgather: --fluid-overlap dw hides an AllToAll",
        "--moe-token-dispatcher-type",
        "allgather",
    ),
    planted(
        "overlap",
        "mixtral_8x7b",
        "--expert-model-parallel-size 1: there is no AllToAll to hide",
        "--expert-model-parallel-size",
        "1",
    ),
    planted("overlap", "mixtral_8x7b", "--moe-grouped-gemm: --fluid-overlap dw defers", without=["--moe-grouped-gemm"]),
    planted(
        "overlap",
        "mixtral_8x7b",
        "--moe-grouped-gemm: grouped experts have no biases",
        without=["--disable-bias-linear"],
    ),
    planted(
        "overlap", "mixtral_8x7b", "--delay-wgrad-compute: another engine", "--delay-wgrad-compute", version="0.16.1"
    ),
    planted(
        "overlap",
        "mixtral_8x7b",
        "--gemm-gradient-accumulation-fusion: the fused dW adds into fp32",
        "--grad-reduce-in-bf16",
    ),
    planted(
        "recompute",
        "mixtral_8x7b",
        "--recompute-modules moe_act: belongs to granularity selective",
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "uniform",
        "--recompute-num-layers",
        "1",
    ),
    planted(
        "recompute",
        "deepseek_v3",
        "--recompute-granularity full: needs --recompute-method",
        without=["--recompute-method"],
    ),
    planted("recompute", "deepseek_v3", "--recompute-num-layers 9: a pipeline stage", "--recompute-num-layers", "9"),
    planted(
        "model",
        "deepseek_v3",
        "--moe-layer-freq ([0]*3+[1]*57): must name all 61 layers",
        "--moe-layer-freq",
        "([0]*3+[1]*57)",
    ),
    planted(
        "model",
        "deepseek_v3",
        "--moe-layer-freq __import__('os'): not a whole number",
        "--moe-layer-freq",
        "__import__('os')",
    ),
    planted("memory", "mixtral_8x7b", "DEVICE_MEMORY_GIB 32: pipeline stage 0 needs about", memory_gib=32.0),
    planted("memory", "mixtral_8x7b", "DEVICE_MEMORY_GIB 64: pipeline stage 0 needs about", "--micro-batch-size", "4"),
    planted(
        "environment",
        "mixtral_8x7b",
        "HCCL_EVENT_TIMEOUT 3600: must be above HCCL_EXEC_TIMEOUT 3600",
        env={"HCCL_EVENT_TIMEOUT": "3600"},
    ),
    planted(
        "environment",
        "mixtral_8x7b",
        "HCCL_CONNECT_TIMEOUT 9000: must be a whole number from 120 to 7200",
        env={"HCCL_CONNECT_TIMEOUT": "9000"},
    ),
    planted(
        "environment",
        "deepseek_v3",
        "HCCL_BUFFSIZE 100: the dispatch of the busiest rank is 135 MiB",
        env={"HCCL_BUFFSIZE": "100"},
    ),
    planted(
        "environment",
        "mixtral_8x7b",
        "HCCL_BUFFSIZE 20: the dispatch of the busiest rank is 39 MiB",
        env={"HCCL_BUFFSIZE": "20"},
    ),
    planted(
        "environment",
        "mixtral_8x7b",
        "ASCEND_LAUNCH_BLOCKING 1: the host waits for the device",
        env={"ASCEND_LAUNCH_BLOCKING": "1"},
    ),
    planted(
        "environment",
        "mixtral_8x7b",
        "CUDA_DEVICE_MAX_CONNECTIONS 32: Megatron refuses",
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    ),
    planted(
        "environment", "mixtral_8x7b", "HCCL_OP_EXPANSION_MODE AIV: takes cores", env={"HCCL_OP_EXPANSION_MODE": "AIV"}
    ),
    planted("environment", "qwen3_235b_a22b", "MASTER_PORT 48895: HCCL_IF_BASE_PORT 48890 reserves", master_port=48895),
]


@pytest.mark.parametrize(("kind", "script", "message", "extra", "changes"), MISTAKES)
def test_a_planted_mistake_is_found(kind: str, script: str, message: str, extra: tuple[str, ...], changes: Any) -> None:
    checked = job_of(script).check(*extra, **changes)
    found = [problem for problem in checked.errors if problem.kind == kind and problem.text().startswith(message)]
    assert found, [problem.text() for problem in checked.problems]
    assert found[0].fix and checked.exit_code == 2


WARNINGS = [
    planted(
        "batch",
        "mixtral_8x7b",
        "--global-batch-size 8: gives 2 micro-batches for 4 pipeline stages",
        "--global-batch-size",
        "8",
    ),
    planted(
        "sequence",
        "mixtral_8x7b",
        "--context-parallel-size 2: Megatron's attention of --transformer-impl local",
        "--context-parallel-size",
        "2",
        without=["--moe-grouped-gemm", "--fluid-overlap", "dw", "--gemm-gradient-accumulation-fusion"],
    ),
    planted(
        "dtype",
        "qwen3_30b_a3b",
        "--bf16, --fp16: neither is given",
        without=["--bf16"],
        memory_gib=200.0,
        env={"HCCL_BUFFSIZE": "400"},
    ),
    planted("environment", "mixtral_8x7b", "TASK_QUEUE_ENABLE 0: operators are issued", env={"TASK_QUEUE_ENABLE": "0"}),
    planted(
        "environment",
        "mixtral_8x7b",
        "MULTI_STREAM_MEMORY_REUSE 2: buffers of a collective",
        env={"MULTI_STREAM_MEMORY_REUSE": "2"},
    ),
    planted("preset", "mixtral_8x7b", "--num-layers 36: preset mixtral-8x7b has 32", "--num-layers", "36"),
]


@pytest.mark.parametrize(("kind", "script", "message", "extra", "changes"), WARNINGS)
def test_what_only_costs_is_a_warning(
    kind: str, script: str, message: str, extra: tuple[str, ...], changes: Any
) -> None:
    checked = job_of(script).check(*extra, **changes)
    found = [problem for problem in checked.problems if problem.kind == kind and problem.text().startswith(message)]
    assert found and found[0].level == "warning", [problem.text() for problem in checked.problems]
    assert checked.exit_code == 0


def test_our_attention_takes_context_parallelism() -> None:
    problems = job_of("mixtral_8x7b").check("--context-parallel-size", "2").problems
    assert not [problem.text() for problem in problems if "Megatron's attention" in problem.text()]


def test_interleaved_stages_hold_every_layer_once() -> None:
    plan = job_of("qwen3_235b_a22b").check().plan
    assert plan.vpp == 8
    assert sorted(layer for stage in plan.stages for layer in stage) == list(range(94))
    assert [len(stage) for stage in plan.stages] == [23, 24, 24, 23]
    assert plan.stages[0][:5] == (0, 1, 11, 12, 13)  # the embedding counts as the first layer of the first part


def test_uneven_ends_hold_every_layer_once() -> None:
    plan = job_of("deepseek_v3").check().plan
    assert [len(stage) for stage in plan.stages] == [8, 8, 8, 8, 8, 8, 8, 5]
    assert [layer for stage in plan.stages for layer in stage] == list(range(61))
