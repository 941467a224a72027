"""Exchanges of context parallelism beside computation: where each dW runs, and attention in chunks of its heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluid_npu.mcore.head_chunks import HeadChunks
from tests.support.context import Case, Stack, make_config, run_stack, worst_error
from tests.support.device import here
from tests.support.moe import relative

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
RING = {"cp_comm_type": "ring"}


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """One after the other."""
    return [run_stack(case) for case in cases]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same bits in outputs, input gradients and weight gradients."""
    weights = all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    lists = all(torch.equal(a, b) for kind in ("out", "dx") for a, b in zip(one[kind], other[kind], strict=True))
    return weights and lists and one["weights"].keys() == other["weights"].keys()


def with_twins(cases: list[Case]) -> list[Case]:
    """Each case, and behind each its serialised twin."""
    return [replace(case, twin=twin) for case in cases for twin in (False, True)]


def check(cases: list[Case], ranks: list[Any]) -> None:
    """Every case of ``with_twins(cases)`` against float64, and against its twin bit for bit."""
    for index, case in enumerate(cases):
        errors = worst_error(case, [rank[2 * index] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
        assert all(equal(rank[2 * index], rank[2 * index + 1]) for rank in ranks), f"{case}: differs from its twin"


def test_weight_gradients_fill_the_exchanges_of_attention(run_ranks: Ranks) -> None:
    plain = Case(layers=2, micro_batches=2, shared=True)
    cases = [plain, replace(plain, carry=True), replace(plain, carry=True, config=RING)]
    ranks = run_ranks(2, run_cases, with_twins(cases), sizes=plain.sizes)
    check(cases, ranks)
    for rank in ranks:
        plain_regions, carried, ring = (rank[2 * index]["regions"] for index in range(3))
        for layer in (1, 2):
            proj = f"layer {layer} self_attention.linear_proj"
            for regions in (plain_regions, carried):
                assert regions[f"{proj} part 1"] == f"backward of hp2sp AllToAll of layer {layer}"
                assert regions[f"{proj} part 2"] == f"backward of sp2hp AllToAll of layer {layer}"
            shared = f"layer {layer} mlp.shared_experts.linear_fc"
            assert carried[f"{shared}2"] == f"backward of hp2sp AllToAll of layer {layer}"
            assert carried[f"{shared}1"] == f"backward of sp2hp AllToAll of layer {layer}"
            for name in (proj, f"{shared}1", f"{shared}2"):
                assert ring[name] == f"backward of ring AllToAll of layer {layer}"
        assert not any("qkv" in name or "shared" in name for name in plain_regions)
        qkv = [carried[f"layer {layer} self_attention.linear_qkv"] for layer in (2, 1)]
        assert qkv == ["backward of moe_combine AllToAll of layer 1", "at once"]


def unfused() -> dict[str, Any]:
    """Weight gradients in two parts through autograd, into main_grad, and whole with overlap off."""
    apart = {"gradient_accumulation_fusion": False}
    return {name: run_stack(case)["weights"] for name, case in
            {"fused": Case(micro_batches=2), "apart": Case(micro_batches=2, config=apart),
             "off": Case(micro_batches=2, overlap="off")}.items()}  # fmt: skip


def test_a_gradient_in_parts_is_the_whole_one_with_and_without_main_grad(run_ranks: Ranks) -> None:
    for found in run_ranks(2, unfused, sizes=Case().sizes):
        for name, grad in found["off"].items():
            assert relative(found["fused"][name], grad) <= 1e-6 and relative(found["apart"][name], grad) <= 1e-6, name


# ---- chunks of heads

#: Key heads of a rank above, equal to and below the chunks, shared between ranks; norm, window, recompute, carry-over.
CHUNKED = [
    [
        Case(chunks=2, key_heads=8, layers=2, micro_batches=2, qk_norm=True),
        Case(chunks=4, key_heads=4, heads=16, recompute=True, window=(3, 0)),
        Case(chunks=8, heads=16, key_heads=2, carry=True, layers=2),
        Case(chunks=2, key_heads=1, overlap="off", config={"add_qkv_bias": False}),
    ],
    [
        Case(cp=4, ep=2, chunks=2, key_heads=2, layers=2, micro_batches=2),
        Case(cp=4, ep=2, chunks=2, heads=16, key_heads=8, carry=True),
    ],
]


@pytest.mark.parametrize("cases", CHUNKED, ids=lambda cases: f"cp{cases[0].cp}-ep{cases[0].ep}")
def test_attention_in_chunks_against_one_process_and_its_twin(cases: list[Case], run_ranks: Ranks) -> None:
    ranks = run_ranks(cases[0].ranks, run_cases, with_twins(cases), sizes=cases[0].sizes)
    check(cases, ranks)
    for rank in ranks:
        for index, case in enumerate(cases):
            _check_launches(case, rank[2 * index]["launches"])
            assert rank[2 * index]["launches"] == ranks[0][2 * index]["launches"], "no rank decides alone"


def _check_launches(case: Case, launches: list[str]) -> None:
    """Every chunk has its four exchanges; the chunks come in order forward and from the last to the first backward."""
    for kind in ("sp2hp", "hp2sp"):
        chunks = [f"{kind} AllToAll of chunk {number + 1} of {case.chunks}, layer 1" for number in range(case.chunks)]
        there = [name for name in launches if name in chunks]
        back = [name.removeprefix("backward of ") for name in launches if name.removeprefix("backward of ") in chunks
                and name not in chunks]  # fmt: skip
        assert there == chunks * case.micro_batches
        assert back == chunks[::-1] * case.micro_batches


def test_the_heads_of_a_chunk() -> None:
    """Written out: 8 query heads on 2 ranks, 2 key heads a rank; and 1 key head of 2 ranks each."""
    made = HeadChunks.of(8, 4, 2, 2)
    assert [(chunk.queries, chunk.keys) for chunk in made.chunks] == [((0, 1, 4, 5), (0, 2)), ((2, 3, 6, 7), (1, 3))]
    assert (made.heads, made.key_heads) == (2, 1)
    assert made.chunks[1].blocks(2) == [4, 5, 6, 7, 12, 13, 14, 15] and made.chunks[1].whole_groups(2)
    shared = HeadChunks.of(16, 2, 4, 2)
    assert shared.chunks[0].queries == (0, 1, 4, 5, 8, 9, 12, 13) and shared.chunks[0].keys == (0, 1)
    assert shared.chunks[1].keys == () and (shared.heads, shared.key_heads) == (2, 1)
    late = HeadChunks.of(8, 4, 2, 4)
    assert [chunk.keys for chunk in late.chunks] == [(0, 2), (), (1, 3), ()]
    assert [chunk.blocks(2) for chunk in late.chunks[:2]] == [[0, 8, 2, 3, 10, 11], [1, 9]]


@pytest.mark.parametrize(
    ("heads", "keys", "ranks", "chunks", "text"),
    [
        (8, 8, 2, 8, "attention_chunks=8: each of 2 ranks has 4 of 8 query heads; use attention_chunks=4"),
        (8, 8, 2, 3, "attention_chunks=3: each of 2 ranks has 4 of 8 query heads; use attention_chunks=4"),
        (6, 3, 2, 3, "attention_chunks=3: 2 ranks share 3 key heads unevenly; use attention_chunks=1"),
        (24, 6, 2, 2, "attention_chunks=2: each of 2 ranks has 3 key heads, which it cuts in part; use"),
    ],
)
def test_heads_that_cannot_be_cut_are_named(heads: int, keys: int, ranks: int, chunks: int, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        HeadChunks.of(heads, keys, ranks, chunks)
    assert text in str(caught.value)


def refuse() -> list[str]:
    """The messages of layers that cannot be cut."""
    cases = (
        Case(chunks=2, config={"context_parallel_size": 1}),
        Case(chunks=2, config=RING),
        Case(chunks=8, heads=8),
        Case(chunks=0),
    )
    messages = []
    for case in cases:
        with pytest.raises(ValueError) as caught:
            Stack(case)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_be_cut_is_refused_by_name(run_ranks: Ranks) -> None:
    wanted = (
        "attention_chunks=2: with context_parallel_size=1 there is no AllToAll",
        "attention_chunks=2: a ring passes keys",
        "attention_chunks=8: each of 2 ranks has 4 of 8 query heads; use attention_chunks=4",
        "attention_chunks=0: at least 1 is needed",
    )
    for message, text in zip(run_ranks(2, refuse, sizes=Case().sizes)[0], wanted, strict=True):
        assert text in message


def taken_by_auto() -> list[tuple[int, str]]:
    """Chunks of layers with attention_chunks='auto', and why so many."""
    from fluid_npu.device.choice import announced

    found = []
    for overlap, changes in (("full", {}), ("dw", {}), ("full", RING), ("full", {"context_parallel_size": 1})):
        heads = Stack(Case(chunks="auto", overlap=overlap, config=changes)).layers[0].self_attention.head_chunks
        choices = [choice.reason for what, choice in announced() if what == "attention_chunks='auto'"]
        found.append((1 if heads is None else len(heads.chunks), choices[-1]))
    odd = Stack(Case(chunks="auto", overlap="full", heads=6, key_heads=6)).layers[0].self_attention
    assert odd.head_chunks is None
    return found


def test_auto_cuts_where_the_spec_pipelines_and_the_heads_can_be_cut(run_ranks: Ranks) -> None:
    full, dw, ring, alone = run_ranks(2, taken_by_auto, sizes=Case().sizes)[0]
    assert full == (2, "the fewest that overlap") and dw == (1, "overlap='dw'")
    assert ring[0] == alone[0] == 1 and "a ring passes keys" in ring[1] and "there is no AllToAll" in alone[1]


@pytest.mark.host
def test_an_attention_that_is_not_ours_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is: one of Transformer Engine, or as here a user's own."""
    from megatron.core.transformer.attention import SelfAttention

    from fluid_npu.mcore.binding import SchedulerBinder
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec, with_fluid_moe

    layer = get_fluid_moe_layer_spec(backend="local")
    layer.submodules.self_attention.module = type("Own", (SelfAttention,), {})
    with pytest.raises(ValueError, match="attention_chunks=2: the layer has Own with FluidDotProductAttention, not"):
        with_fluid_moe(layer, SchedulerBinder(attention_chunks=2))
    with_fluid_moe(layer, SchedulerBinder("full", attention_chunks="auto"))
    assert "attention_chunks='auto': 1 (the layer has Own with" in capsys.readouterr().out


def checkpointed() -> list[dict[str, Any]]:
    """Layers whole and in chunks as they are, each inside torch's activation checkpointing, re-entrant and not."""
    from torch.utils.checkpoint import checkpoint

    cases = [Case(layers=2, chunks=chunks, carry=True, key_heads=4, micro_batches=2) for chunks in (2, 1)]
    found, plain = run_cases(cases), Stack.forward
    for reentrant in (True, False):

        def forward(self: Stack, x: torch.Tensor, rotary: torch.Tensor, reentrant: bool = reentrant) -> torch.Tensor:
            for layer in self.layers:
                body = lambda x, layer=layer: layer(x, attention_mask=None, rotary_pos_emb=rotary)[0]
                x = checkpoint(body, x, use_reentrant=reentrant)
            return x

        Stack.forward = forward
        found += run_cases(with_twins(cases) if reentrant else cases)
    Stack.forward = plain
    return found


def test_activation_checkpointing_of_layers_changes_no_bit_and_its_exchanges_are_filled(run_ranks: Ranks) -> None:
    first, second = run_ranks(2, checkpointed, sizes=Case().sizes)
    for chunked, whole, *again in (first, second):
        for number, one in enumerate(again):  # re-entrant in chunks, its twin, whole, its twin; not re-entrant
            assert equal(one, chunked if number in (0, 1, 4) else whole)
    assert [one["regions"] for one in first] == [one["regions"] for one in second], "no rank decides alone"
    qkv = [one["regions"]["layer 2 self_attention.linear_qkv"] for one in first[2:]]
    beside = [f"recompute of sp2hp AllToAll of {where}layer 1" for where in ("chunk 1 of 2, ", "")]
    # Without re-entrance the first tensor asked for is the combine's, whose backward is under way by then.
    assert qkv == [beside[0], beside[0], beside[1], beside[1], *["backward of moe_combine AllToAll of layer 1"] * 2]


def ordered() -> list[Any]:
    """What a rank submits in two micro-batches of chunked layers with carried weight gradients."""
    from fluid_npu.order.recorder import OrderRecorder

    with OrderRecorder(torch.distributed.get_rank()) as recorder:
        run_stack(Case(layers=2, chunks=2, carry=True, key_heads=4, micro_batches=2))
    return recorder.entries


@pytest.mark.host
def test_no_buffer_is_touched_in_flight(run_ranks: Ranks) -> None:
    from fluid_npu.order.checker import check

    record = dict(enumerate(run_ranks(2, ordered, sizes=Case().sizes)))
    report = check(record)
    assert report.clean, "\n".join(map(str, report.findings))
    # Four exchanges a chunk, layer and micro-batch, besides those of the experts.
    assert all(sum(entry.kind == "collective" for entry in entries) >= 4 * 2 * 2 * 2 for entries in record.values())


def latent() -> str:
    """What is said of multi-latent attention with Megatron's core, which knows one head size."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    plain = make_config(Case())
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_moe_experts", "moe_grouped_gemm")
    sizes = {name: getattr(plain, name) for name in (*names, "moe_ffn_hidden_size", "add_bias_linear")}
    config = MLATransformerConfig(**sizes, context_parallel_size=2, multi_latent_attention=True)
    with pytest.raises(ValueError) as caught:
        build_module(get_fluid_moe_layer_spec(config, backend="local"), config=config, layer_number=1)
    return str(caught.value)


def test_latent_attention_with_a_core_of_one_head_size_is_refused_by_name(run_ranks: Ranks) -> None:
    for message in run_ranks(2, latent, sizes={"context_parallel_size": 2}):
        assert "core_attention=FluidDotProductAttention under multi_latent_attention" in message
        assert "FluidLatentDotProductAttention" in message


def tensor_parallel() -> list[dict[str, Any]]:
    """A layer under tensor, sequence and context parallelism: whole, in chunks, and their twin."""
    sequence = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    case = Case(cp=2, ep=2, key_heads=4, micro_batches=2, config=sequence)
    return run_cases([case, replace(case, chunks=2), replace(case, chunks=2, twin=True)])


def test_chunks_with_tensor_and_sequence_parallelism(run_ranks: Ranks) -> None:
    sizes = {**Case().sizes, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    for whole, chunked, twin in run_ranks(4, tensor_parallel, sizes=sizes):
        assert equal(chunked, twin)
        assert "sp2hp AllToAll of chunk 2 of 2, layer 1" in chunked["launches"], "it ran in chunks"
        for name, grad in whole["weights"].items():
            assert relative(chunked["weights"][name], grad) <= FP32, name
        for kind in ("out", "dx"):
            assert all(relative(a, b) <= FP32 for a, b in zip(chunked[kind], whole[kind], strict=True))


def with_biases() -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of a core of qkv and projection with biases and frozen qkv, whole and in chunks; what is printed."""
    import contextlib
    import io

    import fluid_npu

    found: dict[str, Any] = {}
    for chunks in (1, 2):
        stack = here(Stack(Case(chunks=chunks, key_heads=4, config={"add_qkv_bias": True, **UNFUSED})))
        for number, parameter in enumerate(stack.parameters()):
            torch.nn.init.normal_(parameter, std=0.2, generator=here_generator(number))
        stack.layers[0].self_attention.linear_proj.weight.requires_grad_(False)
        x = here(torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1)))
        stack(x, here(rotary())).square().sum().backward()
        found[str(chunks)] = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            fluid_npu.print_fluid_layer_info(stack)
        found[f"text {chunks}"] = text.getvalue()
    return found


UNFUSED = {"gradient_accumulation_fusion": False}


def here_generator(seed: int) -> torch.Generator:
    """Of the device of the tests."""
    return torch.Generator(device=here(torch.empty(0)).device).manual_seed(seed)


def rotary() -> torch.Tensor:
    """Angles of 16 rows."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    angles: torch.Tensor = RotaryEmbedding(8, 1.0)(16)
    return angles


def test_biases_and_a_frozen_weight_in_chunks_and_what_is_printed(run_ranks: Ranks) -> None:
    for found in run_ranks(2, with_biases, sizes=Case().sizes):
        whole, chunked = found["1"], found["2"]
        assert whole.keys() == chunked.keys() and "layers.0.self_attention.linear_qkv.bias" in whole
        assert "layers.0.self_attention.linear_proj.weight" not in whole
        for name, grad in whole.items():
            assert relative(chunked[name], grad) <= FP32, name
        path = "  - layers.0.self_attention (core FluidDotProductAttention, ulysses over 2 ranks"
        assert f"{path})" in found["text 1"] and f"{path} in 2 chunks)" in found["text 2"]
        assert "Attention layers: 1 FluidSelfAttention" in found["text 2"]
        assert "layers.0.self_attention.linear_proj (dW beside the backward of hp2sp and sp2hp)" in found["text 2"]
        assert "Scheduler status: Enabled (overlap dw)" in found["text 2"]
