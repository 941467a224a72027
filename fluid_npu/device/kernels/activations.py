"""An expert's activation times the probability of each row: which function it is, and the forms that have a launch.

A form is a function by its name: kernels that are compiled for it cannot call the function itself. Shapes: R rows,
F ffn; h is [R, F], or [R, 2F], gate then value, for gated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


#: What each form is, in plain torch.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": partial(F.gelu, approximate="tanh"),
    "quick gelu": _quick_gelu,
    "relu": F.relu,
    "squared relu": _squared_relu,
}


@dataclass(frozen=True, kw_only=True)
class ActivationProbs:
    """function(h) * p, or function(gate) * value * p; the function is element-wise."""

    function: Callable[[Tensor], Tensor]
    gated: bool = False
    known_as: str | None = None
    """Its form where the caller recognised it; torch's own functions are recognised here."""

    @cached_property
    def form(self) -> str | None:
        """The name in ``FORMS``; None for a function that is none of them as far as anybody knows."""
        return self.known_as or torch_form(self.function)

    @cached_property
    def title(self) -> str:
        """What people read."""
        function: Any = self.function
        name = self.form or getattr(function, "__name__", None) or repr(function)
        if not self.gated:
            return str(name)
        return "swiglu" if self.form == "silu" else f"gated {name}"

    def plain(self, h: Tensor) -> Tensor:
        """[R, F]: without the probabilities, by the function itself."""
        if not self.gated:
            return self.function(h)
        gate, value = h.chunk(2, dim=-1)
        return self.function(gate) * value


SWIGLU = ActivationProbs(function=F.silu, gated=True)


def torch_form(function: Callable[[Tensor], Tensor]) -> str | None:
    """The form of one of torch's functions, by identity; of ``functools.partial`` also F.gelu's ``approximate``."""
    if isinstance(function, partial) and function.func is F.gelu and not function.args:
        return {"none": "gelu", "tanh": "gelu tanh"}.get(_approximation(function.keywords))
    if function is torch.relu:
        return "relu"
    return next((form for form, known in FORMS.items() if known is function), None)


def _approximation(keywords: dict[str, Any]) -> str:
    """What F.gelu is told; empty where it is told anything else."""
    value = keywords.get("approximate", "none")
    return value if isinstance(value, str) and set(keywords) <= {"approximate"} else ""
