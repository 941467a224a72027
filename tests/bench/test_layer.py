"""``bench layer``: all implementations agree, parts and floor show planted milliseconds, a broken one is refused.

Where milliseconds are planted only they pass (``tests/support/clock.py``).
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluid_npu.bench.layer import _kernel_time
from fluid_npu.bench.layer_cli import IMPLS, _taken_node_size
from fluid_npu.bench.layer_levers import lever_rows
from fluid_npu.bench.layer_parts import busy_parts, union
from fluid_npu.bench.layer_text import layer_text, layer_verdict
from fluid_npu.train.config import TrainConfig, validate
from tests.support.clock import planted_time
from tests.support.fake_graph import FakeRecorder

CUT = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, "seq_length": 16, "micro_batch_size": 2}
SMALL = {**CUT, "hidden": 32, "ffn": 24, "moe_ffn": 24, "heads": 4, "experts": 8, "topk": 2}
NAP_MS = 100.0
_PLACE: list[Any] = []  # of this process; joined once


def config(preset: str, dtype: str = "fp32", **cut: int) -> TrainConfig:
    values = {"preset": preset, "cut": {**SMALL, **cut}, "device": "cpu", "dtype": dtype, "overlap": "dw"}
    return validate(TrainConfig(**values))


FEW = ("baseline", "stock-sequential", "stock-grouped", "ours-plain", "ours-overlapped", "ours-once")


def bench(one: TrainConfig, part: str, workload: str = "W2", plant: float = 0.0, **options: Any) -> Any:
    from fluid_npu.bench.layer import Bench
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    if not _PLACE:
        _PLACE.append(join(one, store()))
    impls = IMPLS if one.preset == "mixtral-tiny" else FEW
    given = {"impls": impls, "part": part, "workload": workload, "plant_error": plant, **options}
    return Bench(one, given, _PLACE[0])


def agreements() -> dict[str, Any]:
    """What the check found, for layers that differ in norms, biases, groups, shared experts and data type."""
    found = {}
    for name, one, part in (
        ("grouped queries", config("mixtral-tiny", kv_heads=2), "transformer"),
        ("norms of queries and keys", config("olmoe-1b-7b", kv_heads=4), "transformer"),
        ("biases, partial rotary", config("glm-4.5-air", kv_heads=2, head_dim=8, shared_expert_ffn=24), "transformer"),
        ("shared experts", config("deepseek-v2-lite", kv_heads=4, shared_expert_ffn=24), "moe"),
        ("latent attention", config("deepseek-v2-lite", kv_heads=4, shared_expert_ffn=24), "transformer"),
        ("bf16", config("mixtral-tiny", dtype="bf16", kv_heads=2), "moe"),
        ("bf16, shared experts", config("deepseek-v2-lite", dtype="bf16", kv_heads=4, shared_expert_ffn=24), "moe"),
    ):
        made = bench(one, part)
        found[name] = {"agreement": made.agreement, "left_out": made.left_out, "ran": [i.name for i in made.impls]}
    return found


def test_all_implementations_compute_the_same_layer(run_ranks: Callable[..., list[Any]]) -> None:
    found = run_ranks(2, agreements)[0]
    for name, one in found.items():
        ran = {"baseline", "stock SequentialMLP", "ours plain", "ours overlapped", "ours overlapped, once per rank"}
        ran -= set(one["left_out"])
        assert ran <= set(one["ran"]), name
        assert set(one["agreement"]) == set(one["ran"]) - {"stock SequentialMLP"}
        assert all(entry["error"] <= 1e-5 for entry in one["agreement"].values()) or "bf16" in name, (name, one)
    assert all("stock GroupedMLP" in one["ran"] for name, one in found.items() if "bf16" in name)
    forms = {"static", "local rows first", "once per rank, 2 chunks", "once per rank, local rows first"}
    forms |= {"static, local rows first"}
    assert {f"ours overlapped, {form}" for form in forms} <= set(found["grouped queries"]["ran"])
    assert "bf16" in found["grouped queries"]["left_out"]["stock GroupedMLP"]
    assert "0.19" in found["bf16"]["left_out"]["stock TEGroupedMLP, dW beside dispatch"]
    assert "itself runs over torch" in found["bf16"]["left_out"]["stock GroupedMLP over torch"]
    assert "relative error" in found["grouped queries"]["left_out"]["ours overlapped, once per rank, fp8"]
    assert "only CUDA graphs" in found["grouped queries"]["left_out"]["ours overlapped, static, recorded"]
    assert "two micro-batches" in found["bf16"]["left_out"]["stock 1F1B merge"]
    assert list(found["latent attention"]["left_out"])[0] == "baseline"


def planted() -> dict[str, Any]:
    """Rows of a layer whose experts nap in forward and whose AllToAlls of rows nap in the launch."""
    import torch.distributed as dist

    made = bench(config("mixtral-tiny", kv_heads=2), "moe", "W0")
    for experts in {id(impl.variant): impl.variant.layer.mlp.experts for impl in made.impls}.values():
        forward = experts.forward
        experts.forward = lambda *a, forward=forward, **k: (time.sleep(NAP_MS / 1e3), forward(*a, **k))[1]
    exchange = dist.all_to_all_single

    def slow(output: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if source.is_floating_point():
            time.sleep(NAP_MS / 1e3)
        return exchange(output, source, *args, **kwargs)

    dist.all_to_all_single = slow
    made.impls = [impl for impl in made.impls if impl.name in ("stock SequentialMLP", "ours overlapped")]
    _PLACE[0].board.stop()  # it would compare with the real clock
    with planted_time():
        rows, levers = made.rows(2)
    return {"rows": rows, "levers": levers, "agreement": made.agreement, "left_out": made.left_out}


def test_parts_and_floor_show_where_the_time_is(run_ranks: Callable[..., list[Any]]) -> None:
    result = run_ranks(2, planted)[0]
    rows = {(row["impl"], row["pass"]): row for row in result["rows"]}
    # Stock sends tokens and probabilities by themselves, there and back; ours sends them together.
    naps = {"stock SequentialMLP": (3, 6), "ours overlapped": (2, 4)}
    for impl, exchanges in naps.items():
        for name, count in zip(("forward", "forward+backward"), exchanges, strict=True):
            row = rows[impl, name]
            parts = {part: ms for part, ms in row["parts"].items() if ms}
            assert parts == pytest.approx({"a2a": count * NAP_MS, "experts": NAP_MS}), (impl, name)
            assert row["floor_ms"] == pytest.approx(NAP_MS)
            whole = [row["median_ms"], row["parted_ms"], row["parts_ms"]]
            assert whole == pytest.approx([(count + 1) * NAP_MS] * 3) and row["parts_agree"]
            assert 0 < row["activation_memory_mb"] <= row["peak_memory_mb"]
    text = layer_text({**result, **_ENVELOPE})
    assert "ours overlapped" in text and "of layer" in text and "left out: stock TEGroupedMLP" in text


_ENVELOPE = {
    **{"part": "moe", "preset": "mixtral-tiny", "cut": {}, "dtype": "fp32", "workload": "W0", "versions": {"x": "1"}},
    "machine": {
        **{"description": "a machine", "nproc": 2, "threads_per_rank": 1, "backend": "gloo", "load_average": 1.0},
        **{"cores": 2, "settings": {}},
    },
}


def test_a_lever_is_the_difference_of_two_that_ran() -> None:
    both = ("forward", "forward+backward")
    ms = {"stock SequentialMLP": 9.0, "stock GroupedMLP": 8.0, "ours plain": 5.0, "ours overlapped": 4.5}
    times = {(impl, name): np.array([value, value + 0.1, value]) for impl, value in ms.items() for name in both}
    found = lever_rows(times, {cell: cell[0].count("e") for cell in times})
    assert [(row["pass"], row["without"], row["with"], row["saved_ms"]) for row in found] == [
        (name, without, with_it, saved)
        for name in both
        for without, with_it, saved in (
            ("stock GroupedMLP", "ours plain", 3.0),
            ("ours plain", "ours overlapped", 0.5),
        )
    ]
    assert found[0]["held_mb"] == -1 and found[0]["judged"]
    assert lever_rows({("ours plain", "forward"): np.ones(2)}, {("ours plain", "forward"): 0.0}) == []


def one_that_breaks() -> tuple[dict[str, str], list[str]]:
    from fluid_npu.mcore.token_dispatcher import FluidTokenDispatcher

    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    FluidTokenDispatcher._plan_static = broken  # type: ignore[method-assign]
    made = bench(config("mixtral-tiny", kv_heads=2), "moe")
    return made.left_out, [impl.name for impl in made.impls]


def test_a_form_that_is_new_and_breaks_is_left_out_with_the_reason(run_ranks: Callable[..., list[Any]]) -> None:
    left_out, ran = run_ranks(2, one_that_breaks)[0]
    assert left_out["ours overlapped, static"] == "cannot run: RuntimeError: planted"
    assert "ours overlapped, static" not in ran and "ours overlapped, once per rank" in ran


def recorded() -> tuple[Any, list[dict[str, float]]]:
    """A layer as ever and recorded, its recording of 1,024 MiB: what the check found, and memory of a step of each."""
    from fluid_npu.device.choice import Choice
    from fluid_npu.mcore import graph_choice

    graph_choice.graph_recorder = lambda device: Choice(FakeRecorder, "a fake")
    FakeRecorder.held_bytes = lambda self: 2**30  # type: ignore[method-assign]
    made = bench(config("mixtral-tiny", kv_heads=2), "moe", "W0", impls=("ours-static", "ours-static-graph"))
    return made.agreement, [made._memory(impl, "forward+backward") for impl in made.impls]


def test_the_memory_of_a_recorded_layer_has_what_its_recording_keeps(run_ranks: Callable[..., list[Any]]) -> None:
    for agreement, memory in run_ranks(2, recorded):
        assert agreement["ours overlapped, static, recorded"]["error"] <= 1e-5
        for name in ("activation_memory_mb", "peak_memory_mb"):
            ever, replayed = (one[name] for one in memory)
            assert 0 < ever < 100 and 1024 < replayed < 1024 + 100, name


def by_nodes(node_size: int) -> tuple[Any, Any]:
    made = bench(config("mixtral-tiny", kv_heads=2), "moe", impls=("ours-once-node",), node_size=node_size)
    return made.agreement, made.left_out


def test_once_per_node_runs_where_nodes_are_known_and_says_why_it_does_not(run_ranks: Callable[..., list[Any]]) -> None:
    name = "ours overlapped, once per node"
    assert run_ranks(2, by_nodes, 0)[0][1][name] == "which ranks are a node is not known; give --a2a-node-size"
    assert "has 1 node(s) of 2 rank(s) (--a2a-node-size)" in run_ranks(2, by_nodes, 2)[0][1][name]
    assert run_ranks(4, by_four, timeout=100)[0][0][name]["error"] <= 1e-5


def by_four() -> tuple[Any, Any]:
    one = replace(config("mixtral-tiny", kv_heads=2), nproc=4, ep=4)
    made = bench(one, "moe", impls=("ours-once-node",), node_size=2)
    return made.agreement, made.left_out


def refused() -> str:
    from fluid_npu.bench.agreement import Disagreement

    with pytest.raises(Disagreement) as raised:
        bench(replace(config("mixtral-tiny", kv_heads=2)), "moe", plant=1e-3)
    return str(raised.value)


def test_a_broken_implementation_is_not_timed(run_ranks: Callable[..., list[Any]]) -> None:
    message = run_ranks(2, refused)[0]
    assert "ours overlapped, once per rank differs from stock SequentialMLP" in message
    assert "not timed" in message


def test_the_verdict_leaves_out_noise_and_parts_that_do_not_add_up() -> None:
    base = {"pass": "forward", "floor_ms": 5.0, "parts_agree": True, "parts_ms": 9.0}
    rows = [
        {**base, "impl": "a", "median_ms": 1.0, "judged": False},
        {**base, "impl": "b", "median_ms": 8.0, "judged": True},
        {**base, "impl": "c", "median_ms": 9.0, "judged": True, "parts_agree": False},
    ]
    text = " ".join(layer_verdict({"rows": rows}))
    assert "too noisy to judge: a" in text and "fastest of those judged is b" in text and "save 3.00 ms" in text
    assert "c: the parts sum to 9.00 ms" in text


def test_the_union_of_kernels_counts_no_moment_twice() -> None:
    assert union([(5, 9), (0, 4), (2, 6), (20, 21)]) == 10.0
    assert union([]) == 0.0


def test_of_two_profiled_steps_the_one_with_less_work_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([{"a2a": 1.0, "experts": 9.0}, {"a2a": 2.0, "experts": 3.0}, None, {"a2a": 1.0}, None, None])
    monkeypatch.setattr("fluid_npu.bench.layer_parts._profiled", lambda *_: next(steps))
    cuda: Any = SimpleNamespace(name="cuda")
    found = [busy_parts(cuda, cuda, print) for _ in range(3)]
    assert found == [{"a2a": 2.0, "experts": 3.0}, {"a2a": 1.0}, None]


def test_kernels_and_idle_sum_to_the_step_without_marks() -> None:
    parts = _kernel_time([{"experts": 4.0, "a2a": 9.0}, {"experts": 6.0, "a2a": 1.0}], 7.5)
    assert parts["experts"] == 5.0 and parts["a2a"] == 1.0, "the other rank's AllToAll waited for this one"
    assert parts["idle"] == 1.5 and sum(ms or 0.0 for ms in parts.values()) == 7.5
    assert _kernel_time([{"experts": 9.0}], 7.5)["idle"] == 0.0, "kernels longer than the step are not hidden in idle"


def test_the_size_of_a_node_is_taken_for_once_per_node_alone() -> None:
    flags = {"impl": ["ours-once-node"], "nproc": 4, "a2a_transport": "collective", "dispatch": "plain"}
    for more, of_all in (({}, 0), ({"a2a_transport": "two-level"}, 2), ({"impl": ["ours-once"]}, 2), ({"nproc": 3}, 2)):
        args = Namespace(a2a_node_size=2, **{**flags, **more})
        assert _taken_node_size(args) == 2 and args.a2a_node_size == of_all, more
