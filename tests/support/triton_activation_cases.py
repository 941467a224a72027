"""Checks of the Triton kernels for an expert's activation times probability, in every form.

Part of ``triton_cases``, whose helpers they use: imported inside, because that module may run as a program.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fluid_npu.ops import reference
from fluid_npu.ops.reference import relative_error


def activations_and_their_gradients(device: str) -> None:
    """Every form, gated or not, at widths that no block divides, the last of more than one; rows of a wider buffer."""
    from fluid_npu.device.kernels.activations import FORMS
    from fluid_npu.device.kernels.triton_activations import activation_probs, activation_probs_grad
    from tests.support.triton_cases import TOLERANCE, close, random

    sizes = [(dtype, p_dtype, 37) for dtype in TOLERANCE for p_dtype in {dtype, torch.float32}]
    for form, gated, size in product(FORMS, (False, True), [*sizes, (torch.bfloat16, torch.float32, 1100)]):
        dtype, p_dtype, width = size
        taken = 2 * width if gated else width
        h, da = 2 * random(5, taken + 8, dtype=dtype)[:, :taken], random(5, width + 3, dtype=dtype, seed=1)[:, :width]
        p = random(5, seed=2).abs().to(p_dtype)
        h64, p64 = h.double().requires_grad_(), p.double().requires_grad_()
        a64 = reference.activation_probs(h64, p64, form, gated)
        a64.backward(da.double())
        close(activation_probs(h.to(device), p.to(device), form, gated), a64.detach(), dtype)
        dh, dp = activation_probs_grad(da.to(device), h.to(device), p.to(device), form, gated)
        assert (dh.dtype, dp.dtype) == (dtype, p_dtype)
        close(dh, h64.grad, dtype)
        close(dp, p64.grad, p_dtype)


def activations_at_their_edges(device: str) -> None:
    """NaN stays in its place and is not hidden; far from zero, and at it, the values and slopes of torch's."""
    from fluid_npu.device.kernels.activations import FORMS
    from fluid_npu.device.kernels.triton_activations import activation_probs, activation_probs_grad

    h = torch.tensor([[float("nan"), 0.0, -0.0, 40.0, -40.0, 1e4, -1e4, 3.0]])
    p, da = torch.full((1,), 0.5), torch.ones(1, 8)
    for form, function in FORMS.items():
        leaf = h.clone().requires_grad_()
        wanted = function(leaf) * p
        wanted.backward(da)
        a = activation_probs(h.to(device), p.to(device), form, False).cpu()
        dh, dp = activation_probs_grad(da.to(device), h.to(device), p.to(device), form, False)
        assert a[0, 0].isnan() and dp.isnan().all(), form
        torch.testing.assert_close(a, wanted.detach(), equal_nan=True, rtol=1e-6, atol=1e-7, msg=form)
        torch.testing.assert_close(dh.cpu(), leaf.grad, equal_nan=True, rtol=1e-6, atol=1e-7, msg=form)


def activations_leave_rows_alone_that_are_not_in_use(device: str) -> None:
    from fluid_npu.device.kernels.activations import FORMS
    from fluid_npu.device.kernels.triton_activations import activation_probs, activation_probs_grad
    from tests.support.triton_cases import random

    def sevens(*args: Any, **kwargs: Any) -> Tensor:
        """Of ``torch.empty`` and of ``Tensor.new_empty``."""
        method = bool(args) and isinstance(args[0], Tensor)
        return (plain[0] if method else plain[1])(*args, **kwargs).fill_(7)

    plain = torch.Tensor.new_empty, torch.empty
    for (form, gated), used in product(product(FORMS, (False, True)), (3, 0)):
        ends = torch.tensor([min(used, 2), used], dtype=torch.int32, device=device)
        h, p, da = (x.to(device) for x in (random(5, 38), random(5, seed=1), random(5, 19 if gated else 38, seed=2)))
        h[used:], da[used:], p[used:] = float("nan"), float("inf"), float("nan")
        with mock.patch.object(torch.Tensor, "new_empty", sevens):
            a = activation_probs(h, p, form, gated, ends)
        with mock.patch.object(torch, "empty", sevens):
            dh, dp = activation_probs_grad(da, h, p, form, gated, ends)
        wanted = activation_probs(h[:used], p[:used], form, gated)
        wanted_dh, wanted_dp = activation_probs_grad(da[:used], h[:used], p[:used], form, gated)
        for got, same in ((a, wanted), (dh, wanted_dh), (dp, wanted_dp)):
            assert torch.equal(got[:used], same) and (got[used:] == 7).all(), form


def activations_through_the_seam(device: str) -> None:
    """CudaKernels take every form after its own check, one launch each way; other functions go through plain torch."""
    from fluid_npu.device.kernels.activations import FORMS, ActivationProbs
    from fluid_npu.device.kernels.cuda_kernels import CudaKernels
    from fluid_npu.device.kernels.torch_kernels import TorchKernels
    from tests.support.op_count import OpCount
    from tests.support.triton_cases import random

    kernels = CudaKernels()
    functions = {**FORMS, None: torch.tanh, "forced": torch.nn.functional.gelu}
    for (form, function), gated in product(functions.items(), (False, True)):
        one = ActivationProbs(function=function, gated=gated)
        dtype = torch.float64 if form == "forced" else torch.float16  # the launches are for half precision and fp32
        h, p, da = random(6, 36, dtype=dtype), random(6, seed=1), random(6, 18 if gated else 36, dtype=dtype, seed=2)
        on_device = [x.to(device) for x in (da, h, p)]
        with torch.inference_mode():  # as a first call in evaluation
            kernels.activation_probs(*on_device[1:], one)
        with OpCount().with_kernels() if device == "cpu" else nullcontext(OpCount()) as count:
            a = kernels.activation_probs(*on_device[1:], one)
            dh, dp = kernels.activation_probs_grad(*on_device, one)
        if device == "cpu":
            fused = form in FORMS
            assert count.kernels == ({"_forward": 1, "_backward": 1} if fused else {}), (form, count.kernels)
            assert bool(count.ops) != fused, (form, count.ops)
        plain = TorchKernels()
        wanted = [plain.activation_probs(h, p, one), *plain.activation_probs_grad(da, h, p, one)]
        for got, same in zip((a, dh, dp), wanted, strict=True):
            assert got.dtype == same.dtype and relative_error(got, same) <= 2e-3, form


ACTIVATION_CASES: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        activations_and_their_gradients,
        activations_at_their_edges,
        activations_leave_rows_alone_that_are_not_in_use,
        activations_through_the_seam,
    )
}
