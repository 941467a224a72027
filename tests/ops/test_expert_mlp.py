"""The experts as one node against float64 autograd over a plain loop, and where their weight gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.device.kernels.activations import ActivationProbs
from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, expert_mlp
from fluid_npu.ops.reference import relative_error
from tests.support.device import here, wide

HIDDEN, FFN = 12, 20
COUNTS = {"uneven": [3, 0, 5, 1], "all_empty": [0, 0, 0, 0], "one_group": [6], "empty_ends": [0, 4, 0]}


def operands(counts: list[int], gated: bool = True, seed: int = 0) -> list[torch.Tensor]:
    """x, p, w1, w2 that require gradients; x has a stride, as rows of a payload have."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups, wide = sum(counts), len(counts), 2 * FFN if gated else FFN
    x = torch.randn(rows, HIDDEN + 4, generator=generator)[:, :HIDDEN]
    p = torch.rand(rows, generator=generator)
    w1 = torch.randn(groups, HIDDEN, wide, generator=generator)
    w2 = torch.randn(groups, FFN, HIDDEN, generator=generator)
    return [here(t).requires_grad_() for t in (x, p, w1, w2)]


def reference(tensors: list[torch.Tensor], counts: list[int], dy: torch.Tensor, gated: bool) -> list[torch.Tensor]:
    """Output and gradients of a loop over groups in float64."""
    x, p, w1, w2 = (wide(t).requires_grad_() for t in tensors)
    out = []
    for group, (rows, probs) in enumerate(zip(x.split(counts), p.split(counts), strict=True)):
        h = rows @ w1[group]
        if gated:
            gate, value = h.chunk(2, dim=-1)
            a = F.silu(gate) * value
        else:
            a = F.gelu(h)
        out.append((a * probs[:, None]) @ w2[group])
    y = torch.cat(out)
    y.backward(wide(dy))
    return [y.detach(), *(t.grad for t in (x, p, w1, w2))]  # type: ignore[list-item]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_output_and_gradients(name: str, gated: bool, recompute: bool) -> None:
    counts = COUNTS[name]
    tensors = operands(counts, gated)
    activation = None if gated else ActivationProbs(function=F.gelu)
    dy = here(torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1)))
    y = expert_mlp(*tensors, ExpertMLP(counts=counts, activation=activation, recompute=recompute))
    y.backward(dy)
    got = [y.detach(), *(t.grad for t in tensors)]
    for value, want in zip(got, reference(tensors, counts, dy, gated), strict=True):
        assert value is not None and relative_error(value, want) <= 1e-6


def test_weight_gradients_are_handed_over_or_added_to_main_grad() -> None:
    counts = COUNTS["uneven"]
    plain, handed = operands(counts), operands(counts)
    dy = here(torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1)))
    expert_mlp(*plain, ExpertMLP(counts=counts, activation=None)).backward(dy)
    caught: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    w2 = torch.nn.Parameter(handed[3].detach().clone())
    w2.main_grad = torch.full_like(w2, 2.0)  # type: ignore[attr-defined]
    mlp = ExpertMLP(
        counts=counts,
        activation=None,
        fc1=WeightGradTarget(defer=lambda x, d, c: caught.append(("fc1", x, d))),
        fc2=WeightGradTarget(fuse_into=w2),
    )
    expert_mlp(handed[0], handed[1], handed[2], w2, mlp).backward(dy)
    assert torch.equal(handed[0].grad, plain[0].grad) and torch.equal(handed[1].grad, plain[1].grad)
    assert handed[2].grad is None and [name for name, _, _ in caught] == ["fc1"]
    _, x, dh = caught[0]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    for group, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows = slice(start, start + count)
        torch.testing.assert_close(x[rows].t() @ dh[rows], plain[2].grad[group])  # type: ignore[index]
    torch.testing.assert_close(w2.main_grad, plain[3].grad + 2.0)
    assert w2.grad_added_to_main_grad


def test_rows_that_need_no_gradient_still_owe_the_weight_gradient() -> None:
    x, p, w1, w2 = (t.detach() for t in operands([2, 2]))
    caught: list[int] = []
    target = WeightGradTarget(defer=lambda *_: caught.append(1))
    out = expert_mlp(x, p, w1, w2, ExpertMLP(counts=[2, 2], activation=None, fc1=target, fc2=target))
    out.sum().backward()
    assert caught == [1, 1]
    with torch.no_grad():
        expert_mlp(x, p, w1, w2, ExpertMLP(counts=[2, 2], activation=None, fc1=target, fc2=target))
    assert caught == [1, 1]
