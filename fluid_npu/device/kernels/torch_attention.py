"""Attention through torch's ``scaled_dot_product_attention``: cuDNN's or the flash kernel of an NVIDIA GPU.

Which of its kernels computes is decided once for each class of call (heads, head sizes, dtype, kind of mask): the first
of cudnn, flash, efficient that torch has for it and that agrees with plain products in fp32 on a small case
(``attention_check``). Sliding windows are the flash kernel's alone. Each is tried with the key heads as they are and
repeated, with values as they are and padded to the size of queries. A decision does not look at lengths, so packed
sequences of many lengths make no new ones. ``FLUID_ATTENTION`` asks for one kernel, for 'torch' (torch decides; the
only one on a CPU), or for 'megatron' (its own products and softmax).

torch's autograd has the backwards. On a GPU they add up in changing order, so two runs differ in the last bits, except
within ``repeatable_attention``. S queries, T keys, B batch, N query heads, M key heads, D head size of queries and
keys, V of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.attention_check import LARGEST_ERROR, error_of, first_that_agrees
from fluid_npu.device.kernels.fused import AttentionCall, DifferentiableAttention
from fluid_npu.device.kernels.triton_support import setting

ATTENTION = "FLUID_ATTENTION"
MEGATRON, TORCH = "megatron", "torch"
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    TORCH: None,
}
#: Whose gradients are added up in the same order each time, when torch is asked for that.
_REPEATABLE = ("flash", TORCH)
_HALVES = (torch.bfloat16, torch.float16)
#: The only kernel that takes a window by its sizes.
_WINDOWS = ("flash",)


_repeatable = False
_plain_only = False


@contextmanager
def repeatable_attention() -> Iterator[None]:
    """What is computed in the body has the same bits each time, its backward too: for comparisons of bits. Slower."""
    global _repeatable
    before, _repeatable = _repeatable, True
    try:
        yield
    finally:
        _repeatable = before


def repeats_bits() -> bool:
    """Whether gradients are to be added up in the same order each time: ``repeatable_attention``, or torch's flag."""
    return _repeatable or torch.are_deterministic_algorithms_enabled()


@contextmanager
def plain_attention() -> Iterator[None]:
    """In the body none of these kernels is taken: for comparisons with a model whose attention is Megatron's products.

    In half precision another order of sums sends tokens at a tie to other experts, and gradients of other experts
    cannot be compared.
    """
    global _plain_only
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to call it; ``repeats`` key heads for their queries, ``pads`` values to D."""

    kernel: str
    repeats: bool = False
    pads: bool = False

    def __str__(self) -> str:
        more = [text for given, text in ((self.repeats, "key heads repeated"), (self.pads, "values padded")) if given]
        return ", ".join([self.kernel, *more])

    def compute(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Tensor:
        """``[S, B, N * V]``. RuntimeError where torch has no such kernel for it."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBMD, v_TBMV))
        shared, size = q.shape[1] // k.shape[1], v.shape[-1]
        if self.repeats:
            k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        if self.pads:
            v = F.pad(v, (0, q.shape[-1] - size))
        options: dict[str, Any] = {"enable_gqa": True} if shared > 1 and not self.repeats else {}
        shown = None if call.mask is None else call.mask.logical_not()
        if call.window is not None:
            return _windowed(q, k, v, call)[..., :size].flatten(2)
        backend = _BACKENDS[self.kernel]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, shown, call.dropout, call.causal, scale=call.scale, **options)
        return out[..., :size].permute(2, 0, 1, 3).flatten(2).contiguous()


class TorchAttention(DifferentiableAttention):
    """See the module. ``asked`` is 'auto' or a kernel's name."""

    def __init__(self, asked: str = "auto") -> None:
        self._kernels = ("cudnn", "flash", "efficient") if asked == "auto" else (asked,)
        self._asked = asked
        self._chosen: dict[Any, Choice[Form | None]] = {}

    def accepts(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Choice[bool]:
        broken = rule_broken(q_SBND, k_TBMD, v_TBMV, call)
        if broken is not None:
            return Choice(False, broken)
        form, reason = self._form(q_SBND, k_TBMD, v_TBMV, call)
        return Choice(form is not None, reason)

    def compute(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Tensor:
        form = self._form(q_SBND, k_TBMD, v_TBMV, call).value
        assert form is not None
        if not (_repeatable and q_SBND.is_cuda):
            return form.compute(q_SBND, k_TBMD, v_TBMV, call)
        q_SBND, k_TBMD, v_TBMV = _Deterministic.apply(False, q_SBND, k_TBMD, v_TBMV)
        (out,) = _Deterministic.apply(True, form.compute(q_SBND, k_TBMD, v_TBMV, call))
        return out

    def _form(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Choice[Form | None]:
        sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        repeats = repeats_bits()
        kind = (call.causal, call.mask is None, call.window is not None, call.dropout > 0)
        key = (q.device, q.dtype, sizes, *kind, repeats)
        if key not in self._chosen:
            self._chosen[key] = self._choose(q, sizes, call, repeats)
        return self._chosen[key]

    def _choose(
        self, q: Tensor, sizes: tuple[int, int, int, int], call: AttentionCall, repeats: bool
    ) -> Choice[Form | None]:
        kernels = [name for name in self._kernels if not repeats or name in _REPEATABLE]
        if call.window is not None:
            kernels = [name for name in _WINDOWS if name in kernels or self._asked == TORCH]
        found = first_that_agrees(_forms(kernels, *sizes), lambda form: error_of(form.compute, q, sizes, call), q.dtype)
        if found.value is not None:
            return found
        told = found.reason or "its flash kernel alone takes windows"
        return Choice(None, f"torch has no fused attention for {sizes}, {ATTENTION}={self._asked}: {told}")


class _Deterministic(torch.autograd.Function):
    """The tensors; in backward torch's flag for deterministic algorithms is set to ``on``.

    Around attention alone, because other operators of a step refuse it. It goes behind attention with True, whose
    backward comes first, and before it with False.
    """

    @staticmethod
    def forward(ctx: Any, on: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.on = on
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        torch.use_deterministic_algorithms(ctx.on)
        return None, *grads


def torch_attention(allowed: tuple[str, ...]) -> TorchAttention | None:
    """What ``FLUID_ATTENTION`` asks for, the first of ``allowed`` if unset; None: Megatron's. ValueError for others."""
    asked = setting(ATTENTION, allowed)
    return None if asked == MEGATRON else TorchAttention(asked)


def rule_broken(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> str | None:
    """Why a fused kernel is not taken, or None."""
    rules = (
        (not _plain_only, "a comparison asks for them"),
        (q.dtype in _HALVES or q.device.type == "cpu", "fused kernels of a GPU take bf16 and fp16"),
        (q.dtype in LARGEST_ERROR and q.dtype == k.dtype == v.dtype, "fused attention wants one floating dtype"),
        (min(q.shape[0], k.shape[0]) > 1 and q.shape[1] > 0, "fused attention wants more than one row"),
        (q.shape[2] % k.shape[2] == 0 and k.shape[:3] == v.shape[:3], "fused attention wants heads that share keys"),
        (call.dropout < 1, "fused attention wants a dropout below 1"),
        (v.shape[3] <= q.shape[3], "fused attention wants values no wider than queries"),
        (not call.causal or (call.mask is None and q.shape[0] == k.shape[0]), "causal attention wants S = T, no mask"),
        (
            call.window is None or q.device.type != "cpu",
            "the layer has a sliding window: no kernel of a CPU",
        ),
        (call.window is None or (call.mask is None and q.shape[0] == k.shape[0]), "a window wants S = T, no mask"),
    )
    return next((rule for kept, rule in rules if not kept), None)


def _forms(kernels: Sequence[str], heads: int, shared: int, size: int, values: int) -> Iterator[Form]:
    for kernel in kernels:
        for pads in (False, True) if values < size else (False,):
            for repeats in (False, True) if shared < heads else (False,):
                yield Form(kernel=kernel, repeats=repeats, pads=pads)


def _windowed(q_BNSD: Tensor, k_BMTD: Tensor, v_BMTV: Tensor, call: AttentionCall) -> Tensor:
    """``[S, B, N, V]``: the operator under the flash kernel, which takes how far a query sees back and ahead."""
    assert call.window is not None
    q, k, v = (x.transpose(1, 2) for x in (q_BNSD, k_BMTD, v_BMTV))
    left, right = call.window
    out, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], call.dropout, False, False),
        scale=call.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out.transpose(0, 1)
