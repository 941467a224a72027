"""Megatron's own activation functions, each by the form that it is; a line that lacks them is no error."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fluid_npu.device.kernels.activations import FORMS
from fluid_npu.mcore.lines.activations import _FORMS, megatron_form
from tests.support.moe import Case, fluid_layer

pytestmark = pytest.mark.host


@pytest.mark.parametrize("place", _FORMS, ids="-".join)
def test_each_function_is_the_form_that_it_is_taken_for(place: tuple[str, str]) -> None:
    function = getattr(pytest.importorskip(place[0]), place[1])
    form = megatron_form(function)
    assert form == _FORMS[place]
    original = getattr(function, "_torchdynamo_orig_callable", function)  # nothing need be compiled
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64)
    # Where constants are written with ten digits.
    torch.testing.assert_close(original(x), FORMS[form](x), rtol=1e-9, atol=1e-9)


def test_other_functions_and_lines_without_them() -> None:
    from megatron.core.transformer.utils import erf_gelu

    assert megatron_form(F.gelu) is None and megatron_form(erf_gelu) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron.core.activations", None)
        assert megatron_form(torch.tanh) is None


def forms_of_experts() -> list[Any]:
    """What experts of several configurations compute; None for SwiGLU."""
    from megatron.core import activations

    found = []
    for gated, function in (
        (True, F.silu),
        (False, F.silu),
        (False, F.gelu),
        (True, F.gelu),
        (False, activations.squared_relu),
        (False, torch.tanh),
    ):
        layer = fluid_layer(Case(config={"gated_linear_unit": gated, "activation_func": function}))
        activation = layer.experts.chunk([0] * 4).activation
        found.append(activation and (activation.title, activation.form, activation.function is function))
    return found


def test_experts_know_the_form_of_their_function(run_ranks: Any) -> None:
    (found,) = run_ranks(1, forms_of_experts, sizes={"expert_model_parallel_size": 1})
    assert found[0] is None and [title for title, _, _ in found[1:]] == [
        "silu",
        "gelu",
        "gated gelu",
        "squared relu",
        "tanh",
    ]
    assert [form for _, form, _ in found[1:]] == ["silu", "gelu", "gelu", "squared relu", None]
    assert all(same for _, _, same in found[1:])
