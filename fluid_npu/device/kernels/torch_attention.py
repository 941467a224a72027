"""Attention through torch's ``scaled_dot_product_attention``: cuDNN's or the flash kernel of an NVIDIA GPU.

Which of its kernels computes is decided once for each class of call (heads, head sizes, dtype, kind of mask): the first
of cudnn, flash, efficient that torch has for it and that agrees with plain products in fp32 on a small case. Each is
tried with the key heads as they are and repeated, with values as they are and padded to the size of queries. A decision
does not look at lengths, so packed sequences of many lengths make no new ones. ``FLUID_ATTENTION`` asks for one kernel,
for 'torch' (torch decides; the only one on a CPU), or for 'megatron' (its own products and softmax).

torch's autograd has the backwards. On a GPU they add up in changing order, so two runs differ in the last bits, except
within ``repeatable_attention``. S queries, T keys, B batch, N query heads, M key heads, D head size of queries and
keys, V of values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluid_npu.device.choice import Choice
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
SMALL_ROWS = 64  # of the small case
#: Largest relative error in the small case. Halves are rounded three times on the way.
LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}


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
        backend = _BACKENDS[self.kernel]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, shown, is_causal=call.causal, scale=call.scale, **options)
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
        key = (q.device, q.dtype, sizes, call.causal, call.mask is None, repeats)
        if key not in self._chosen:
            self._chosen[key] = self._choose(q, sizes, call, repeats)
        return self._chosen[key]

    def _choose(
        self, q: Tensor, sizes: tuple[int, int, int, int], call: AttentionCall, repeats: bool
    ) -> Choice[Form | None]:
        refused: list[str] = []
        kernels = [name for name in self._kernels if not repeats or name in _REPEATABLE]
        for form in _forms(kernels, *sizes):
            error = _error(form, q, sizes, call)
            if isinstance(error, float) and error <= LARGEST_ERROR[q.dtype]:
                why = f"{form}; off by {error:.0e} in its check"
                return Choice(form, f"{why}; refused: {'; '.join(refused)}" if refused else why)
            refused.append(f"{form}: {error if isinstance(error, str) else f'off by {error:.0e}'}")
        return Choice(
            None, f"torch has no fused attention for {sizes}, {ATTENTION}={self._asked}: {'; '.join(refused)}"
        )


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
        (v.shape[3] <= q.shape[3], "fused attention wants values no wider than queries"),
        (not call.causal or (call.mask is None and q.shape[0] == k.shape[0]), "causal attention wants S = T, no mask"),
    )
    return next((rule for kept, rule in rules if not kept), None)


def _forms(kernels: Sequence[str], heads: int, shared: int, size: int, values: int) -> Iterator[Form]:
    for kernel in kernels:
        for pads in (False, True) if values < size else (False,):
            for repeats in (False, True) if shared < heads else (False,):
                yield Form(kernel=kernel, repeats=repeats, pads=pads)


def _error(form: Form, like: Tensor, sizes: tuple[int, int, int, int], call: AttentionCall) -> float | str:
    """The largest relative error of output and gradients in a small case, or why there are none."""
    heads, shared, size, values = sizes
    generator = torch.Generator(device=like.device).manual_seed(0)
    shapes = ((heads, size), (shared, size), (shared, values))
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says why each kernel cannot be
        qkv = [
            torch.randn(SMALL_ROWS, 2, *shape, device=like.device, generator=generator).to(like.dtype)
            for shape in shapes
        ]
        dy = torch.randn(SMALL_ROWS, 2, heads * values, device=like.device, generator=generator).to(like.dtype)
        small = AttentionCall(heads=heads, scale=call.scale, causal=call.causal, mask=_small_mask(call, like.device))
        try:
            found = with_gradients(form.compute, qkv, dy, small)
        except RuntimeError as error:
            return str(error).partition("\n")[0].strip()[:80] or type(error).__name__
        wanted = with_gradients(plain_products, [x.float() for x in qkv], dy.float(), small)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def small_case(shapes: Sequence[Sequence[int]], like: Tensor, generator: torch.Generator) -> list[Tensor]:
    """``[S, 2, *shape]`` of normal numbers, in the dtype and on the device of ``like``."""
    return [
        torch.randn(SMALL_ROWS, 2, *shape, device=like.device, generator=generator).to(like.dtype) for shape in shapes
    ]


def _small_mask(call: AttentionCall, device: torch.device) -> Tensor | None:
    """Hides some keys, never a query's own, if the call hides some by a mask."""
    if call.mask is None:
        return None
    return torch.ones(1, 1, SMALL_ROWS, SMALL_ROWS, dtype=torch.bool, device=device).triu_(1)


def with_gradients(attend: Any, qkv: list[Tensor], dy: Tensor, call: AttentionCall) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves, call)
    return (out.detach(), *torch.autograd.grad(out, leaves, dy))


def plain_products(q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Tensor:
    """The same by products and a softmax."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBMD, v_TBMV))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * call.scale
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1) if call.causal else call.mask
    scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)
