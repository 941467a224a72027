"""Context parallelism on GPUs, over NCCL: layers against float64 and their twins, fused attention against float64."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.context import BATCH, Case, Stack, held_rows, run_stack, turn, weight, worst_error
from tests.support.device import here
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

FP32 = 1e-5
RING = {"cp_comm_type": "ring"}
#: Whole layers in fp32: Ulysses, chunks of heads, key heads of two ranks, a window, recomputation, a ring.
LAYERS = [
    Case(layers=2, micro_batches=2, qk_norm=True),
    Case(key_heads=8, window=(3, 0), recompute=True),
    Case(key_heads=1),
    Case(layers=2, micro_batches=2, chunks=2, key_heads=4, carry=True),
    Case(chunks=4, heads=16, key_heads=2),
    Case(layers=2, config=RING),
]
#: Attention alone in bf16, where the fused kernels are.
ROWS, HIDDEN, SIZE = 512, 256, 64
BF16: dict[str, Any] = {"hidden_size": HIDDEN, "kv_channels": SIZE, "params_dtype": torch.bfloat16, "bf16": True}
BF16["gradient_accumulation_fusion"] = False
ALONE = {
    "whole": Case(rows=ROWS, key_heads=4, config=BF16),
    "one key head": Case(rows=ROWS, key_heads=1, config=BF16),
    "chunks": Case(rows=ROWS, key_heads=4, chunks=2, config=BF16),
    "recomputed": Case(rows=ROWS, key_heads=4, recompute=True, config=BF16),
    "ring": Case(rows=ROWS, key_heads=4, config={**BF16, **RING}),
    "ring, one key head": Case(rows=ROWS, key_heads=1, config={**BF16, **RING}),
    "window": Case(rows=ROWS, key_heads=4, window=(100, 0), config=BF16),
}


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that ``run_ranks`` spawns; cuBLAS repeats its bits on several streams only so."""
    monkeypatch.setenv("FLUID_TEST_DEVICE", "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def layers() -> list[dict[str, Any]]:
    """Each case and behind it its twin."""
    return [run_stack(replace(case, twin=twin)) for case in LAYERS for twin in (False, True)]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same bits in outputs, input gradients and weight gradients."""
    weights = all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    return weights and all(
        torch.equal(a, b) for kind in ("out", "dx") for a, b in zip(one[kind], other[kind], strict=True)
    )


def test_gradients_of_whole_layers_and_their_twins() -> None:
    ranks = run_ranks(2, layers, sizes=LAYERS[0].sizes, start="spawn", timeout=200)
    for index, case in enumerate(LAYERS):
        errors = worst_error(case, [rank[2 * index] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{case}: {errors}"
        assert all(equal(rank[2 * index], rank[2 * index + 1]) for rank in ranks), f"{case}: differs from its twin"
        print(f"2 ranks, {case}: worst relative error {max(errors.values()):.1e}")


def drawn(case: Case) -> dict[str, torch.Tensor]:
    """Input, weights of the loss, and weights of qkv and projection, in bf16."""
    generator = torch.Generator().manual_seed(case.seed)
    x, g = (torch.randn(ROWS, BATCH, HIDDEN, generator=generator) for _ in range(2))
    qkv = weight("qkv", ((case.heads + 2 * case.key_heads) * SIZE, HIDDEN), case.seed)
    proj = weight("proj", (HIDDEN, case.heads * SIZE), case.seed)
    return {name: value.bfloat16() for name, value in {"x": x, "g": g, "qkv": qkv, "proj": proj}.items()}


def alone(asked: list[str]) -> dict[str, Any]:
    """Attention of every case by each of FLUID_ATTENTION's words, and by what repeats its bits with its twin."""
    import os

    from fluid_npu import device
    from fluid_npu.device.kernels.torch_attention import repeatable_attention

    found: dict[str, Any] = {}
    for name, case in ALONE.items():
        for word in asked:
            os.environ["FLUID_ATTENTION"] = word
            device._kernels.clear()  # they read it when they are made
            found[f"{name} by {word}"] = attend(case, False)
        with repeatable_attention():
            found[f"{name} again"], found[f"{name} twin"] = attend(case, False), attend(case, True)
    return found


def attend(case: Case, twin: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of this rank's rows, and gradients of the weights summed over the ranks."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    attention = here(Stack(case)).layers[0].self_attention.to(torch.bfloat16)
    mine = {name: here(value) for name, value in drawn(case).items()}
    for linear, name in ((attention.linear_qkv, "qkv"), (attention.linear_proj, "proj")):
        linear.weight.data.copy_(mine[name])
    rows = held_rows(case, dist.get_rank())
    x, g = mine["x"][rows].clone().requires_grad_(), mine["g"][rows]
    with attention.backward_scheduler.serialise() if twin else contextlib.nullcontext():
        out, _ = attention(x, None, rotary_pos_emb=RotaryEmbedding(SIZE, 1.0)(ROWS))
        out.backward(g)
    grads = {"qkv": attention.linear_qkv.weight.grad.float(), "proj": attention.linear_proj.weight.grad.float()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return {"out": out.detach(), "dx": x.grad, **grads}


def whole(case: Case) -> dict[str, torch.Tensor]:
    """The same in float64 of whole sequences."""
    leaves = {name: value.double().requires_grad_() for name, value in drawn(case).items()}
    shared = case.heads // case.key_heads
    groups = (leaves["x"] @ leaves["qkv"].t()).unflatten(-1, (case.key_heads, shared + 2, SIZE))
    q, k, v = groups[..., :shared, :].flatten(2, 3), groups[..., shared, :], groups[..., shared + 1, :]
    q, k = (torch.stack([turn(head) for head in x.unbind(2)], 2) for x in (q, k))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    shown = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    shown = shown if case.window is None else shown.triu(-case.window[0])
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
    out = heads.permute(2, 0, 1, 3).flatten(2) @ leaves["proj"].t()
    out.backward(leaves["g"])
    return {"out": out.detach(), "dx": leaves["x"].grad, "qkv": leaves["qkv"].grad, "proj": leaves["proj"].grad}


def check_alone(ranks: list[dict[str, Any]], asked: list[str]) -> None:
    """No kernel is worse than twice Megatron's own products, or 1 %; the twin has the same bits."""
    from fluid_npu.ops.reference import relative_error

    for name, case in ALONE.items():
        want = whole(case)
        for number, rank in enumerate(ranks):
            rows = held_rows(case, number)
            cut = {kind: want[kind][rows] if kind in ("out", "dx") else want[kind] for kind in want}
            errors = {word: {} for word in asked}
            for word in asked:
                got = rank[f"{name} by {word}"]
                errors[word] = {kind: relative_error(got[kind], value) for kind, value in cut.items()}
            for word in asked:
                for kind, error in errors[word].items():
                    assert error <= max(2 * errors["megatron"][kind], 1e-2), (name, word, kind, errors)
            one, twin = rank[f"{name} again"], rank[f"{name} twin"]
            assert all(torch.equal(one[kind], twin[kind]) for kind in one), f"{name}: differs from its twin"
        worst = {word: max(found.values()) for word, found in errors.items()}
        print(f"2 ranks, {name}: " + ", ".join(f"{word} off by {error:.1e}" for word, error in worst.items()))


def test_fused_attention_in_bf16() -> None:
    asked = ["megatron", "auto", "flash"]
    check_alone(run_ranks(2, alone, asked, sizes=Case().sizes, start="spawn", timeout=200), asked)
