"""Which activation a function is, and that an unknown one is said once and left to plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device import choice
from fluid_npu.device.kernels import row_kernels
from fluid_npu.device.kernels.activations import FORMS, SWIGLU, ActivationProbs, torch_form
from fluid_npu.device.kernels.row_kernels import RowKernels
from fluid_npu.device.kernels.torch_kernels import TorchKernels

pytestmark = pytest.mark.host


def mine(x: Tensor) -> Tensor:
    """GELU, which nobody can know."""
    return F.gelu(x)


@pytest.mark.parametrize(
    "function, form",
    [
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (partial(F.gelu, approximate="tanh"), "gelu tanh"),
        (partial(F.gelu, approximate="none"), "gelu"),
        (partial(F.gelu), "gelu"),
        (partial(F.gelu, approximate="other"), None),
        (partial(F.gelu, approximate=["tanh"]), None),
        (partial(F.gelu, torch.ones(1)), None),
        (partial(F.gelu, approximate="tanh", out=None), None),
        (partial(F.relu, inplace=True), None),
        (torch.relu_, None),
        (F.elu, None),
        (mine, None),
    ],
)
def test_functions_of_torch_are_known_by_themselves(function: Callable[[Tensor], Tensor], form: str | None) -> None:
    assert torch_form(function) == form
    if form is not None:
        x = torch.linspace(-3, 3, 41)
        torch.testing.assert_close(function(x), FORMS[form](x))


def test_titles_are_those_of_forms_and_else_of_functions() -> None:
    assert SWIGLU.title == "swiglu" and ActivationProbs(function=F.silu).title == "silu"
    assert ActivationProbs(function=F.gelu, gated=True).title == "gated gelu"
    assert ActivationProbs(function=mine).title == "mine"
    assert ActivationProbs(function=mine, known_as="gelu").form == "gelu"
    assert ActivationProbs(function=partial(mine)).title.startswith("functools.partial(")


def test_an_unknown_function_is_said_once_and_left_to_plain_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_announced", {})
    row_kernels._announce_unknown.cache_clear()
    kernels = RowKernels(TorchKernels())
    assert not any(kernels.activates(ActivationProbs(function=mine), torch.ones(2, 4)) for _ in range(2))
    said = capsys.readouterr().out
    assert said.count("mine times probability: torch, by autograd (fused launches are for silu, gelu,") == 1
    assert len(said.splitlines()) == 1
