"""Permute, unpermute, activations and RMSNorm of one rank in Triton and in plain torch, compared and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device.kernels.activations import SWIGLU, ActivationProbs
from fluid_npu.device.kernels.gemm_timing import median_ms
from fluid_npu.device.kernels.row_kernels import activated, activated_grad, gather, gathered_sum, worst_error
from fluid_npu.device.kernels.torch_kernels import TorchKernels
from fluid_npu.device.kernels.triton_support import load
from fluid_npu.ops.permute import PermuteLayout

_TOLERANCE = 4e-2  # of the largest entry, bf16
Results = Sequence[Tensor]


def time_rows(shape: Any) -> Iterator[dict[str, Any]]:
    """One record for each kernel and form: milliseconds on the GPU, GB/s of what it reads and writes, failure.

    ``cold_ms`` counts the host's launch too, as where the GPU waits for it.
    """
    for kernel, bytes_moved, forms in _cases(shape):
        failures = _failures(forms)
        right = {form: work for form, work in forms.items() if not failures[form]}
        where = torch.empty(0, device="cuda")
        warm, cold = median_ms(right, where, ahead=True), median_ms(right, where)
        for form, failure in failures.items():
            record = {"shape": shape.name, "kernel": kernel, "form": form, "failure": failure}
            ms = warm.get(form, 0.0)
            yield {**record, "ms": ms, "cold_ms": cold.get(form, 0.0), "gbps": bytes_moved / ms / 1e6 if ms else 0.0}


def _failures(forms: dict[str, Callable[[], Results]]) -> dict[str, str]:
    """Why a form cannot be used, empty if it can; the first one that works is the reference."""
    wanted: Results | None = None
    failures = {}
    for form, work in forms.items():
        try:
            got = work()
            wanted = wanted if wanted is not None else got
            off = worst_error(got, wanted)
            failures[form] = "" if off <= _TOLERANCE else f"off by {off:.1e} of the largest entry"
        except Exception as error:  # reported, and the next form goes on
            failures[form] = f"{type(error).__name__}: {str(error)[:300]}"
    return failures


def _cases(shape: Any) -> Iterator[tuple[str, int, dict[str, Callable[[], Results]]]]:
    """(kernel, bytes, forms): the first form is the reference."""
    plain, rows = TorchKernels(), shape.tokens * shape.topk
    scores = torch.rand(shape.tokens, shape.experts * 2, device="cuda")
    routed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(shape.topk).indices, True)
    layout = PermuteLayout.from_routing_map(routed, shape.topk)
    x, y = _random(shape.tokens, shape.hidden), _random(rows, shape.hidden)
    moved = 2 * shape.hidden * (rows + shape.tokens)
    yield (
        "permute",
        4 * shape.hidden * rows,
        {
            "torch": lambda: [plain.permute(x, layout)],
            "triton": lambda: [gather(x, layout)],
        },
    )
    yield (
        "unpermute",
        moved,
        {
            "torch": lambda: [plain.unpermute(y, layout)],
            "triton": lambda: [gathered_sum(y, layout)],
        },
    )
    wide = _random(rows, shape.hidden + 8)[:, : shape.hidden]
    yield (
        "unpermute strided",
        moved,
        {
            "torch": lambda: [plain.unpermute(wide.contiguous(), layout)],
            "triton": lambda: [gathered_sum(wide, layout)],
        },
    )
    yield from _activation_cases(shape, plain)


def _activation_cases(shape: Any, plain: TorchKernels) -> Iterator[tuple[str, int, dict[str, Callable[[], Results]]]]:
    rows, ffn = shape.rows, shape.ffn
    h, da = _random(rows, 2 * ffn), _random(rows, ffn)
    p = torch.rand(rows, device="cuda")
    yield (
        "swiglu",
        2 * 3 * rows * ffn,
        {
            "torch": lambda: [plain.swiglu_probs(h, p)],
            "triton": lambda: [activated(SWIGLU, h, p)],
        },
    )
    yield (
        "swiglu gradient",
        2 * 5 * rows * ffn,
        {
            "torch": lambda: plain.swiglu_probs_grad(da, h, p),
            "triton": lambda: activated_grad(SWIGLU, da, h, p),
        },
    )
    gelu, x_RF = ActivationProbs(function=F.gelu), _random(rows, ffn)
    yield (
        "gelu",
        2 * 2 * rows * ffn,
        {
            "torch": lambda: [plain.activation_probs(x_RF, p, gelu)],
            "triton": lambda: [activated(gelu, x_RF, p)],
        },
    )
    yield (
        "gelu gradient",
        2 * 3 * rows * ffn,
        {
            "torch": lambda: plain.activation_probs_grad(da, x_RF, p, gelu),
            "triton": lambda: activated_grad(gelu, da, x_RF, p),
        },
    )
    x, gamma = _random(shape.tokens, shape.hidden), torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)
    yield (
        "rms_norm",
        4 * x.numel(),
        {
            "torch": lambda: [F.rms_norm(x, gamma.shape, gamma, 1e-5)],
            "triton": lambda: [load("triton_rms_norm").rms_norm(x, gamma, 1e-5)[0]],
        },
    )
    rstd = plain.rms_norm(x, gamma, 1e-5)[1]
    yield (
        "rms_norm gradient",
        6 * x.numel(),
        {
            "torch": lambda: plain.rms_norm_grad(x, x, gamma, rstd),
            "triton": lambda: load("triton_rms_norm").rms_norm_grad(x, x, gamma, rstd),
        },
    )


def _random(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
