"""parallel_linear: gradients against float64, who sees dW, and what happens in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fluid_npu.ops.parallel_linear import LinearBackward, parallel_linear
from fluid_npu.ops.reference import relative_error
from tests.support.device import here, wide


def _dw(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return dy.t() @ x


@pytest.mark.parametrize("shape", [(7, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_gradients_equal_the_float64_products(shape: tuple[int, ...], with_bias: bool, strided: bool) -> None:
    torch.manual_seed(0)
    x, weight = here(torch.randn(shape)).requires_grad_(), here(torch.randn(12, 8)).requires_grad_()
    bias = here(torch.randn(12)).requires_grad_() if with_bias else None
    dy = here(torch.randn(*shape[:-1], 12))
    if strided:
        dy = dy.transpose(-1, -2).contiguous().transpose(-1, -2)
    y = parallel_linear(x, weight, bias, LinearBackward(take_dw=_dw))
    y.backward(dy)
    x64, dy64 = wide(x).view(-1, 8), wide(dy).reshape(-1, 12)
    want = x64 @ wide(weight).t() + (wide(bias) if bias is not None else 0)
    assert relative_error(y.detach().view(-1, 12), want) <= 1e-6
    assert relative_error(weight.grad, dy64.t() @ x64) <= 1e-6
    assert relative_error(x.grad.view(-1, 8), dy64 @ wide(weight)) <= 1e-6
    if bias is not None:
        assert relative_error(bias.grad, dy64.sum(0)) <= 1e-6


def test_a_dw_that_is_kept_reaches_nobody_and_the_gate_gets_its_gradient() -> None:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    x, weight, gate = (here(torch.ones(n, requires_grad=True)) for n in ((2, 3), (4, 3), (0,)))
    keep = LinearBackward(take_dw=lambda x, dy: kept.append((x, dy)))
    parallel_linear(x.detach(), weight.detach(), None, keep, gate).sum().backward()
    assert weight.grad is None and gate.grad is not None and x.grad is None
    (kept_x, kept_dy) = kept[0]
    assert torch.equal(kept_x, x) and kept_dy.shape == (2, 4)


class _Region:
    """Stands in for two tensor ranks that hold the same; writes down what is asked of it."""

    def __init__(self, gathers: bool, log: list[str]) -> None:
        self.gathers, self.log = gathers, log

    def gather(self, x: torch.Tensor) -> Any:
        self.log.append("gather")
        return _Landing(torch.cat([x, x]), self.log, "gathered")

    def reduce(self, dx: torch.Tensor) -> Any:
        self.log.append("reduce")
        return _Landing(2 * dx[: len(dx) // 2] if self.gathers else 2 * dx, self.log, "reduced")


class _Landing:
    def __init__(self, result: torch.Tensor, log: list[str], name: str) -> None:
        self.result, self.log, self.name = result, log, name

    def land(self) -> torch.Tensor:
        self.log.append(self.name)
        return self.result


@pytest.mark.parametrize("gathers", [True, False])
def test_dw_runs_between_the_launch_and_the_landing_of_the_reduction(gathers: bool) -> None:
    log: list[str] = []
    x, weight = here(torch.randn(2, 3)).requires_grad_(), here(torch.randn(4, 3)).requires_grad_()
    take = lambda x, dy: (log.append("dw"), _dw(x, dy))[1]
    y = parallel_linear(x, weight, None, LinearBackward(take_dw=take, region=_Region(gathers, log)))
    log.clear()
    y.sum().backward()
    before = ["gather", "gathered"] if gathers else []
    assert log == [*before, "reduce", "dw", "reduced"]
    rows = 4 if gathers else 2
    dy64 = torch.ones(rows, 4, dtype=torch.float64)
    x64 = torch.cat([wide(x)] * 2) if gathers else wide(x)
    assert relative_error(x.grad, 2 * (dy64 @ wide(weight))[:2]) <= 1e-6
    assert relative_error(weight.grad, dy64.t() @ x64) <= 1e-6
