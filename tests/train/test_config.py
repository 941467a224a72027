"""Configurations that cannot run are refused before anything starts, naming flag, value and fix."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fluid_npu import cli
from fluid_npu.train import cli as cli_train
from fluid_npu.train import exit_codes
from fluid_npu.train.config import DISPATCHES, ConfigError, TrainConfig, dense_stages, differing_flag, validate
from fluid_npu.train.presets import PresetError

pytestmark = pytest.mark.host

REFUSED = [
    (["--moe-chunks", "2"], r"--moe-chunks 2: --overlap auto has one; use --overlap full"),
    (
        ["--overlap", "full", "--moe-chunks", "3"],
        r"--moe-chunks 3: a rank has 4 experts .*allowed are 1, 2, 4 and auto",
    ),
    (
        ["--overlap", "full", "--moe-chunks", "2", "--dispatch", "static"],
        r"--moe-chunks 2: --dispatch static sends all tokens in one piece; use --dispatch once-per-rank",
    ),
    (
        ["--overlap", "full", "--moe-chunks", "3", "--dispatch", "once-per-rank", "--moe-chunks-of", "experts"],
        r"--moe-chunks 3: a rank has 4 experts .*allowed are 1, 2, 4 and auto",
    ),
    (["--overlap", "full", "--moe-chunks-of", "rows"], r"--moe-chunks-of 'rows': allowed are auto, tokens, experts"),
    (["--moe-chunks-of", "experts"], r"--moe-chunks-of experts: --overlap auto has no chunks; use --overlap full"),
    (["--overlap", "full", "--moe-chunks-of", "tokens"], r"--moe-chunks-of tokens: --dispatch plain .*once-per-rank"),
    (["--overlap", "full", "--moe-chunks", "0"], r"--moe-chunks 0: must be a number of at least 1, or auto"),
    (["--overlap", "full", "--moe-chunks", "many"], r"--moe-chunks many: must be a number of at least 1, or auto"),
    (
        ["--overlap", "full", "--moe-chunks", "99999", "--dispatch", "once-per-rank"],
        r"--moe-chunks 99999: with --dispatch once-per-rank chunks may be of tokens, and a rank has \d+; use fewer",
    ),
    (
        ["--overlap", "full", "--moe-chunks", "3", "--dispatch", "auto"],
        r"--moe-chunks 3: a rank has 4 experts .*allowed are 1, 2, 4 and auto",
    ),
    (["--overlap", "full", "--impl", "stock"], r"--overlap full: stock Megatron"),
    (["--local-first"], r"--local-first: --overlap auto has no chunks; use --overlap full, or leave it out"),
    (["--local-first", "--overlap", "full", "--ep", "1"], r"--local-first: with --ep 1 all rows are local; leave it"),
    (
        ["--local-first", "--overlap", "full", "--dispatch", "once-per-node"],
        r"--local-first: --dispatch once-per-node sends all tokens in one piece; use --dispatch once-per-rank",
    ),
    (
        ["--local-first", "--overlap", "full", "--a2a-payload-dtype", "fp8"],
        r"--a2a-payload-dtype fp8: it is not coded in chunks \(--local-first\); leave one of them out",
    ),
    (["--interleave-batches", "--overlap", "off"], r"--interleave-batches: --overlap off waits .*; leave it out"),
    (["--interleave-batches", "--ep", "1"], r"--interleave-batches: with --ep 1 there is no AllToAll; leave it out"),
    (
        ["--interleave-batches", "--micro-batch-size", "3"],
        r"--interleave-batches: --micro-batch-size 3 has no halves; use --micro-batch-size 4",
    ),
    (["--interleave-batches", "--impl", "stock"], r"--interleave-batches: stock Megatron .*has none; leave it out"),
    (["--cp", "2", "--impl", "stock", "--overlap", "off"], r"--cp 2: stock Megatron .*use --cp 1 or --impl fluid"),
    (
        ["--cp", "2", "--seq-length", "6"],
        r"--seq-length 6: must be a multiple of 2\*cp\*tp = 2\*2\*1 = 4, .*use --seq-length 8",
    ),
    (["--overlap", "sometimes"], r"--overlap 'sometimes': allowed are off, dw, full, auto"),
    (["--device", "tpu"], r"--device 'tpu': allowed are auto, cpu, cuda, npu"),
    (["--dtype", "fp8"], r"--dtype 'fp8': allowed are fp32, bf16, fp16"),
    (["--impl", "te"], r"--impl 'te': allowed are fluid, stock"),
    (["--preset", "mixtral-9x9b"], r"--preset 'mixtral-9x9b'"),
    (["--nproc", "3", "--ep", "1", "--tp", "2"], r"--nproc 3: must be a multiple of tp\*pp\*cp = 2.*use --nproc 4"),
    (["--nproc", "2", "--ep", "4"], r"--ep 4: must divide the 2 ranks.*use --ep 2 or --nproc 4"),
    (["--nproc", "3", "--ep", "3"], r"--ep 3: must divide --experts 8 .*use --ep 2"),
    (["--nproc", "4", "--tp", "4"], r"--tp 4: must divide --kv-heads 2 .*use --tp 2"),
    (["--nproc", "3", "--pp", "3", "--ep", "1"], r"--pp 3: must divide --layers 4"),
    (
        ["--pp", "2", "--ep", "1", "--vpp", "3", "--micro-batches", "2"],
        r"--vpp 3: .* = 6 must divide --layers 4 ",
    ),
    (["--vpp", "2"], r"--vpp 2: needs a pipeline, and --pp is 1; use --pp 2"),
    (
        ["--pp", "2", "--ep", "1", "--vpp", "2"],
        r"--micro-batches 1: must be a multiple of --pp 2 .*hes 2",
    ),
    (["--vpp", "0"], r"--vpp 0: must be at least 1"),
    (["--nproc", "0"], r"--nproc 0: must be at least 1"),
    (["--steps", "0"], r"--steps 0: must be at least 1"),
    (["--micro-batches", "-1"], r"--micro-batches -1: must be at least 1"),
    (["--lr", "0"], r"--lr 0.0: must be above 0"),
    (["--lr", "nan"], r"--lr nan: must be above 0"),
    (["--timeout", "-5"], r"--timeout -5.0: must be above 0"),
    (["--lr", "1e-4", "--min-lr", "1e-3"], r"--min-lr 0.001: must be at most --lr"),
    (["--impl", "stock", "--overlap", "dw"], r"--overlap dw: stock Megatron"),
    (["--carry-over", "--overlap", "off"], r"--carry-over: with --overlap off"),
    (["--carry-over", "--impl", "stock"], r"--carry-over: stock Megatron"),
    (["--impl", "stock", "--plant-delay-ms", "5"], r"--plant-delay-ms: stock Megatron"),
    (["--profile", "p.json", "--overlap", "dw"], r"--profile p.json: it decides what --overlap dw asks for; drop one"),
    (["--profile", "p.json", "--carry-over"], r"--profile p.json: it decides what --carry-over asks for"),
    (["--profile", "p.json", "--dispatch", "auto"], r"--profile p.json: it decides what --dispatch auto asks for"),
    (
        ["--profile", "p.json", "--a2a-transport", "auto"],
        r"--profile p.json: it decides what --a2a-transport auto asks",
    ),
    (["--profile", "p.json", "--impl", "stock"], r"--profile p.json: stock Megatron"),
    (
        ["--dispatch", "once-per-node", "--overlap", "full", "--moe-chunks", "2"],
        r"--moe-chunks 2: --dispatch once-per-node sends all tokens in one piece; use --dispatch once-per-rank",
    ),
    (
        ["--dispatch", "once-per-node", "--a2a-payload-dtype", "fp8"],
        r"--a2a-payload-dtype fp8: --dispatch once-per-node .* use --dispatch once-per-rank, or",
    ),
    (["--dispatch", "once-per-node", "--impl", "stock"], r"--dispatch once-per-node: stock Megatron .* has none"),
    (["--dispatch", "twice"], r"--dispatch 'twice': allowed are plain, once-per-rank, once-per-node, static, auto"),
    (["--dispatch", "auto", "--impl", "stock"], r"--dispatch auto: stock Megatron .* use --dispatch plain"),
    (
        ["--moe-cuda-graph"],
        r"--moe-cuda-graph: --dispatch plain may wait for sizes .*; use --dispatch static or once-per-rank",
    ),
    (
        ["--moe-cuda-graph", "--dispatch", "static", "--carry-over", "--overlap", "dw"],
        r"--moe-cuda-graph: --carry-over leaves dW for another layer",
    ),
    (["--moe-cuda-graph", "always"], r"--moe-cuda-graph 'always': allowed are on, off, auto"),
    (["--moe-cuda-graph", "on", "--dispatch", "auto"], r"--moe-cuda-graph: --dispatch auto may wait for sizes"),
    (["--moe-cuda-graph", "auto", "--impl", "stock"], r"--moe-cuda-graph auto: stock Megatron .*leave it out"),
    (["--moe-cuda-graph", "auto", "--profile", "p.json"], r"--profile p.json: it decides what --moe-cuda-graph asks"),
    (["--moe-cuda-graph", "--device", "cpu"], r"--moe-cuda-graph: --device cpu records no graphs"),
    (["--attention-chunks", "0"], r"--attention-chunks 0: must be at least 1"),
    (["--attention-chunks", "many"], r"--attention-chunks many: a number, or auto"),
    (["--attention-chunks", "2"], r"--attention-chunks 2: with --cp 1 no heads are exchanged; use --cp 2"),
    (
        ["--attention-chunks", "3", "--cp", "2"],
        r"--attention-chunks 3: must divide the 4 heads of a rank .*; use --attention-chunks 2",
    ),
    (
        ["--a2a-transport", "pigeon"],
        r"--a2a-transport 'pigeon': allowed are auto, collective, high-priority, peer-copy",
    ),
    (["--a2a-payload-dtype", "int4"], r"--a2a-payload-dtype 'int4': allowed are same, fp8"),
    (["--a2a-payload-dtype", "fp8", "--impl", "stock"], r"--a2a-payload-dtype fp8: stock Megatron .* has none"),
    (["--a2a-payload-dtype", "fp8", "--device", "npu"], r"--a2a-payload-dtype fp8: torch_npu has no e4m3 numbers"),
    (
        ["--a2a-payload-dtype", "fp8", "--overlap", "full", "--moe-chunks", "2"],
        r"--a2a-payload-dtype fp8: it is not coded in chunks \(--moe-chunks 2\); use --moe-chunks 1",
    ),
    (["--a2a-node-size", "3"], r"--a2a-node-size 3: must divide --nproc 2; leave it out"),
    (["--a2a-node-size", "1"], r"--a2a-node-size 1: --a2a-transport collective has no nodes; use two-level or auto"),
    (
        ["--a2a-ctas", "8"],
        r"--a2a-ctas 8: --a2a-transport collective has no NCCL communicator of its own; use --a2a-transport "
        r"high-priority or few-ctas",
    ),
    (
        ["--a2a-ctas", "8", "--a2a-transport", "auto"],
        r"--a2a-ctas 8: --a2a-transport auto measures candidates with their own settings; use --a2a-transport high-",
    ),
    (["--a2a-ctas", "8", "--a2a-transport", "two-level"], r"--a2a-ctas 8: --a2a-transport two-level has no NCCL comm"),
    (
        ["--a2a-ctas", "-1", "--a2a-transport", "high-priority"],
        r"--a2a-ctas -1: allowed are 0, 1, 2, 4, 8, 16, 32, 64, .*; use one of them, or leave it out",
    ),
    (["--a2a-ctas", "65", "--a2a-transport", "few-ctas"], r"--a2a-ctas 65: allowed are .*its 64 channels; use one of"),
    (["--a2a-ctas", "12", "--a2a-transport", "few-ctas"], r"--a2a-ctas 12: allowed are .*a power of two"),
    (["--a2a-ctas", "8", "--impl", "stock"], r"--a2a-ctas 8: stock Megatron .* has none; leave it out"),
    (["--a2a-ctas", "8", "--profile", "p.json"], r"--profile p.json: it decides what --a2a-ctas 8 asks for"),
    (["--a2a-transport", "pairwise", "--impl", "stock"], r"--a2a-transport pairwise: stock Megatron .* has none"),
    (
        ["--attention-chunks", "2", "--cp", "2", "--nproc", "4", "--preset", "deepseek-v3"],
        r"--attention-chunks 2: the multi-latent attention of preset deepseek-v3 has none",
    ),
    (["--topk", "9"], r"--topk 9: must be at most --experts 8"),
    (["--hidden", "257"], r"--heads 8: must divide --hidden 257"),
    (["--resume"], r"--resume: there is no run of mixtral-tiny"),
]


@pytest.mark.parametrize(("words", "text"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_bad_value_is_refused_by_name(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == exit_codes.USAGE
    assert re.search(text, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--frobnicate"], ["--step", "5"], ["--steps", "many"], ["extra"]])
def test_unknown_flags_and_words_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *words])
    assert caught.value.code == exit_codes.USAGE


def test_missing_data_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "o")]) == exit_codes.DATA
    assert "there is no data set" in capsys.readouterr().err


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fluid_npu.train.checkpoint_files import finish, start_writing

    finish(start_writing(tmp_path / "checkpoints", 5))
    assert cli.main(["train", "--out", str(tmp_path)]) == exit_codes.USAGE
    assert "add --resume or choose another directory" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "--out", str(tmp_path / "file" / "run")]) == exit_codes.FAILED
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "value"), [([], False), (["--moe-cuda-graph", "off"], False), (["--moe-cuda-graph", "auto"], "auto")]
)
def test_recording_is_off_unless_asked_for(words: list[str], value: Any) -> None:
    import argparse

    parser = cli_train.add_train_parser(argparse.ArgumentParser().add_subparsers())
    assert cli_train.config_of(parser.parse_args(words)).moe_cuda_graph == value


def test_json_round_trip() -> None:
    config = TrainConfig(cut={"layers": 2}, steps=7, lr_decay_steps=9, overlap="dw", moe_cuda_graph="auto")
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["{", '{"stepz": 3}', "[]"])
def test_a_foreign_configuration_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a configuration"):
        TrainConfig.from_json(text)


@pytest.mark.parametrize(
    "sizes",
    [{"nproc": 4, "ep": 2}, {"nproc": 8, "ep": 8}, {"nproc": 4, "tp": 2, "ep": 4}, {"nproc": 4, "pp": 2, "ep": 2}],
)
def test_sizes_that_fit_are_accepted(sizes: dict[str, int]) -> None:
    assert validate(TrainConfig(**sizes)).nproc == sizes["nproc"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "stages"), [({}, 0), ({"pp": 2}, 1), ({"pp": 2, "vpp": 2}, 0), ({"pp": 4}, 2)], ids=str
)
def test_stages_without_experts_are_known(sizes: dict[str, int], stages: int) -> None:
    config = TrainConfig(preset="deepseek-v3", cut={"layers": 8, "first_dense_layers": 5}, **sizes)  # type: ignore[arg-type]
    assert dense_stages(config) == stages


def test_a_bad_cut_is_a_preset_error() -> None:
    with pytest.raises(PresetError, match="--kv-heads 3"):
        validate(TrainConfig(cut={"kv_heads": 3}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 2}, "--seed 2: the checkpoint was written with --seed 1234"),
        ({"vpp": 2}, "--vpp 2: the checkpoint was written with --vpp 1; resume with --vpp 1"),
        ({"ep": 1}, "--ep 1: the checkpoint was written with --ep 2"),
        ({"cut": {"layers": 2}}, "--layers 2: the checkpoint was written without --layers"),
        ({"steps": 400}, "--lr-decay-steps 400: the checkpoint was written with --lr-decay-steps 300"),
        ({"steps": 400, "lr_decay_steps": 300}, None),
        ({"overlap": "dw", "timeout": 3.0, "out": "elsewhere"}, None),
        ({"a2a_transport": "few-ctas", "a2a_ctas": 4}, None),
    ],
)
def test_a_resumed_run_must_be_the_same_run(change: dict[str, Any], text: str | None) -> None:
    saved = dataclasses.asdict(TrainConfig(steps=300))
    found = differing_flag(saved, TrainConfig(**{"steps": 300, **change}))
    assert found is None if text is None else found is not None and found.startswith(text)


def test_help_and_presets_import_neither_torch_nor_megatron() -> None:
    import subprocess
    import sys

    code = (
        "import sys, contextlib\nfrom fluid_npu import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['train', '--help'])\n"
        "cli.main(['presets'])\nassert not {'torch', 'megatron', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exit codes:" in done.stdout


@pytest.mark.parametrize("version", ["0.12.1", "0.19.2", "0.160.0", None])
def test_a_line_of_megatron_without_checkpoints_is_refused(version: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"megatron-core {version or 'is not'}.*needs 0\.16; pip install"):
        cli_train.check_megatron(version)
    cli_train.check_megatron("0.16.1")


def test_the_words_of_dispatch_are_those_of_the_layer() -> None:
    from fluid_npu.mcore import dispatch_choice

    assert dispatch_choice.DISPATCHES == DISPATCHES
