"""A linear in parts of its heads: values, dX and dW against float64; in half precision no less exact than whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluid_npu.ops.linear_parts import ColumnParts, RowParts, Runs, runs_of
from fluid_npu.ops.reference import relative_error
from tests.support.device import here
from tests.support.op_count import OpCount

ROWS, BATCH, SIZE, HEADS, OTHER = 6, 2, 4, 8, 24
#: Heads of each part: in order, dealt, of unequal number.
PARTS = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]], [[7, 1, 0], [2], [6, 3, 5, 4]]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(parts: list[list[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a linear in parts."""
    x = here(draw(ROWS, BATCH, OTHER, seed=1).to(dtype)).requires_grad_()
    w = here(draw(HEADS * SIZE, OTHER, seed=2).to(dtype))
    found: dict[str, torch.Tensor] = {}
    take = lambda x_RK, dy_RN: found.update(dw=(dy_RN.double().t() @ x_RK.double()))
    product = ColumnParts(w, parts, SIZE, take, None)
    whole = x.new_empty(ROWS, BATCH, HEADS, SIZE)
    for number, part in enumerate(parts):
        index = here(torch.tensor(part))
        whole = whole.index_copy(2, index, product.compute(x, number).unflatten(-1, (-1, SIZE)))
    y = whole.flatten(-2)
    y.backward(here(draw(ROWS, BATCH, HEADS * SIZE, seed=3).to(dtype)))
    return {"y": y.detach(), "dx": x.grad, **found}


def wanted(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same in one piece and float64, of the rounded operands."""
    x, w = draw(ROWS, BATCH, OTHER, seed=1), draw(HEADS * SIZE, OTHER, seed=2)
    x, w, dy = (value.to(dtype).double() for value in (x, w, draw(ROWS, BATCH, HEADS * SIZE, seed=3)))
    return {"y": x @ w.t(), "dx": dy @ w, "dw": dy.flatten(0, 1).t() @ x.flatten(0, 1)}


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_values_and_gradients_against_float64(parts: list[list[int]]) -> None:
    found, want = run(parts, torch.float32), wanted(torch.float32)
    for name, value in want.items():
        assert relative_error(found[name].cpu(), value) <= 1e-6, name


def test_half_precision_is_no_less_exact_than_in_one_piece() -> None:
    found, want = run(PARTS[1], torch.bfloat16), wanted(torch.bfloat16)
    for name in ("y", "dx"):
        rounded = relative_error(want[name].bfloat16(), want[name])  # what one rounding of the exact result costs
        assert relative_error(found[name].cpu(), want[name]) <= 1.1 * rounded, name


def test_a_second_backward_of_a_kept_graph_gives_the_same() -> None:
    x = here(draw(ROWS, BATCH, OTHER, seed=1).float()).requires_grad_()
    w = here(draw(HEADS * SIZE, OTHER, seed=2).float())
    taken: list[torch.Tensor] = []
    product = ColumnParts(w, PARTS[0], SIZE, lambda x_RK, dy_RN: taken.append(dy_RN.t() @ x_RK), None)
    loss = sum(product.compute(x, number).square().sum() for number in range(2))
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad) and torch.equal(taken[0], taken[1])


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    x = here(draw(ROWS, BATCH, OTHER, seed=1).float()).requires_grad_()
    w = here(draw(HEADS * SIZE, OTHER, seed=2).float())
    product = ColumnParts(w, PARTS[0], SIZE, None, None)
    loss = sum(product.compute(x, number).sum() for number in range(2))
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@given(st.permutations(range(12)), st.integers(0, 12))
def test_runs_are_the_heads_in_their_order(heads: list[int], length: int) -> None:
    numbers = torch.arange(12.0).repeat_interleave(SIZE)
    for order in (heads[:length], sorted(heads[:length])):
        found = [runs.of(numbers, SIZE).flatten() for runs in runs_of(order)]
        assert [int(head) for part in found for head in part[::SIZE]] == order
        again = [runs.within(numbers[None], SIZE).flatten() for runs in runs_of(order)]
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_equal_runs_at_equal_distances_are_one_product_and_no_copy_of_the_weight() -> None:
    assert runs_of([0, 1, 4, 5, 8, 9]) == [Runs(start=0, count=3, step=4, length=2)]
    assert runs_of([2, 3, 4]) == [Runs(start=2, count=1, step=3, length=3)]
    assert len(runs_of([0, 1, 4, 5, 7, 8])) == 2 and len(runs_of([4, 5, 0, 1])) == 2
    x, w = torch.zeros(3, OTHER), torch.zeros(HEADS * SIZE, OTHER)
    with OpCount() as count:
        ColumnParts(w, PARTS[1], SIZE, None, None).product(x, 1)
    assert dict(count.ops) == {"bmm": 1}


def rows(parts: int, ranks: int, dtype: torch.dtype, frozen: str = "") -> dict[str, Any]:
    """A linear whose input comes in parts: output, gradients, and in which order they came."""
    width = HEADS * SIZE // parts // ranks
    w = here(draw(OTHER, HEADS * SIZE, seed=2).to(dtype))
    whole = here(draw(ROWS, BATCH, HEADS * SIZE, seed=1).to(dtype)).unflatten(-1, (ranks, parts, width))
    pieces = [whole[..., number, :].contiguous().requires_grad_(frozen != "input") for number in range(parts)]
    found: dict[str, Any] = {"order": []}

    def take(x_RK: torch.Tensor, dy_RN: torch.Tensor) -> None:
        found["order"].append("dW")
        found["dw"] = dy_RN.double().t() @ x_RK.double()

    gate = torch.empty(0, requires_grad=True)
    gate.register_post_accumulate_grad_hook(lambda _: found["order"].append("gate"))
    trained = frozen != "weight"
    product = RowParts(w, parts, take if trained else None, gate if trained else None)
    tokens = []
    for number, piece in enumerate(pieces):
        made = piece.clone()  # as an exchange's wait, whose backward launches the next
        if made.requires_grad:
            made.register_hook(lambda grad, number=number: found["order"].append(f"dX {number}"))
        tokens.append(product.enter(made))
    y = product.compute(tokens)
    y.backward(here(draw(ROWS, BATCH, OTHER, seed=3).to(dtype)))
    grads = [piece.grad for piece in pieces]
    if grads[0] is not None:
        found["dx"] = torch.stack(grads, -2).flatten(-3)  # type: ignore[arg-type]
    return {"y": y.detach(), **found}


def wanted_rows(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, w, dy = (draw(*shape, seed=n) for n, shape in ((1, (ROWS, BATCH, HEADS * SIZE)), (2, (OTHER, HEADS * SIZE)),
                                                      (3, (ROWS, BATCH, OTHER))))  # fmt: skip
    x, w, dy = (value.to(dtype).double() for value in (x, w, dy))
    return {"y": x @ w.t(), "dx": dy @ w, "dw": dy.flatten(0, 1).t() @ x.flatten(0, 1)}


@pytest.mark.parametrize(("parts", "ranks"), [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_inputs_in_parts_against_float64_and_each_gradient_before_the_next_is_made(parts: int, ranks: int) -> None:
    found, want = rows(parts, ranks, torch.float32), wanted_rows(torch.float32)
    for name, value in want.items():
        assert relative_error(found[name].cpu(), value) <= 1e-6, name
    assert found["order"] == [*(f"dX {number}" for number in reversed(range(1, parts))), "dW", "gate", "dX 0"]
    half, rounded = rows(parts, ranks, torch.bfloat16), wanted_rows(torch.bfloat16)
    for name in ("y", "dx"):
        allowed = 1.1 * relative_error(rounded[name].bfloat16(), rounded[name])
        assert relative_error(half[name].cpu(), rounded[name]) <= allowed, name


def test_inputs_in_parts_with_a_frozen_weight_or_input() -> None:
    found = rows(2, 2, torch.float32, "weight")
    assert "dw" not in found and found["order"] == ["dX 1", "dX 0"]
    assert relative_error(found["dx"].cpu(), wanted_rows(torch.float32)["dx"]) <= 1e-6
    found = rows(2, 2, torch.float32, "input")
    assert found["order"] == ["dW", "gate"] and "dx" not in found
    assert relative_error(found["dw"].cpu(), wanted_rows(torch.float32)["dw"]) <= 1e-6
