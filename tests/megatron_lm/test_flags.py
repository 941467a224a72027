"""Our flags in a parser, alone and beside somebody else's; contradictions; what auto chooses."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from fluid_npu.adaptor.megatron_lm import checks, devices, startup
from fluid_npu.adaptor.megatron_lm.checks import FlagError
from fluid_npu.adaptor.megatron_lm.flags import FLAGS, with_fluid_flags

#: What Megatron's own parser gives for a launch that is in order.
MEGATRON: dict[str, Any] = {
    "moe_grouped_gemm": True,
    "num_experts": 8,
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
    "bf16": True,
    "fp16": False,
}


def parser_of_megatron(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--moe-grouped-gemm", action="store_true")
    return parser


def parse(*words: str, provider: Any = None) -> argparse.Namespace:
    parser = with_fluid_flags(parser_of_megatron)(argparse.ArgumentParser(allow_abbrev=False))
    if provider is not None:
        parser = provider(parser)
    return parser.parse_args(list(words))


def launch(*words: str, **megatron: Any) -> argparse.Namespace:
    args = parse(*words)
    for name, value in {**MEGATRON, **megatron}.items():
        setattr(args, name, value)
    return args


def test_defaults_change_nothing() -> None:
    args = parse()
    assert args.fluid_overlap == "auto" and args.fluid_device == "auto"
    assert not args.gemm_gradient_accumulation_fusion and not args.fluid_carry_over
    assert (args.fluid_dispatch, args.fluid_moe_chunks, args.fluid_attention_chunks) == ("plain", "auto", 1)
    assert (args.fluid_a2a_transport, args.fluid_a2a_node_size, args.fluid_a2a_ctas) == ("collective", 0, 0)
    assert args.fluid_a2a_payload_dtype == "same"
    assert args.fluid_moe_chunks_of == "auto"
    assert not args.fluid_local_first and args.fluid_moe_cuda_graph == "off"
    assert args.fluid_report is None and args.fluid_twin_every == 0 and args.fluid_fingerprints is None


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert all(flag in shown for flag, _ in FLAGS)
    assert all(len(settings["help"]) > 30 for _, settings in FLAGS)


def test_a_flag_that_mindspeed_brings_is_shared() -> None:
    def mindspeed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument_group("moe-grouped-gemm").add_argument(
            "--gemm-gradient-accumulation-fusion", action="store_true"
        )
        return parser

    assert parse("--gemm-gradient-accumulation-fusion", provider=mindspeed).gemm_gradient_accumulation_fusion
    assert parse("--fluid-overlap", "dw", provider=mindspeed).fluid_overlap == "dw"


def test_a_parser_that_parses_twice_gets_the_flags_once() -> None:
    parser = with_fluid_flags(parser_of_megatron)(argparse.ArgumentParser())
    assert parser.parse_known_args(["--fluid-overlap", "dw", "--x"])[1] == ["--x"]
    assert parser.parse_args(["--fluid-overlap", "off"]).fluid_overlap == "off"


@pytest.mark.parametrize("words", [["--fluid-overlap", "yes"], ["--fluid-twin-every", "x"], ["--fluid-device", "gpu"]])
def test_a_wrong_value_is_refused_by_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


STATIC = ("--fluid-dispatch", "static")
REFUSED: list[tuple[list[str], dict[str, Any], str, str]] = [
    (["--fluid-overlap", "full"], {"moe_grouped_gemm": False}, "0.16", "--fluid-overlap full without --moe-grouped"),
    (["--fluid-overlap", "full"], {"expert_model_parallel_size": 1}, "0.16", "full with --expert.*-size 1: there is"),
    (["--fluid-moe-chunks", "0"], {}, "0.16", "--fluid-moe-chunks 0: must be a number of at least 1, or auto"),
    (["--fluid-moe-chunks", "many"], {}, "0.16", "--fluid-moe-chunks many: must be a number"),
    (["--fluid-moe-chunks", "2"], {}, "0.16", "--fluid-moe-chunks 2 with --fluid-overlap auto: .*use --fluid-ov"),
    (["--fluid-moe-chunks", "3", "--fluid-overlap", "full"], {}, "0.16", "3: a rank has 4 experts; allowed are 1, 2"),
    (
        ["--fluid-moe-chunks-of", "experts"],
        {},
        "0.16",
        "--fluid-moe-chunks-of experts with --fluid-overlap auto: .*use --fluid-overlap full",
    ),
    (
        ["--fluid-moe-chunks-of", "tokens", "--fluid-overlap", "full"],
        {},
        "0.16",
        "--fluid-moe-chunks-of tokens with --fluid-dispatch plain: .*use once-per-rank, or drop",
    ),
    (
        [
            *("--fluid-moe-chunks", "3", "--fluid-overlap", "full"),
            *("--fluid-dispatch", "once-per-rank", "--fluid-moe-chunks-of", "experts"),
        ],
        {},
        "0.16",
        "3: a rank has 4 experts; allowed are 1, 2",
    ),
    (
        ["--fluid-moe-chunks", "2", "--fluid-overlap", "full", "--fluid-dispatch", "static"],
        {},
        "0.16",
        "--fluid-moe-chunks 2 with --fluid-dispatch static: .*use once-per-rank, or drop",
    ),
    (
        ["--fluid-moe-chunks", "2", "--fluid-overlap", "full", "--fluid-dispatch", "once-per-node"],
        {},
        "0.16",
        "--fluid-moe-chunks 2 with --fluid-dispatch once-per-node: .*use once-per-rank, or drop",
    ),
    (
        ["--fluid-dispatch", "once-per-node", "--fluid-a2a-payload-dtype", "fp8"],
        {},
        "0.16",
        "fp8 with --fluid-dispatch once-per-node: .*use once-per-rank",
    ),
    (
        ["--fluid-dispatch", "once-per-node"],
        {"expert_tensor_parallel_size": 2},
        "0.16",
        "--fluid-dispatch once-per-node with expert tensor parallel size 2: .*or --fluid-dispatch once-per-rank",
    ),
    (["--fluid-attention-chunks", "0"], {}, "0.16", "--fluid-attention-chunks 0: must be at least 1"),
    (["--fluid-attention-chunks", "two"], {}, "0.16", "--fluid-attention-chunks two: must be at least 1, which cuts"),
    (["--fluid-attention-chunks", "2"], {}, "0.16", "--fluid-attention-chunks 2 with --context-parallel-size 1: "),
    (["--fluid-attention-chunks", "2"], {"moe_grouped_gemm": False}, "0.16", "chunks 2 without --moe-grouped-gemm"),
    (["--fluid-dispatch", "auto"], {"moe_grouped_gemm": False}, "0.16", "--fluid-dispatch auto without --moe-grouped"),
    (
        ["--fluid-dispatch", "once-per-rank"],
        {"moe_token_dispatcher_type": "allgather"},
        "0.16",
        "--fluid-dispatch once-per-rank with --moe-token-dispatcher-type allgather: .*use alltoall",
    ),
    (
        ["--fluid-dispatch", "once-per-rank"],
        {"moe_pad_expert_input_to_capacity": True},
        "0.16",
        "with --moe-pad-expert-input-to-capacity: .*drop one",
    ),
    (
        ["--fluid-dispatch", "static"],
        {"expert_tensor_parallel_size": 2},
        "0.16",
        "--fluid-dispatch static with expert tensor parallel size 2: .*or --fluid-dispatch once-per-rank",
    ),
    (
        ["--fluid-dispatch", "static"],
        {"expert_tensor_parallel_size": None, "tensor_model_parallel_size": 4},
        "0.16",
        "static with expert tensor parallel size 4: .*use --expert-tensor-parallel-size 1",
    ),
    (["--fluid-a2a-transport", "auto"], {"moe_grouped_gemm": False}, "0.16", "auto without --moe-grouped-gemm: the"),
    (["--fluid-a2a-transport", "pairwise"], {"expert_model_parallel_size": 1}, "0.16", "pairwise with --expert.*drop"),
    (["--fluid-a2a-payload-dtype", "fp8"], {"moe_grouped_gemm": False}, "0.16", "fp8 without --moe-grouped-gemm: the"),
    (
        ["--fluid-a2a-payload-dtype", "fp8", "--fluid-device", "npu"],
        {},
        "0.16",
        "fp8 with --fluid-device npu: torch_npu",
    ),
    (["--fluid-a2a-node-size", "4"], {}, "0.16", "size 4 with --fluid-a2a-transport collective: nodes .*two-level"),
    (["--fluid-a2a-node-size", "-1"], {}, "0.16", "--fluid-a2a-node-size -1"),
    (
        ["--fluid-a2a-ctas", "8"],
        {},
        "0.16",
        "--fluid-a2a-ctas 8: --fluid-a2a-transport collective has no NCCL .*use --fluid-a2a-transport high-priority or",
    ),
    (
        ["--fluid-a2a-ctas", "8", "--fluid-a2a-transport", "auto"],
        {},
        "0.16",
        "--fluid-a2a-ctas 8: .*auto measures",
    ),
    (
        ["--fluid-a2a-ctas", "-1", "--fluid-a2a-transport", "few-ctas"],
        {},
        "0.16",
        "--fluid-a2a-ctas -1: allowed are",
    ),
    (["--fluid-overlap", "dw"], {"moe_grouped_gemm": False}, "0.16", "add --moe-grouped-gemm"),
    (["--fluid-overlap", "dw"], {"expert_model_parallel_size": 1}, "0.16", "no AllToAll to hide; raise it, or"),
    (["--fluid-overlap", "dw"], {"moe_token_dispatcher_type": "allgather"}, "0.16", "type allgather: .*use alltoall"),
    ([], {"moe_token_dispatcher_type": "flex"}, "0.16", "type flex .*use alltoall"),
    ([], {"moe_use_legacy_grouped_gemm": True}, "0.16", "--moe-use-legacy-grouped-gemm: .*drop the flag"),
    ([], {"num_experts": None}, "0.16", "set --num-experts N"),
    ([], {"add_bias_linear": True}, "0.16", "add --disable-bias-linear"),
    ([], {"overlap_moe_expert_parallel_comm": True}, "0.16", "1F1B.*drop --overlap-moe-expert-parallel-comm"),
    ([], {"delay_wgrad_compute": True}, "0.16", "drop --delay-wgrad-compute"),
    ([], {"overlap_dispatch_backward_with_experts_wgrad": True}, "0.18", "drop --overlap-dispatch-backward"),
    ([], {"moe_alltoall_overlap_comm": True}, "0.12", "MindSpeed.*drop --moe-alltoall-overlap-comm"),
    ([], {"moe_fb_overlap": True}, "0.12", "MindSpeed.*drop --moe-fb-overlap"),
    ([], {"fp16": True, "bf16": False}, "0.12", "--fp16 with --expert-model-parallel-size 2: Megatron 0.12 refuses"),
    (["--fluid-carry-over"], {}, "0.12", "takes no late gradients; drop the flag"),
    (["--fluid-carry-over", "--fluid-overlap", "off"], {}, "0.16", "use --fluid-overlap dw"),
    (["--fluid-carry-over"], {"moe_grouped_gemm": False}, "0.16", "--fluid-carry-over without --moe-grouped-gemm"),
    (
        ["--fluid-interleave-batches"],
        {"micro_batch_size": 3},
        "0.16",
        "--micro-batch-size 3: .*use --micro-batch-size 4",
    ),
    (["--fluid-local-first"], {}, "0.16", "--fluid-local-first with --fluid-overlap auto: .*use --fluid-overlap full"),
    (
        ["--fluid-local-first", "--fluid-overlap", "full"],
        {"expert_model_parallel_size": 1},
        "0.16",
        "--fluid-local-first with --expert-model-parallel-size 1: all rows are local; raise it",
    ),
    (
        [
            "--fluid-local-first",
            "--fluid-overlap",
            "full",
            "--fluid-dispatch",
            "once-per-node",
            "--fluid-a2a-node-size",
            "1",
        ],
        {},
        "0.16",
        "--fluid-local-first with --fluid-dispatch once-per-node: .*use once-per-rank, or drop",
    ),
    (
        ["--fluid-local-first", "--fluid-overlap", "full", "--fluid-a2a-payload-dtype", "fp8"],
        {},
        "0.16",
        "--fluid-local-first with --fluid-a2a-payload-dtype fp8: chunks are not coded; drop one",
    ),
    (["--fluid-local-first"], {"moe_grouped_gemm": False}, "0.16", "--fluid-local-first without --moe-grouped-gemm"),
    (
        ["--fluid-moe-cuda-graph"],
        {},
        "0.16",
        "--fluid-moe-cuda-graph on with --fluid-dispatch plain: .*use static or once-per-rank",
    ),
    (
        ["--fluid-moe-cuda-graph", *STATIC, "--fluid-device", "cpu"],
        {},
        "0.16",
        "on with --fluid-device cpu: .*use cuda",
    ),
    (["--fluid-moe-cuda-graph", *STATIC, "--fluid-carry-over"], {}, "0.16", "on with --fluid-carry-over: .*drop one"),
    (
        ["--fluid-moe-cuda-graph", *STATIC, "--fluid-a2a-transport", "peer-copy"],
        {},
        "0.16",
        "on with --fluid-a2a-transport peer-copy: .*use collective",
    ),
    (
        ["--fluid-moe-cuda-graph", *STATIC, "--fluid-interleave-batches"],
        {},
        "0.16",
        "on with --fluid-interleave-batches: .*drop one",
    ),
    (
        ["--fluid-moe-cuda-graph", *STATIC],
        {"pipeline_model_parallel_size": 2},
        "0.16",
        "on with --pipeline-model-parallel-size 2: .*use 1, or auto",
    ),
    (
        ["--fluid-moe-cuda-graph", *STATIC],
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        "0.16",
        "on with --tensor-model-parallel-size 2: .*use 1, or auto",
    ),
    (
        ["--fluid-moe-cuda-graph", *STATIC],
        {"recompute_granularity": "full"},
        "0.16",
        "on with --recompute-granularity full",
    ),
    (["--fluid-moe-cuda-graph", "auto"], {"moe_grouped_gemm": False}, "0.16", "graph auto without --moe-grouped-gemm"),
    (["--fluid-interleave-batches", "--fluid-overlap", "off"], {}, "0.16", "with --fluid-overlap off: .*drop one"),
    (["--fluid-interleave-batches"], {}, "0.12", "layers of Megatron 0.12 have no steps; drop the flag"),
    (["--fluid-interleave-batches"], {"moe_grouped_gemm": False}, "0.16", "--fluid-interleave-batches without --moe-g"),
    (["--gemm-gradient-accumulation-fusion"], {"moe_grouped_gemm": False}, "0.16", "--gemm-gradient.* add --moe-gr"),
    (["--fluid-twin-every", "-1"], {}, "0.16", "--fluid-twin-every -1: must be 0"),
]


@pytest.mark.parametrize(("words", "megatron", "line", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused_with_the_fix(
    words: list[str], megatron: dict[str, Any], line: str, message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        checks.check(launch(*words, **megatron), line)


@pytest.mark.parametrize(
    ("words", "megatron", "line"),
    [
        (["--fluid-overlap", "dw", "--fluid-carry-over"], {}, "0.16"),
        (["--fluid-overlap", "full", "--fluid-moe-chunks", "4", "--fluid-carry-over"], {}, "0.18"),
        (["--fluid-overlap", "full", "--fluid-dispatch", "auto"], {"num_experts": 64}, "0.12"),
        (["--fluid-overlap", "full", "--fluid-dispatch", "once-per-rank", "--fluid-moe-chunks", "3"], {}, "0.16"),
        (
            ["--fluid-overlap", "full", "--fluid-dispatch", "once-per-rank", "--fluid-moe-chunks-of", "experts"],
            {},
            "0.16",
        ),
        (["--fluid-dispatch", "once-per-node", "--fluid-a2a-node-size", "4"], {}, "0.16"),
        (["--fluid-a2a-transport", "high-priority", "--fluid-a2a-ctas", "8"], {}, "0.16"),
        (["--fluid-attention-chunks", "2"], {"context_parallel_size": 2}, "0.16"),
        (["--fluid-attention-chunks", "auto"], {"moe_grouped_gemm": False}, "0.16"),
        (["--gemm-gradient-accumulation-fusion"], {"bf16": False}, "0.12"),
        (["--fluid-interleave-batches"], {"micro_batch_size": 4}, "0.16"),
        (["--fluid-local-first", "--fluid-overlap", "full", "--fluid-moe-chunks", "1"], {}, "0.16"),
        (["--fluid-moe-cuda-graph", *STATIC], {}, "0.16"),
        (["--fluid-moe-cuda-graph", *STATIC, "--fluid-local-first", "--fluid-overlap", "full"], {}, "0.16"),
        (["--fluid-moe-cuda-graph", "auto", "--fluid-carry-over"], {"pipeline_model_parallel_size": 2}, "0.16"),
        ([], {"bf16": False, "fp16": True}, "0.16"),
        ([], {"bf16": False, "fp16": True, "expert_model_parallel_size": 1}, "0.12"),
        ([], {"moe_grouped_gemm": False, "num_experts": None, "add_bias_linear": True}, "0.19"),
        ([], {"moe_grouped_gemm": False, "moe_fb_overlap": True}, "0.12"),
        ([], {"moe_token_dispatcher_type": "allgather"}, "0.18"),
    ],
    ids=str,
)
def test_what_fits_together_passes(words: list[str], megatron: dict[str, Any], line: str) -> None:
    checks.check(launch(*words, **megatron), line)


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(FlagError) as caught:
        checks.check(launch("--fluid-moe-chunks", "0", num_experts=None, add_bias_linear=True), "0.16")
    assert len(str(caught.value).splitlines()) == 3


def test_arguments_from_a_yaml_file_are_refused() -> None:
    with pytest.raises(FlagError, match="--yaml-cfg"):
        checks.check(argparse.Namespace(**MEGATRON), "0.16")


@pytest.mark.parametrize(
    ("words", "megatron", "overlap", "value", "said"),
    [
        (["--fluid-carry-over"], {}, "dw", "FC2 of the lowest layer", "no other rank holds the same experts"),
        ([], {}, "dw", "nothing", "with --fluid-carry-over alone; add it"),
        (["--fluid-carry-over"], {}, "off", "nothing", "with overlap off"),
        (["--fluid-carry-over"], {"world_size": 8}, "dw", "nothing", "4 ranks hold the same experts"),
        (["--fluid-carry-over"], {"world_size": 8, "tensor_model_parallel_size": 4}, "dw", "FC2 of the lowest", ""),
        (
            ["--fluid-carry-over"],
            {"world_size": 4, "pipeline_model_parallel_size": 2},
            "dw",
            "nothing",
            "with --pipeline-model-parallel-size 2",
        ),
        (["--fluid-carry-over", "--fluid-interleave-batches"], {}, "dw", "nothing", "--fluid-interleave-batches"),
        (["--fluid-carry-over"], {"use_megatron_fsdp": True}, "dw", "nothing", "FSDP takes no late gradients"),
    ],
    ids=str,
)
def test_what_runs_beside_the_last_reduction_follows_from_the_flags(
    words: list[str], megatron: dict[str, Any], overlap: str, value: str, said: str
) -> None:
    sizes = {"world_size": 2, "pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 1}
    args = launch(*words, **{**sizes, "expert_tensor_parallel_size": None, **megatron})
    chosen = startup.choose_reduction(args, overlap)
    assert chosen.value.startswith(value) and said in chosen.reason


@pytest.mark.parametrize(
    ("words", "megatron", "device", "world", "expected"),
    [
        (["--fluid-overlap", "off"], {}, "npu", (8, 8), ("off", "as asked")),
        (["--fluid-overlap", "full"], {}, "cpu", (2, 2), ("full", "as asked")),
        ([], {"expert_model_parallel_size": 1}, "npu", (8, 8), ("off", "no AllToAll")),
        ([], {"moe_token_dispatcher_type": "allgather"}, "cuda", (8, 8), ("off", "allgather")),
        ([], {}, "npu", (8, 8), ("dw", "the npu computes")),
        ([], {}, "cpu", (2, 2), ("off", "loopback")),
        ([], {}, "cpu", (2, 4), ("dw", "the cpu computes")),
    ],
    ids=str,
)
def test_auto_chooses_from_what_all_ranks_know(
    words: list[str],
    megatron: dict[str, Any],
    device: str,
    world: tuple[int, int],
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world[0]))
    monkeypatch.setenv("WORLD_SIZE", str(world[1]))
    value, reason = startup.choose_overlap(launch(*words, **megatron), device)
    assert value == expected[0] and expected[1] in reason


def test_a_cpu_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluid_npu.device import Choice, get_device

    monkeypatch.setattr(devices, "get_device", lambda name: Choice(get_device("cpu").value, "nothing else is here"))
    with pytest.raises(FlagError, match="nothing else is here. .*add --fluid-device cpu"):
        devices.choose("auto")
    assert devices.choose("cpu").value == "cpu"


def test_a_device_that_is_not_here_is_refused_by_its_flag() -> None:
    with pytest.raises(FlagError, match="--fluid-device npu: torch_npu is not installed.* or use --fluid-device cpu"):
        devices.choose("npu")


def test_flags_that_a_cpu_needs_are_told_at_once() -> None:
    args = launch("--fluid-device", "cpu", distributed_backend="nccl", transformer_impl="transformer_engine")
    with pytest.raises(FlagError, match="add --distributed-backend gloo --transformer-impl local$"):
        devices.enter(args)


def test_an_npu_needs_mindspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fluid_npu.device import Choice

    monkeypatch.setattr(devices, "choose", lambda name: Choice("npu", "found"))
    with pytest.raises(FlagError, match="Install MindSpeed and put `import mindspeed.megatron_adaptor`"):
        devices.enter(launch())
    monkeypatch.setitem(sys.modules, "mindspeed.megatron_adaptor", sys)
    assert devices.enter(launch()).value == "npu"
