"""The summary in plain words."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fluid_npu.report.summary_text import format_summary

SUMMARY: dict[str, Any] = {
    "loss_first": 8.4,
    "loss_last": 5.9,
    "steps": 300,
    "step_ms_median": 512.3,
    "tokens_per_s": 3998.7,
    "a2a_ms": 20.0,
    "hidden_ms": 5.0,
    "hidden_fraction": 0.25,
    "peak_memory_mb": 1234.0,
    "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
    "device": "cpu",
    "unigram_entropy": 6.6,
    "overlap": {"value": "dw", "reason": "it was measured to be faster"},
    "generated": "def main():\n",
    "out": "runs/first",
}


def test_everything_a_reader_wants_is_there() -> None:
    text = format_summary(SUMMARY)
    for part in (
        "8.400 -> 5.900 (fell by 2.500 in 300 steps); below the unigram entropy 6.600",
        "3,999 tokens/s, 512.3 ms per step (median)",
        "20.0 ms per step, 5.0 ms of it hidden (25 % of what could be covered)",
        "overlap chose dw because it was measured to be faster",
        "1,234 MB",
        "torch 2.13.0, megatron-core 0.16.1",
        "'def main():\\n'",
        "runs/first",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    "overlap",
    [{"value": "plain", "reason": "the link is fast"}, ("off", "the link is fast"), ["plain", "the link is fast"]],
)
def test_plain_says_why_and_where_to_look(overlap: Any) -> None:
    text = format_summary({**SUMMARY, "overlap": overlap})
    assert "overlap chose plain because the link is fast; see fluid-npu bench overlap --link" in text


def test_off_by_request_points_nowhere() -> None:
    text = format_summary({**SUMMARY, "overlap": "off"})
    assert "off, as asked" in text
    assert "--link" not in text


def test_negative_hidden_time_and_nothing_to_cover_are_said_honestly() -> None:
    assert "overlapping cost 3.0 ms more" in format_summary({**SUMMARY, "hidden_ms": -3.0})
    text = format_summary({**SUMMARY, "hidden_ms": 0.0, "hidden_fraction": None})
    assert "0.0 ms of it hidden (nothing ran beside it)" in text


def test_rising_loss_is_not_called_a_fall() -> None:
    text = format_summary({**SUMMARY, "loss_last": 9.0})
    assert "rose by 0.600" in text
    assert "not yet below the unigram entropy" in text


def test_missing_keys_are_left_out() -> None:
    assert format_summary({}) == "Training ended without a loss"
    only = dict.fromkeys(SUMMARY) | {"loss_last": 1.0}
    assert format_summary(only) == "Training finished"


def test_report_loads_no_torch() -> None:
    code = "import sys, fluid_npu.report.summary_text, fluid_npu.report.loss_plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bytes_are_compared_with_the_plain_form_only_where_they_differ() -> None:
    sent = {"a2a_bytes": 2.0 * 2**20, "a2a_plain_bytes": 6.0 * 2**20}
    assert "2.00 MiB per step and rank to other ranks, 3.00 times fewer than" in format_summary(sent)
    legs = {"a2a_across_nodes_bytes": 0.5 * 2**20, "a2a_inside_node_bytes": 1.5 * 2**20}
    assert "; 0.50 MiB between nodes, 1.50 MiB inside them" in format_summary({**sent, **legs})
    legs |= {"a2a_plain_across_nodes_bytes": 4.0 * 2**20, "a2a_plain_inside_node_bytes": 2.0 * 2**20}
    beside = "; 0.50 MiB (plain 4.00) between nodes, 1.50 MiB (plain 2.00) inside them"
    assert beside in format_summary({**sent, **legs})
    assert "times fewer" not in format_summary({**sent, "a2a_plain_bytes": 2.0 * 2**20})
    assert "bytes" not in format_summary({"a2a_bytes": 0.0, "a2a_plain_bytes": 0.0})
