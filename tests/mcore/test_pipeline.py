"""Pipelines under Megatron's own schedules train like no pipeline: one converted checkpoint, the same losses.

PP 2 is 1F1B over two stages, PP 2 x VPP 2 the interleaved schedule with two chunks a stage; overlap is on.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.device import NAME
from tests.support.gpt import far_apart, same_bits
from tests.support.pipeline import EXPERTS, Run, same_routing, train_all, whole

Ranks = Callable[..., list[Any]]
LATE = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
#: Four micro-batches on each data rank: with two, the interleaved schedule of PP 2 never mixes the chunks.
BASE = Run(samples=8)


def test_a_binder_says_everything() -> None:
    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.layer_spec import get_fluid_moe_block_spec

    with pytest.raises(ValueError, match="carry_over beside it .* give them to SchedulerBinder"):
        get_fluid_moe_block_spec(None, carry_over=True, binder=SchedulerBinder())  # type: ignore[arg-type]


def test_specs_take_what_a_binder_takes() -> None:
    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.engine_arguments import EngineArguments
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    names = set(inspect.signature(SchedulerBinder.__init__).parameters) - {"self"}
    assert names == set(EngineArguments.__annotations__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'overlapp'"):
        get_fluid_moe_layer_spec(overlapp="dw")  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def reference() -> list[list[dict[str, Any]]]:
    """Stock and overlapped without a pipeline, PP 1 x EP 2, for each rank."""
    from tests.support.ranks import run_ranks

    return run_ranks(2, train_all, [replace(BASE, impl="stock"), BASE], sizes={}, timeout=600)


#: Steps in which no token may go to another expert; later a rounding may send one: when, depends on the machine.
SURE = 3
#: Tokens, of 512 choices of a layer and step, that roundings may send elsewhere at once.
FEW = 2


def agree(run: dict[str, Any], to: dict[str, Any]) -> str:
    """Checks the losses of two runs as long as tokens go to the same experts; says how far apart they are."""
    steps, moved = same_routing(run, to)
    assert steps >= SURE and moved <= FEW
    losses, others = run["losses"][:steps], to["losses"][:steps]
    assert losses == pytest.approx(others, abs=1e-4)
    return f"{max(abs(a - b) for a, b in zip(losses, others, strict=True)):.1e} in {steps} steps"


def check(results: list[list[dict[str, Any]]], reference: list[list[dict[str, Any]]]) -> None:
    """Losses of all runs within 1e-4 of those without a pipeline, as long as tokens go to the same experts: by the same
    implementation, and by stock. Gradients of the first step once."""
    stock, ours = reference[0][:2]
    own = lambda run: stock if run["impl"] == "stock" else ours
    for runs in results:
        for run in runs:
            agree(run, stock)
            agree(run, own(run))
    figures = ", ".join(agree(run, own(run)) for run in results[0])
    print(f"megatron-core {results[0][0]['megatron']}: largest loss differences of the runs: {figures}")
    gradients = whole([runs[0] for runs in reference], "grads")
    for number in range(len(results[0])):
        assert not far_apart(whole([runs[number] for runs in results], "grads"), gradients, 1e-5)


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"]
    assert not same_bits(one["grads"], other["grads"])
    assert not same_bits(one["weights"], other["weights"])


def test_the_checkpoint_starves_a_rank_and_training_moves(reference: list[list[dict[str, Any]]]) -> None:
    check(reference, reference)
    losses = reference[0][0]["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    grads = whole([runs[1] for runs in reference], "grads")
    received = [
        [
            bool(grads[f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight"].any())
            for expert in range(EXPERTS)
        ]
        for layer in range(4)
    ]
    assert not any(received[1][EXPERTS // 2 :]) and any(received[1][: EXPERTS // 2])
    assert not any(received[2][: EXPERTS // 2]) and any(received[2][EXPERTS // 2 :])


def test_pp_2_and_vpp_2_with_ep_2(reference: list[list[dict[str, Any]]], run_ranks: Ranks) -> None:
    pp, vpp = replace(BASE, pp=2), replace(BASE, pp=2, vpp=2)
    late = replace(vpp, carry_over=True, ddp=LATE)
    # On an NPU a router's dW that is carried over is another operator than autograd's and rounds differently.
    runs = [pp, late, replace(vpp if NAME == "cpu" else late, impl="twin")]
    results = run_ranks(4, train_all, runs, reference[0][0]["start"], sizes={}, timeout=600)
    check(results, reference)
    for rank, (stage, late, twin) in enumerate(results):
        assert_same_bits(late, twin)
        assert late["stats"]["completed_dw_tasks"] == late["stats"]["total_dw_tasks"] > 0
        first = 1 + rank // 2
        assert {name.split(" ")[1] for name in stage["regions"]} == {str(2 * first - 1), str(2 * first)}
        for layer in (first, first + 2):  # one layer a chunk: no dW may wait for the combine of another chunk
            assert late["regions"][f"layer {layer} fc2"] == f"backward of moe_dispatch AllToAll of layer {layer}"


#: Runs of 8 layers, so that a chunk has two; compared with PP 1 of the same settings.
VARIANTS: dict[str, dict[str, Any]] = {
    "pp_2": {"pp": 2},
    "pp_2_ep_1": {"pp": 2, "ep": 1},
    "vpp_2_ep_1": {"pp": 2, "vpp": 2, "ep": 1},
    "vpp_2": {"pp": 2, "vpp": 2},
    "vpp_4": {"pp": 2, "vpp": 4},
    "block_spec_dense_layers": {
        "pp": 2,
        "vpp": 2,
        "block": True,
        "config": {"moe_layer_freq": [0, 1, 1, 0, 0, 1, 1, 1]},
    },
    "reduced_as_ready": {"pp": 2, "vpp": 2, "align": False},
    "tied_embeddings": {"pp": 2, "vpp": 2, "tied": True},
    "aux_loss": {
        "pp": 2,
        "vpp": 2,
        "config": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    },
    "full_recompute": {
        "pp": 2,
        "vpp": 2,
        "config": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    },
}


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VARIANTS)
def test_pipeline_grid(name: str, run_ranks: Ranks) -> None:
    variant = dict(VARIANTS[name])
    eight = {"num_layers": 8, **variant.pop("config", {})}
    whole_model = Run(samples=8, config=eight, block=variant.get("block", False), tied=variant.get("tied", False))
    reference = run_ranks(2, train_all, [replace(whole_model, impl="stock"), whole_model], sizes={})
    run = replace(whole_model, **variant)
    runs = [run, replace(run, impl="twin"), replace(run, carry_over=True, ddp=LATE), replace(run, impl="stock")]
    results = run_ranks(2 * run.ep, train_all, runs, reference[0][0]["start"], sizes={}, timeout=600)
    check(results, reference)
    for overlapped, twin, late, _ in results:
        assert_same_bits(overlapped, twin)
        assert_same_bits(overlapped, late)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["0.12.1", "0.18.2", "0.19.2"])
def test_other_lines(version: str) -> None:
    """The two tests above on another megatron-core; ``scripts/megatron_lines.py install`` must have fetched it."""
    test = [sys.executable, "-m", "pytest", "-q", "-rP", "-k", "starves or with_ep_2", str(Path(__file__))]
    command = [sys.executable, "scripts/megatron_lines.py", "run", version, "--", *test]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = [line for line in done.stdout.splitlines() if line.startswith(f"megatron-core {version}")]
    assert len(figures) == 2, done.stdout
    print("\n".join(figures))


@pytest.mark.nightly
def test_carried_dw_stays_in_its_chunk(reference: list[list[dict[str, Any]]], run_ranks: Ranks) -> None:
    """Two layers a chunk: the upper one's FC2 goes beside the lower one's combine, the lower one's stays."""
    run = Run(pp=2, vpp=2, steps=2, carry_over=True, ddp=LATE, config={"num_layers": 8})
    whole_model = run_ranks(2, train_all, [replace(run, impl="stock", pp=1, vpp=1)], sizes={})
    for rank, (late,) in enumerate(run_ranks(4, train_all, [run], whole_model[0][0]["start"], sizes={})):
        for low in (1 + 2 * (rank // 2), 5 + 2 * (rank // 2)):
            assert late["regions"][f"layer {low} fc2"] == f"backward of moe_dispatch AllToAll of layer {low}"
            assert late["regions"][f"layer {low + 1} fc2"] == f"backward of moe_combine AllToAll of layer {low}"
