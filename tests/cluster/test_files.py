"""Files that a node lacks are named with the fix; exit code 3 says that nothing else is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cluster_job import job_of, make_checkout, make_files


def check(folder: Path, *extra: str, megatron: str | None = None, **changes: object):  # type: ignore[no-untyped-def]
    variables = make_files(folder)
    given = ["--data-path", variables["DATA"], "--tokenizer-model", variables["TOKENIZER"]]
    words = [*given, *extra]
    for flag in ("--data-path", "--tokenizer-model"):  # the test's own value wins
        if flag in extra:
            at = words.index(flag)
            del words[at : at + 2]
    megatron = variables["MEGATRON"] if megatron is None else megatron
    return job_of("mixtral_8x7b").check(*words, megatron=megatron, files=True, **changes)  # type: ignore[arg-type]


def test_with_all_files_there_is_nothing_to_say(tmp_path: Path) -> None:
    checked = check(tmp_path)
    assert not checked.problems and checked.exit_code == 0
    assert checked.megatron == ("0.12.1", "the checkout is 0.12.1")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data-path", "nowhere/text"], "--data-path nowhere/text: there is no file nowhere/text.bin and no nowhere"),
        (["--data-path", "0.5", "here", "0.5", "there"], "--data-path there: there is no file there.bin"),
        (["--tokenizer-model", "nowhere"], "--tokenizer-model nowhere: there is no such file or folder; set TOKENIZER"),
        (["--load", "nowhere", "--exit-on-missing-checkpoint"], "--load nowhere: holds no checkpoint"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, extra: list[str], message: str) -> None:
    checked = check(tmp_path, *extra)
    assert any(problem.text().startswith(message) for problem in checked.errors), checked.problems
    assert checked.exit_code == 3


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ("", "MEGATRON (not set): the Megatron-LM checkout is not named; git clone"),
        ("nowhere", "MEGATRON nowhere: no pretrain_gpt.py and no megatron/core/package_info.py there"),
    ],
)
def test_a_missing_megatron_lm_is_named(tmp_path: Path, megatron: str, message: str) -> None:
    checked = check(tmp_path, megatron=megatron)
    assert checked.errors[0].text().startswith(message) and checked.exit_code == 3


def test_a_checkout_without_the_launch_line_would_be_stock_megatron(tmp_path: Path) -> None:
    stock = make_checkout(tmp_path / "stock", patched=False)
    checked = check(tmp_path, megatron=str(stock))
    assert "does not import fluid_npu.megatron_adaptor" in checked.errors[0].text()
    assert f"fluid-npu megatron-lm apply {stock}" in checked.errors[0].fix


def test_a_checkout_without_mindspeed_has_no_npu(tmp_path: Path) -> None:
    alone = make_checkout(tmp_path / "alone", mindspeed=False)
    checked = check(tmp_path, megatron=str(alone))
    assert "does not import mindspeed.megatron_adaptor" in checked.errors[0].text() and checked.exit_code == 3


def test_the_flags_expected_are_those_of_the_checkout(tmp_path: Path) -> None:
    newer = make_checkout(tmp_path / "newer", version="0.16.1")
    checked = check(tmp_path, "--moe-token-dispatcher-type", "alltoall_seq", megatron=str(newer))
    assert checked.megatron.value == "0.16.1"
    assert any("must be one of allgather, alltoall, flex" in problem.text() for problem in checked.errors)
