"""Linears in parts of their heads: values, dX and dW against float64; in half precision no less exact than whole."""

from __future__ import annotations

import pytest
import torch

from fluid_npu.ops.linear_parts import ColumnParts, RowParts
from fluid_npu.ops.reference import relative_error
from tests.support.device import here

ROWS, BATCH, SIZE, HEADS, OTHER = 6, 2, 4, 8, 24
#: Heads of each part: in order, dealt, of unequal number.
PARTS = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]], [[7, 1, 0], [2], [6, 3, 5, 4]]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(kind: str, parts: list[list[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a linear in parts."""
    columns = kind == "columns"
    inner, outer = (OTHER, HEADS * SIZE) if columns else (HEADS * SIZE, OTHER)
    x = here(draw(ROWS, BATCH, inner, seed=1).to(dtype)).requires_grad_()
    w = here(draw(outer, inner, seed=2).to(dtype))
    found: dict[str, torch.Tensor] = {}
    take = lambda x_RK, dy_RN: found.update(dw=(dy_RN.double().t() @ x_RK.double()))
    indices = [here(torch.tensor(part)) for part in parts]
    if columns:
        product = ColumnParts(w, indices, SIZE, take, None)
        whole = x.new_empty(ROWS, BATCH, HEADS, SIZE)
        for number, index in enumerate(indices):
            whole = whole.index_copy(2, index, product.compute(x, number).unflatten(-1, (-1, SIZE)))
        y = whole.flatten(-2)
    else:
        summed = RowParts(w, indices, SIZE, take, None)
        for number, index in enumerate(indices):
            y = summed.add(x.unflatten(-1, (-1, SIZE)).index_select(-2, index).flatten(-2), number)
    y.backward(here(draw(ROWS, BATCH, outer, seed=3).to(dtype)))
    return {"y": y.detach(), "dx": x.grad, **found}


def wanted(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same in one piece and float64, of the rounded operands."""
    inner, outer = (OTHER, HEADS * SIZE) if kind == "columns" else (HEADS * SIZE, OTHER)
    x, w, dy = draw(ROWS, BATCH, inner, seed=1), draw(outer, inner, seed=2), draw(ROWS, BATCH, outer, seed=3)
    x, w, dy = (value.to(dtype).double() for value in (x, w, dy))
    return {"y": x @ w.t(), "dx": dy @ w, "dw": dy.flatten(0, 1).t() @ x.flatten(0, 1)}


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_values_and_gradients_against_float64(kind: str, parts: list[list[int]]) -> None:
    found, want = run(kind, parts, torch.float32), wanted(kind, torch.float32)
    for name, value in want.items():
        assert relative_error(found[name].cpu(), value) <= 1e-6, name


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_half_precision_is_no_less_exact_than_in_one_piece(kind: str) -> None:
    found, want = run(kind, PARTS[1], torch.bfloat16), wanted(kind, torch.bfloat16)
    for name in ("y", "dx"):
        rounded = relative_error(want[name].bfloat16(), want[name])  # what one rounding of the exact result costs
        assert relative_error(found[name].cpu(), want[name]) <= 1.1 * rounded, name


def test_a_second_backward_of_a_kept_graph_gives_the_same() -> None:
    x = here(draw(ROWS, BATCH, OTHER, seed=1).float()).requires_grad_()
    w = here(draw(HEADS * SIZE, OTHER, seed=2).float())
    taken: list[torch.Tensor] = []
    parts = [here(torch.tensor(part)) for part in PARTS[0]]
    product = ColumnParts(w, parts, SIZE, lambda x_RK, dy_RN: taken.append(dy_RN.t() @ x_RK), None)
    loss = sum(product.compute(x, number).square().sum() for number in range(2))
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad) and torch.equal(taken[0], taken[1])


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    x = here(draw(ROWS, BATCH, OTHER, seed=1).float()).requires_grad_()
    w = here(draw(HEADS * SIZE, OTHER, seed=2).float())
    parts = [here(torch.tensor(part)) for part in PARTS[0]]
    product = ColumnParts(w, parts, SIZE, None, None)
    loss = sum(product.compute(x, number).sum() for number in range(2))
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
