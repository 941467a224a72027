"""The suites of the layer, dispatcher, scheduler, trainer and operators, the same test code as on the CPU, on the
simulated NPU: one pytest run with ``--device npu`` inside ``fluid-npu sim exec``.

CI takes a part of them; ``scripts/nightly.sh`` takes all. Both fail when fewer tests ran than stated here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fluid_npu.sim.operator_log import read_log

ROOT = Path(__file__).resolve().parents[2]
LAYER = "tests/mcore/test_moe_layer.py::test_gradients_equal_a_dense_float64_loop_and_the_twin_bitwise"
MODEL = "tests/mcore/test_gpt_model.py::test_equals_stock_and_twin"

#: What CI runs, by suite: the fewest tests that must have run, and where they are.
CI: dict[str, tuple[int, Sequence[str]]] = {
    "layer": (
        7,
        (
            *(f"{LAYER}[{case}]" for case in ("ep2", "two_micro_batches", "zero_token_rank", "moe_recompute")),
            "tests/mcore/test_moe_layer.py::test_bf16_is_not_worse_than_stock[True]",
            "tests/mcore/test_moe_layer.py::test_weight_gradients_run_while_the_dispatch_is_in_flight",
            f"{MODEL}[plain]",
        ),
    ),
    "dispatcher": (
        10,
        (
            "tests/mcore/test_token_dispatcher.py",
            "tests/mcore/test_dispatchers.py::test_allgather_and_alltoall_equal_stock[ep2]",
            "tests/comm/test_all_to_all.py::test_uneven_and_empty_splits",
            "tests/comm/test_all_to_all.py::test_passengers_get_their_gradient_after_the_flight_was_filled",
        ),
    ),
    "context": (
        3,
        (
            "tests/ops/test_ring_attention.py::test_fused_blocks_are_the_softmax_over_the_whole_sequence[2]",
            "tests/mcore/test_self_attention.py::test_gradients_of_whole_layers_against_one_process[cp2-ep2]",
            "tests/mcore/test_attention_overlap.py::test_attention_in_chunks_against_one_process_and_its_twin[cp2-ep2]",
        ),
    ),
    "scheduler": (16, ("tests/schedule", "tests/sim/suites/test_delay_seeds.py")),
    "faults": (12, ("tests/sim/suites/test_faults.py",)),
    "trainer": (2, ("tests/train/test_train.py::test_variants_learn[bf16]", "tests/mcore/test_convert.py")),
    "operators": (
        100,
        (
            *(f"tests/ops/test_{name}.py" for name in ("expert_mlp", "payload", "rms_norm", "swiglu", "dense_linear")),
            "tests/ops/test_grouped_matmul.py::test_value_and_gradients_equal_the_float64_loop",
            "tests/ops/test_grouped_matmul.py::test_fusion_adds_two_micro_batches_to_main_grad",
            "tests/ops/test_permute.py::test_dropless_equals_megatron_bit_for_bit",
        ),
    ),
}

#: All of them, as scripts/nightly.sh runs them.
ALL = ("tests/mcore", "tests/comm", "tests/schedule", "tests/train", "tests/ops")
FEWEST_OF_ALL = 290


def run_on_the_simulator(folder: Path, paths: Sequence[str], *more: str) -> list[str]:
    """Runs the tests on the NPU and returns their names. Fails with their output when one failed or was skipped."""
    words = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--device", "npu", f"--junitxml={folder}/report.xml"]
    simulator = [sys.executable, "-m", "fluid_npu", "sim", "exec", "--log", str(folder / "log"), "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FLUID_FORBID_SKIPS": "1"}
    done = subprocess.run([*simulator, *words, *more, *paths], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[:6000] + "\n...\n" + done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    print(*(line for line in lines if re.match(r"\d+ ranks", line)), lines[-1], sep="\n")
    counts = read_log(folder / "log")
    print(
        f"{sum(counts.values())} operators, {len(counts)} kinds; collectives:",
        *sorted(n for k, n in counts if k == "hccl"),
    )
    assert not [name for kind, name in counts if kind in ("fallback", "missing")]
    assert counts["hccl", "HcclAlltoAllV"] > 0 and counts["aclnn", "aclnnGroupedMatmulV5"] > 0
    cases = ElementTree.parse(folder / "report.xml").getroot().iter("testcase")
    return [f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}" for case in cases]


def ran_of(names: Sequence[str], paths: Sequence[str]) -> int:
    """How many of the tests lie under the paths."""
    return sum(any(name.startswith((path, f"{path}/", f"{path}[")) for path in paths) for name in names)


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
def test_suites_pass_on_the_simulated_npu(tmp_path: Path) -> None:
    names = run_on_the_simulator(tmp_path, [path for _, paths in CI.values() for path in paths])
    counts = {suite: ran_of(names, paths) for suite, (_, paths) in CI.items()}
    print("tests that ran on the simulated NPU:", ", ".join(f"{suite} {count}" for suite, count in counts.items()))
    assert sum(counts.values()) == len(names)
    assert all(counts[suite] >= fewest for suite, (fewest, _) in CI.items()), counts


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_all_suites_pass_on_the_simulated_npu(tmp_path: Path) -> None:
    names = run_on_the_simulator(tmp_path, ALL, "--timeout=1800")
    print(f"{len(names)} tests ran on the simulated NPU")
    assert len(names) >= FEWEST_OF_ALL


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_twenty_seeds_of_delays_change_no_bit(tmp_path: Path) -> None:
    names = run_on_the_simulator(tmp_path, ["tests/sim/suites"], "-m", "nightly", "-rP")
    assert len(names) == 2
