"""Flags of the scripts exist in every Megatron-LM that is supported; what argparse would refuse is refused by name."""

from __future__ import annotations

import pytest

from fluid_npu.cluster import flags, tiny
from tests.support.cluster_job import NAMES, job_of

EXPECTED = ["deepseek_v2_lite", "deepseek_v3", "mixtral_8x22b", "mixtral_8x7b", "qwen3_235b_a22b", "qwen3_30b_a3b"]


def test_all_scripts_are_here() -> None:
    assert NAMES == EXPECTED


@pytest.mark.parametrize("line", flags.LINES)
@pytest.mark.parametrize("name", EXPECTED)
def test_every_flag_of_every_script_exists(name: str, line: str) -> None:
    args, problems = flags.read(job_of(name).words, line)
    assert [problem.text() for problem in problems] == []
    assert not args.of_mindspeed


def test_the_table_has_what_differs_between_versions() -> None:
    old, new = flags.known_flags("0.12.1"), flags.known_flags("0.19.0")
    assert "alltoall_seq" in old["--moe-token-dispatcher-type"].choices
    assert "alltoall_seq" not in new["--moe-token-dispatcher-type"].choices
    assert "--delay-wgrad-compute" in new and "--delay-wgrad-compute" not in old
    assert old["--num-layers"].kind == "int" and old["--bf16"].kind == "switch" and old["--data-path"].many == "*"
    assert len(old) > 400


def test_values_have_the_type_of_their_flag() -> None:
    words = ["--num-layers", "4", "--lr=1e-3", "--bf16", "--data-path", "0.3", "a", "0.7", "b", "--clip-grad", "-1"]
    args, problems = flags.read(words, "0.16.1")
    assert not problems
    expected = {"--num-layers": 4, "--lr": 1e-3, "--bf16": True, "--clip-grad": -1.0}
    assert {flag: args.get(flag) for flag in expected} == expected
    assert args.get("--data-path") == ["0.3", "a", "0.7", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--num-layer 4",
            "--num-layer: no such flag in Megatron-LM 0.12.1, MindSpeed or fluid_npu; did you mean --num-layers?",
        ),
        (
            "--delay-wgrad-compute",
            "--delay-wgrad-compute: Megatron-LM 0.12.1 has no such flag; it is in 0.16.1, 0.18.2",
        ),
        ("--num-layers", "--num-layers: needs a value; write --num-layers a whole number"),
        ("--num-layers 4 5", "--num-layers 4 5: takes one value, not 2"),
        ("--num-layers four", "--num-layers four: must be a whole number"),
        ("--bf16 yes", "--bf16 yes: takes no value; write --bf16 alone"),
        ("--num-layers 4 --num-layers 5", "--num-layers 5: given twice, and the last one would count; remove one"),
        ("--fluid-overlap sideways", "--fluid-overlap sideways: must be one of off, dw, full, auto"),
        ("4", "the first argument: is a value without a flag"),
    ],
)
def test_a_wrong_argument_is_named(words: str, message: str) -> None:
    _, problems = flags.read(words.split(), "0.12.1")
    assert any(problem.text().startswith(message) for problem in problems), [p.text() for p in problems]


def test_flags_of_mindspeed_are_known_as_such() -> None:
    args, problems = flags.read(["--use-fused-rmsnorm", "--num-layers", "4", "--fluid-overlap", "dw"], "0.12.1")
    assert not problems and args.of_mindspeed == ["--use-fused-rmsnorm"]
    # Both have it; it is not a reason to ask for MindSpeed.
    assert flags.known_flags("0.12.1")["--gemm-gradient-accumulation-fusion"].owner == "fluid"


@pytest.mark.parametrize(("version", "line"), [("0.12.1", "0.12.1"), ("0.17.0", "0.16.1"), ("0.20.0rc1", "0.19.0")])
def test_a_version_between_two_known_ones_takes_the_older(version: str, line: str) -> None:
    assert flags.nearest_line(version) == line


def test_a_trial_on_a_cpu_has_no_ctas() -> None:
    args, problems = flags.read(["--fluid-a2a-transport", "high-priority", "--fluid-a2a-ctas", "8"], "0.16.1")
    values, changes = tiny.shrink(args, 2)
    assert not problems and (values["--fluid-a2a-transport"], values["--fluid-a2a-ctas"]) == ("collective", 0)
    assert "--fluid-a2a-ctas 8 -> 0" in [change.text() for change in changes]
    words, left_out = tiny.trainer_flags("h64", {**values, "--num-attention-heads": 4, "--ffn-hidden-size": 64})
    assert words[words.index("--a2a-ctas") + 1] == "0" and not left_out
