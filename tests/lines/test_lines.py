"""Every supported line of megatron-core trains the same from one converted checkpoint; ours as stock, on each.

Each line runs once, in a process of its own that finds it first on its path (``tests/support/line_worker.py``); the
tests read what it wrote. What a line reports of itself is checked, so none can stand for another.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.context import worst_error
from tests.support.gpt import far_apart
from tests.support.line_worker import context_cases

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("megatron_lines", ROOT / "scripts" / "megatron_lines.py")
assert _spec is not None and _spec.loader is not None
megatron_lines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(megatron_lines)

LINES = list(megatron_lines.VERSIONS)
#: The line whose stock model is converted; the others start from its weights.
SOURCE = "0.16.1"
#: Between lines, and between ours and stock of one line, at every one of 20 steps.
LOSS = 1e-4
#: Relative Frobenius difference of each parameter's gradient at the first step.
GRADIENT = 1e-5


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``results(version)``: what both ranks of a line found; the line runs at the first call."""
    folder = tmp_path_factory.mktemp("lines")
    checkpoint = folder / "checkpoint.pt"

    @lru_cache
    def run(version: str) -> list[dict[str, Any]]:
        if version != SOURCE and not checkpoint.exists():
            run(SOURCE)
        out = folder / f"{version}.pt"
        make = [] if checkpoint.exists() else ["make"]
        command = [sys.executable, "-W", "ignore", "tests/support/line_worker.py", str(checkpoint), str(out), *make]
        environment = megatron_lines.environment(version)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, f"megatron-core {version}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        ranks: list[dict[str, Any]] = torch.load(out, weights_only=True)
        return ranks

    return run


def test_all_supported_lines_are_here_and_have_a_manifest() -> None:
    manifests = {path.stem.removeprefix("megatron_core-") for path in (ROOT / "patches").glob("megatron_core-*.toml")}
    assert {version.rpartition(".")[0] for version in LINES} == manifests
    for version in LINES:
        assert megatron_lines.environment(version)["PYTHONPATH"].startswith(str(ROOT / ".megatron" / version))


@pytest.mark.parametrize("version", LINES)
def test_the_line_really_ran(version: str, results: Any) -> None:
    for rank in results(version):
        found = rank["identity"]
        # A newer Megatron appends the commit of the repository that it runs in.
        assert found["version"].partition("+")[0] == found["metadata"] == version
        assert Path(found["file"]) == ROOT / ".megatron" / version / "megatron" / "core" / "__init__.py"
        assert rank["ours"]["stats"]["completed_dw_tasks"] > 0, "nothing was overlapped"


@pytest.mark.parametrize("version", LINES)
def test_the_spec_builds_our_modules(version: str, results: Any) -> None:
    layer = "FluidTransformerLayer" if version == "0.16.1" else "TransformerLayer"
    assert results(version)[0]["modules"] == {
        "mlp": "FluidMoELayer",
        "router": "FluidRouter",
        "experts": "FluidGroupedMLP",
        "dispatcher": "FluidTokenDispatcher",
        "layer": layer,
    }


@pytest.mark.parametrize("version", LINES)
def test_twenty_steps_and_gradients_as_stock_of_the_line(version: str, results: Any) -> None:
    for rank in results(version):
        ours, stock = rank["ours"]["losses"], rank["stock"]["losses"]
        assert len(ours) == 20 and max(map(abs_difference, ours, stock)) <= LOSS, (ours, stock)
        assert ours[0] - ours[-1] > 0.1, "the model did not learn: equal losses would mean little"
        assert not far_apart(rank["first"]["dw"], rank["first"]["stock"], GRADIENT)


@pytest.mark.parametrize("version", [line for line in LINES if line != SOURCE])
def test_twenty_steps_and_gradients_as_on_the_other_lines(version: str, results: Any) -> None:
    for rank, source in zip(results(version), results(SOURCE), strict=True):
        for impl in ("ours", "stock"):
            here, there = rank[impl]["losses"], source[impl]["losses"]
            assert max(map(abs_difference, here, there)) <= LOSS, (impl, here, there)
        assert not far_apart(rank["first"]["dw"], source["first"]["dw"], GRADIENT)


@pytest.mark.parametrize("version", LINES)
def test_grouped_experts_under_every_dispatcher_of_the_line(version: str, results: Any) -> None:
    kinds = {"alltoall", "allgather"} | ({"alltoall_seq"} if version == "0.12.1" else set())
    for rank in results(version):
        assert set(rank["dispatchers"]) == kinds and set(rank["dispatchers_tp2"]) == {"alltoall", "allgather"}
        for errors in (*rank["dispatchers"].values(), *rank["dispatchers_tp2"].values()):
            # Output, input gradient, router and two weights of each local expert.
            assert len(errors) == 11 and max(errors.values()) <= GRADIENT, errors
        assert max(rank["drop_in"]) <= GRADIENT, "our dispatcher in Megatron's layer"


@pytest.mark.parametrize("version", LINES)
def test_half_precision_runs(version: str, results: Any) -> None:
    """Distance to fp32 of the same weights: that it computes the right thing; bf16 has 8 bits, fp16 11."""
    for rank in results(version):
        found = rank["dtypes"]
        assert 0 < found["torch.bfloat16"] <= 3e-2 and 0 < found["torch.float16"] <= 4e-3, found


@pytest.mark.parametrize("version", LINES)
def test_distributed_checkpoints_of_stock_and_ours_exchange(version: str, results: Any) -> None:
    for rank in results(version):
        assert rank["exchange"] == {"stock to dw": [], "dw to stock": []}


@pytest.mark.parametrize("version", LINES)
def test_context_parallelism_against_one_process(version: str, results: Any) -> None:
    """Ulysses, in chunks and a ring, CP 2 with EP 2, against the whole sequence in float64."""
    ranks = results(version)
    for index, case in enumerate(context_cases()):
        errors = worst_error(case, [rank["context"][index] for rank in ranks])
        assert max(errors.values()) <= GRADIENT, (case, errors)
    regions = ranks[0]["context"][0]["regions"]
    assert regions["layer 1 self_attention.linear_proj part 1"] == "backward of hp2sp AllToAll of layer 1"
    assert regions["layer 1 self_attention.linear_proj part 2"] == "backward of sp2hp AllToAll of layer 1"


@pytest.mark.parametrize("version", LINES)
def test_three_doors_one_model(version: str, results: Any) -> None:
    """Layer Spec, ``adapt`` and ``import fluid_npu.megatron_adaptor`` at a launch: the same specs, modules and bits."""
    for rank in results(version):
        outcome = rank["doors"]
        doors, specs = outcome["results"], outcome["specs"]
        first = doors["spec"]
        assert outcome["restored"], "after adapt Megatron's function gives stock's spec again"
        assert ("grouped_mlp" in outcome["features"]) == (version in ("0.12.1", "0.16.1"))
        assert any(name.endswith("FluidMoELayer") for name in first["modules"].values())
        assert "FluidMoELayer" in specs["spec"] and "FluidMoELayer" not in outcome["stock"]
        assert torch.isfinite(first["losses"]).all() and first["losses"].unique().numel() == 2
        for door in ("adapt", "launch"):
            other = doors[door]
            assert specs[door] == specs["spec"], door
            assert other["modules"] == first["modules"] and other["shapes"] == first["shapes"]
            assert torch.equal(other["losses"], first["losses"])
            assert all(torch.equal(other["grads"][name], grad) for name, grad in first["grads"].items())


def abs_difference(a: float, b: float) -> float:
    """|a - b|."""
    return abs(a - b)
