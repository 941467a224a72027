"""Whether variants compute the same: nothing is timed, and no parity is claimed, before this was checked.

The difference of two tensors is their relative Frobenius error ||a - b|| / ||b||, where b = 0 demands a = 0. Each
rank checks its own part; the worst over all ranks counts, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.device.kernels.torch_attention import plain_attention

#: Largest relative Frobenius error against stock. The fp32 figure is the contract; in low precision stock rounds too,
#: so it only catches mistakes.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 2e-2}


class Disagreement(RuntimeError):
    """Two variants that must compute the same do not; the message names variant, tensor and error."""


@dataclass(frozen=True, order=True)
class Worst:
    """The largest error and where it is."""

    error: float = 0.0
    where: str = ""


@dataclass(frozen=True)
class Gradients:
    """What one variant computed for one batch: a copy, so that later steps do not change it."""

    loss: float
    by_name: dict[str, torch.Tensor]


def gradients_of(variant: Any, batch: Any) -> Gradients:
    """Runs forward and backward of a ``rig.Variant`` without its optimizer; attention is stock's products in all.

    Collective; raises Disagreement on all ranks alike for numbers that are not finite: nothing compares with them.
    """
    with plain_attention():
        loss = variant.forward_backward(batch)
    by_name = {name: value.clone() for name, value in variant.gradients().items()}
    endless = ["the loss"] * (not math.isfinite(loss)) + [n for n, g in by_name.items() if not g.isfinite().all()]
    found = names_over_ranks(endless)
    if found:
        raise Disagreement(
            f"{variant.name}: not finite: {', '.join(found[:4])}; nothing can be compared. fp16 overflows above "
            "65504: use --dtype bf16 or fp32, or another --seed"
        )
    return Gradients(loss, by_name)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; infinite for numbers that are not finite and for got != 0 where want is 0."""
    got, want = got.detach().double(), want.detach().double()
    error, size = float(torch.linalg.vector_norm(got - want)), float(torch.linalg.vector_norm(want))
    if not math.isfinite(error) or not math.isfinite(size):
        return math.inf
    return error / size if size else (0.0 if error == 0.0 else math.inf)


def worst_error(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> Worst:
    """The worst entry. Raises Disagreement when the names differ."""
    if got.keys() != want.keys():
        raise Disagreement(f"names differ: {', '.join(sorted(got.keys() ^ want.keys())[:8])}")
    return max((Worst(relative_error(got[name], want[name]), name) for name in want), default=Worst())


def different_bits(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the entries that are not ``torch.equal``."""
    return [name for name in want if not torch.equal(got[name], want[name])]


def over_ranks(worst: Worst) -> Worst:
    """The worst of all ranks, on every rank. Collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, worst)
    return max(every)


def names_over_ranks(names: Sequence[str]) -> list[str]:
    """The names of all ranks together, on every rank. Collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(names))
    return sorted({name for part in every for name in part})


def check_agreement(
    variants: Sequence[Any], batch: Any, tolerance: float, reference: Gradients | None = None
) -> dict[str, Worst]:
    """Loss and every gradient of each variant against the first; a twin bitwise against the variant before it.

    ``reference``: what the first computed for this batch, if it is known.
    Returns the worst error of each variant. Collective; raises Disagreement on all ranks alike.
    """
    first = gradients_of(variants[0], batch) if reference is None else reference
    results = [first, *(gradients_of(variant, batch) for variant in variants[1:])]
    found: dict[str, Worst] = {}
    for variant, got, before in zip(variants[1:], results[1:], results, strict=False):
        found[variant.name] = over_ranks(max(loss_error(got.loss, results[0].loss), _worst(got, results[0])))
        if found[variant.name].error > tolerance:
            worst = found[variant.name]
            raise Disagreement(
                f"{variant.name} differs from {variants[0].name}: relative error {worst.error:.2e} in {worst.where}, "
                f"allowed {tolerance:.0e}; a wrong result is not timed"
            )
        if variant.kind.twin:
            _demand_equal(variant.name, got, before)
    return found


def loss_error(got: float, want: float) -> Worst:
    """The relative error of a loss."""
    return Worst(relative_error(torch.tensor(got), torch.tensor(want)), "the loss")


def _worst(got: Gradients, want: Gradients) -> Worst:
    return worst_error(got.by_name, want.by_name)


def _demand_equal(name: str, got: Gradients, want: Gradients) -> None:
    differing = names_over_ranks(different_bits(got.by_name, want.by_name))
    if differing:
        raise Disagreement(f"{name} is not bitwise equal to its overlapped form in {', '.join(differing[:4])}")
