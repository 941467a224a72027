"""The bf16 question: the table, the source of stock Megatron that it is read from, and the launch line."""

from __future__ import annotations

import json

import pytest

from fluid_npu.adaptor.dtypes import (
    DEVICES,
    DTYPES,
    VALUES,
    launch_line,
    line_of,
    ours_would,
    stock_would,
    supported_lines,
)
from fluid_npu.adaptor.dtypes_sources import LINES
from fluid_npu.doctor.dtypes import dtypes_json, dtypes_text, failed_here, matrix

TRIED = dict.fromkeys(DTYPES, "ok")


@pytest.mark.parametrize(
    "version, dtype, device, engine, value, at",
    [
        ("0.5.0", "fp32", "cuda", False, "refuses", "core_v0.5.0 megatron/arguments.py:296"),
        ("0.12.1", "fp32", "cuda", True, "refuses", "core_v0.12.1 megatron/training/arguments.py:713"),
        ("0.12.1", "bf16", "cuda", True, "runs", "core_v0.12.1 megatron/core/transformer/moe/experts.py:665"),
        ("0.12.1", "bf16", "cuda", False, "runs", "core_v0.12.1 megatron/core/models/gpt/moe_module_specs.py:52"),
        ("0.15.0", "fp16", "npu", False, "refuses", "core_v0.15.3 megatron/training/arguments.py:877"),
        ("0.16.1", "fp16", "cuda", False, "refuses", "core_v0.16.1 megatron/core/transformer/moe/experts.py:225"),
        ("0.16.1", "fp32", "cuda", True, "runs", "core_v0.16.1 megatron/core/transformer/moe/experts.py:512"),
        ("0.16.1", "bf16", "npu", False, "stops", "core_v0.16.1 megatron/training/arguments.py:853"),
        ("0.18.2", "bf16", "cuda", False, "sequential", "core_v0.18.2 megatron/core/models/backends.py:133"),
        ("0.19.2", "fp16", "cuda", True, "runs", "core_v0.19.0 megatron/core/transformer/moe/experts.py:182"),
        ("1.4.0", "bf16", "cpu", False, "stops", "main d98e8a64dd megatron/training/arguments.py:1379"),
    ],
)
def test_stock_at_launch(version: str, dtype: str, device: str, engine: bool, value: str, at: str) -> None:
    answer = stock_would(version, dtype, device, transformer_engine=engine)
    assert (answer.value, answer.source) == (value, at)
    assert tuple(answer) == (answer.value, answer.reason)


@pytest.mark.parametrize(
    "version, dtype, device, value, word",
    [
        ("0.12.1", "fp32", "cuda", "refuses", "the package grouped_gemm takes bf16 only"),
        ("0.12.1", "fp32", "cpu", "stops", "CUDA only"),
        ("0.16.1", "fp32", "cpu", "stops", "after that forward() asserts bf16"),
        ("0.18.2", "fp32", "cpu", "sequential", "LocalSpecProvider ignores the flag"),
    ],
)
def test_stock_from_a_layer_spec(version: str, dtype: str, device: str, value: str, word: str) -> None:
    answer = stock_would(version, dtype, device, transformer_engine=False, door="library")
    assert answer.value == value and word in answer.reason


def test_bf16_is_what_stock_required_and_never_what_it_refused() -> None:
    for name in LINES:
        for device in DEVICES:
            for door in ("launch", "library"):
                assert stock_would(name, "bf16", device, transformer_engine=False, door=door).value != "refuses"
        others = [stock_would(name, dtype, "cuda", transformer_engine=False).value for dtype in ("fp32", "fp16")]
        assert set(others) == ({"refuses"} if float(name[2:]) <= 16 else {"sequential"})


def test_ours_runs_what_the_operators_take_and_refuses_the_rest_by_name() -> None:
    for device in DEVICES:
        word = "simulated" if device == "npu" else "runs"
        assert {ours_would("0.16.1", dtype, device).value for dtype in DTYPES} == {word}
        refused = ours_would("0.16.1", "fp8", device)
        assert refused.value == "refuses" and refused.reason.startswith("fp8 is not in the operator table")
    assert ours_would("0.14.0", "bf16", "cpu", supported=["0.12", "0.16"]).value == "unsupported"
    assert "training" in ours_would("0.16.1", "bf16", "cuda").ran
    assert "operators alone" in ours_would("0.18.2", "bf16", "cuda").ran, "only 0.16 has trained on a GPU"
    assert "0.16" in supported_lines()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("new", "bf16", "cpu"), "megatron_version='new' is no version"),
        (("0.4.0", "bf16", "cpu"), "megatron_version='0.4.0': --moe-grouped-gemm appeared in 0.5"),
        (("0.16.1", "int8", "cpu"), "dtype='int8' is unknown; allowed: fp32, fp16, bf16"),
        (("0.16.1", "bf16", "tpu"), "device='tpu' is unknown; allowed: cpu, cuda, npu"),
    ],
)
def test_a_question_that_cannot_be_answered_names_the_argument(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stock_would(*arguments)


def test_a_version_of_a_known_line_is_answered_by_that_line() -> None:
    assert line_of("0.16.1+local").name == "0.16" and line_of("0.20.0rc1").name == "0.20"


def test_the_launch_line_says_both() -> None:
    line = launch_line("0.16.1", "fp16", "cuda", transformer_engine=False)
    assert line.startswith("--moe-grouped-gemm in fp16 on cuda: stock Megatron 0.16.1 refuses it (GroupedMLP.forward")
    assert "; fluid_npu runs it (" in line and "\n" not in line
    assert "silently runs SequentialMLP" in launch_line("0.18.2", "bf16", "cuda", transformer_engine=False)


def test_the_matrix_is_complete_and_marks_the_installed_line() -> None:
    rows = matrix(["0.12", "0.16"], "0.16", TRIED)
    assert len(rows) == 9 * 3 and json.loads(json.dumps(dtypes_json(rows)))["rows"] == rows
    for row in rows:
        cells = [cell[door] for cell in row["stock"].values() for door in ("launch", "library")]
        cells += row["ours"].values()
        assert all(cell["value"] in VALUES and cell["reason"] for cell in cells)
        assert row["installed"] == (row["megatron"] == "0.16") == ("tried_here" in row["ours"]["cpu"])
    text = dtypes_text(rows)
    assert text.count("tried here, cpu: ok") == 3 and "0.16*     fp32" in text
    assert max(map(len, text.splitlines())) <= 150 and "core_v0.16.1:225" in text


def test_no_word_claims_that_ours_has_run_on_an_npu() -> None:
    rows = matrix(supported_lines(), "0.16", TRIED)
    cells = [row["ours"]["npu"] for row in rows if row["megatron"] in supported_lines()]
    assert len(cells) == 12 and {cell["value"] for cell in cells} == {"simulated"}
    assert all(cell["ran"].startswith("simulated NPU under the real torch_npu") for cell in cells)
    assert "never" in VALUES["simulated"] and dtypes_json(rows)["values"] == VALUES
    text = dtypes_text(rows)
    assert "simulated       grouped experts run on the simulated NPU; on hardware they never have" in text
    assert "fluid_npu on npu: simulated." in text and "fluid_npu on npu: runs" not in text
    line = launch_line("0.16.1", "bf16", "npu")
    assert "fluid_npu runs it, which only the simulated NPU has shown (npu_grouped_matmul takes it" in line


def test_a_grouped_matmul_that_fails_here_fails_the_command() -> None:
    rows = matrix(["0.16"], "0.16", {**TRIED, "fp16": "RuntimeError: not implemented for 'Half'"})
    assert failed_here(rows) and "tried here, cpu: RuntimeError" in dtypes_text(rows)
    assert not failed_here(matrix(["0.16"], "0.16", TRIED)) and not failed_here(matrix(["0.16"], None, {}))
