"""``bench block``: whole layers under context parallelism agree with stock on whole sequences; parts of a run stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.bench.block_text import block_text
from fluid_npu.cli import main
from fluid_npu.train.config import TrainConfig, validate

CUT = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, "seq_length": 32, "micro_batch_size": 2}
SMALL = {**CUT, "hidden": 32, "ffn": 24, "moe_ffn": 24, "heads": 8, "kv_heads": 4, "experts": 8, "topk": 2}
OURS = ["ours-plain", "ours-overlapped", "ours-carry", "ours-attention-chunks", "ours-chunks", "ours-once"]
#: Norms of queries and keys, latent attention with shared experts, LayerNorm, experts without gate in two layers.
CASES: list[tuple[str, dict[str, int], str]] = [
    ("olmoe-1b-7b", {}, "preset"),
    ("deepseek-v2-lite", {"kv_heads": 8, "shared_expert_ffn": 24}, "preset"),
    ("dbrx", {"layers": 2}, "gelu"),
]
_PLACE: list[Any] = []  # of this process; joined once


def config(preset: str, **cut: int) -> TrainConfig:
    values = {"preset": preset, "cut": {**SMALL, **cut}, "device": "cpu", "dtype": "fp32", "overlap": "dw", "cp": 2}
    return validate(TrainConfig(**values))


def bench(one: TrainConfig, activation: str, plant: float = 0.0, impls: list[str] = OURS) -> Any:
    from fluid_npu.bench.block import Bench
    from fluid_npu.train.parallel import join
    from tests.support.training import store

    if not _PLACE:
        _PLACE.append(join(one, store()))
    options = {"impls": [*impls, "stock-te"], "activation": activation, "rounds": 2, "plant_error": plant}
    return Bench(one, options, _PLACE[0])


def agreements() -> list[dict[str, Any]]:
    """What the check found of each case, and of a planted error."""
    from fluid_npu.bench.agreement import Disagreement

    found = [bench(config(preset, **cut), activation).found for preset, cut, activation in CASES]
    with pytest.raises(Disagreement) as refused:
        bench(config("olmoe-1b-7b"), "preset", 0.01, ["ours-plain"])
    return [*found, {"refused": str(refused.value)}]


def test_whole_layers_agree_with_stock_on_whole_sequences_and_their_twins(run_ranks: Callable[..., list[Any]]) -> None:
    *found, planted = run_ranks(2, agreements)[0]
    for (preset, _, _), one in zip(CASES, found, strict=True):
        assert one["reference"] == "stock, whole sequences"
        left_out = {"stock with TE, ring"}
        if preset == "deepseek-v2-lite":
            left_out |= {"ours overlapped, 2 attention chunks", "ours full, 2 chunks of both"}
            assert "multi-latent attention" in one["left_out"]["ours overlapped, 2 attention chunks"]
        assert set(one["left_out"]) == left_out and len(one["agreement"]) == len(OURS) + 1 - len(left_out)
        for name, entry in one["agreement"].items():
            assert entry["error"] <= 1e-5, (preset, name, entry)
            assert entry.get("twin_differs_in", []) == [], (preset, name)
    assert "ours plain differs from stock, whole sequences: relative error 1.00e-02 in output" in planted["refused"]


def test_the_command_writes_text_and_json_and_what_is_cut_off_stays(tmp_path: Path) -> None:
    sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["bench", "block", "--device", "cpu", "--preset", "mixtral-tiny", "--rounds", "2", *sizes]
    assert main([*words, "--impl", "ours-overlapped", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "block.json").read_text())
    assert (
        result["complete"]
        and result["cp"] == 2
        and [row["pass"] for row in result["rows"]]
        == [
            "forward+backward",
            "iteration",
            "forward",
        ]
    )
    names = [row["a2a"] for row in result["exchanges"]]
    assert "sp2hp AllToAll of layer 1" in names and "backward of hp2sp AllToAll of layer 1" in names
    assert not (tmp_path / "block.partial.json").exists()
    text = block_text({**result, "complete": False, "exchanges": [], "twins": []})
    assert "NOT COMPLETE" in text and "agree with stock, whole sequences within" in text
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "Beside the serialised twin" in (tmp_path / "report" / "report.html").read_text()
    assert main(["bench", "block", "--device", "cpu", "--cp", "1"]) == 2
