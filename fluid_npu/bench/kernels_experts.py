"""Forward and backward of one rank's experts into fp32 main_grad, with the kernels forced one way or chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

import fluid_npu.device as seam
from fluid_npu.device.kernels.cuda_kernels import CudaKernels
from fluid_npu.device.kernels.gemm_timing import median_ms
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.triton_support import GROUPED_GEMM, ROW_KERNELS
from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, expert_mlp

Result = TypeVar("Result")

VARIANTS = {
    "torch's kernels, grouped_mm": {ROW_KERNELS: "torch", GROUPED_GEMM: "grouped_mm"},
    "torch's kernels, loop": {ROW_KERNELS: "torch", GROUPED_GEMM: "loop"},
    "Triton's rows, loop": {ROW_KERNELS: "auto", GROUPED_GEMM: "loop"},
    "Triton's rows and matmuls": {ROW_KERNELS: "auto", GROUPED_GEMM: "triton"},
    "chosen by rule": {ROW_KERNELS: "auto", GROUPED_GEMM: "rule"},
    "chosen from measurements": {ROW_KERNELS: "auto", GROUPED_GEMM: "auto"},
}


def time_experts(shape: Any) -> Iterator[dict[str, Any]]:
    """One record a variant: milliseconds, and how far output and gradients are from the first variant's.

    The variants take turns: a GPU at its power limit gets slower over seconds.
    """
    kept = {name: os.environ.get(name) for name in (ROW_KERNELS, GROUPED_GEMM)}
    work = _Experts(shape)
    variants = {name: partial(_in_variant, CudaKernels(), settings) for name, settings in VARIANTS.items()}
    failures: dict[str, str] = {}
    try:
        wanted: list[Tensor] | None = None
        for name, variant in variants.items():
            try:
                got = variant(work.results)
                wanted = wanted if wanted is not None else got
                off = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(got, wanted, strict=True))
                failures[name] = "" if off <= 2e-2 else f"off by {off:.1e} from the first"
            except Exception as error:  # reported, and the next variant goes on
                failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
        right = {name: partial(variants[name], work.step) for name, failure in failures.items() if not failure}
        times = median_ms(right, work.dy)
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        seam._kernels.pop("cuda", None)
    for name, failure in failures.items():
        yield {"shape": shape.name, "variant": name, "ms": times.get(name, 0.0), "failure": failure}


def _in_variant(kernels: CudaKernels, settings: dict[str, str], work: Callable[[], Result]) -> Result:
    """What ``work`` returns with these kernels behind the seam."""
    os.environ.update(settings)
    seam._kernels["cuda"] = kernels
    return work()


class _Experts:
    """Operands of one rank and one step over them."""

    def __init__(self, shape: Any) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        self.x = random(shape.rows, shape.hidden).requires_grad_()
        self.p = torch.rand(shape.rows, device="cuda").requires_grad_()
        self.dy = random(shape.rows, shape.hidden)
        self.w1 = (random(shape.experts, shape.hidden, 2 * shape.ffn) * 0.02).requires_grad_()
        self.w2 = (random(shape.experts, shape.ffn, shape.hidden) * 0.02).requires_grad_()
        for weight in (self.w1, self.w2):
            weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
        counts = GroupRows(shape.counts, torch.tensor(shape.counts, device="cuda"))
        targets = [WeightGradTarget(fuse_into=weight) for weight in (self.w1, self.w2)]
        self.mlp = ExpertMLP(counts=counts, activation=None, fc1=targets[0], fc2=targets[1])
        self.y = self.dy

    def step(self) -> None:
        """One forward and backward; gradients of the weights are added to their main_grad."""
        self.x.grad = self.p.grad = self.w1.grad = self.w2.grad = None
        self.y = expert_mlp(self.x, self.p, self.w1, self.w2, self.mlp)
        self.y.backward(self.dy)

    def results(self) -> list[Tensor]:
        """Output and gradients of one step, in fp32 (of the weights' only a part: they are large)."""
        main_grads: list[Tensor] = [weight.main_grad for weight in (self.w1, self.w2)]  # type: ignore[attr-defined]
        for grad in main_grads:
            grad.zero_()
        self.step()
        assert self.x.grad is not None and self.p.grad is not None
        parts = [self.y.detach(), self.x.grad, self.p.grad, *(grad[:, :128].clone() for grad in main_grads)]
        return [part.float() for part in parts]
