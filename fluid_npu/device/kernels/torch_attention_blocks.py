"""Blocks of attention by torch's own operators: cuDNN's and the flash kernel of an NVIDIA GPU, the flash one of a CPU.

These are the operators under ``scaled_dot_product_attention``, which keep the log-sum-exp for their backward. They have
no promised signature, so a form is taken once it computed a causal block and a whole one, merged, with gradients, as
plain products in fp32 do (as ``torch_attention``, whose rules, words and limits hold here). Shapes as
``attention_blocks``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels import attention_check as check
from fluid_npu.device.kernels import torch_attention as whole
from fluid_npu.device.kernels.attention_blocks import AttentionBlock, AttentionBlocks, merge_block_
from fluid_npu.device.kernels.fused import AttentionCall

_OPERATORS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
}
_ON_GPU = {"auto": ("cudnn", "flash"), whole.TORCH: ("cudnn", "flash"), "cudnn": ("cudnn",), "flash": ("flash",)}


@dataclass(frozen=True, kw_only=True)
class TorchBlock(AttentionBlock):
    """One way to call it; ``repeats`` and ``pads`` as ``torch_attention.Form``.

    With ``repeatable`` gradients are added up in the same order each time.
    """

    kernel: str
    repeats: bool = False
    pads: bool = False
    repeatable: bool = False

    def __str__(self) -> str:
        return str(whole.Form(kernel=self.kernel, repeats=self.repeats, pads=self.pads))

    def forward(
        self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        operands = self._operands(q_SBND, k_TBMD, v_TBMV)
        operator = getattr(torch.ops.aten, _OPERATORS[self.kernel])
        if self.kernel == "cpu":
            out, lse = operator(*operands, 0.0, causal, scale=scale)
            kept: tuple[Tensor, ...] = ()
        elif self.kernel == "flash":
            out, lse, _, _, _, _, *kept_and_debug = operator(*operands, 0.0, causal, False, scale=scale)
            kept = tuple(kept_and_debug[:2])
        else:
            out, lse, _, _, _, _, *kept_and_debug = operator(*operands, None, True, 0.0, causal, False, scale=scale)
            kept = tuple(kept_and_debug[:2])
        lse_BNS = lse.reshape(*out.shape[:2], -1)[..., : out.shape[2]]
        return out[..., : v_TBMV.shape[-1]].permute(2, 0, 1, 3), lse_BNS.float(), kept

    def backward(
        self,
        dy_SBNV: Tensor,
        q_SBND: Tensor,
        k_TBMD: Tensor,
        v_TBMV: Tensor,
        out_SBNV: Tensor,
        lse_BNS: Tensor,
        kept: tuple[Tensor, ...],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._operands(q_SBND, k_TBMD, v_TBMV)
        dy, out = (self._padded(x, q).permute(1, 2, 0, 3) for x in (dy_SBNV.contiguous(), out_SBNV.contiguous()))
        operator = getattr(torch.ops.aten, f"{_OPERATORS[self.kernel]}_backward")
        lse, sizes = lse_BNS.contiguous(), (q.shape[2], k.shape[2])
        with _deterministic(self.repeatable and q.is_cuda):
            if self.kernel == "cpu":
                grads = operator(dy, q, k, v, out, lse, 0.0, causal, scale=scale)
            elif self.kernel == "flash":
                grads = operator(dy, q, k, v, out, lse, None, None, *sizes, 0.0, causal, *kept, scale=scale)
            else:
                more = (*kept, None, None, None, *sizes, 0.0, causal)
                grads = operator(dy, q, k, v, out, lse[..., None], *more, scale=scale)
        dq, dk, dv = (grad.permute(2, 0, 1, 3) for grad in grads[:3])
        if self.repeats:
            dk, dv = (x.unflatten(2, (k_TBMD.shape[2], -1)).sum(3, dtype=torch.float32) for x in (dk, dv))
        return dq, dk, dv[..., : v_TBMV.shape[-1]]

    def _operands(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor) -> tuple[Tensor, ...]:
        """``[B, heads, rows, size]`` as the kernel takes them."""
        shared = q_SBND.shape[2] // k_TBMD.shape[2]
        if self.repeats:
            k_TBMD, v_TBMV = (x.repeat_interleave(shared, 2) for x in (k_TBMD, v_TBMV))
        return tuple(x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBMD, self._padded(v_TBMV, q_SBND)))

    def _padded(self, x: Tensor, q: Tensor) -> Tensor:
        return F.pad(x, (0, q.shape[-1] - x.shape[-1])) if self.pads else x


class TorchBlocks(AttentionBlocks):
    """``asked`` is 'auto' or the word of ``FLUID_ATTENTION``."""

    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._chosen: dict[Any, Choice[TorchBlock | None]] = {}

    def choose(self, q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, scale: float) -> Choice[AttentionBlock | None]:
        call = AttentionCall(heads=q_SBND.shape[2], scale=scale)
        broken = whole.rule_broken(q_SBND, k_TBMD, v_TBMV, call)
        if broken is not None:
            return Choice(None, broken)
        sizes, repeatable = (*k_TBMD.shape[2:], *q_SBND.shape[2:], v_TBMV.shape[3]), whole.repeats_bits()
        key = (q_SBND.device, q_SBND.dtype, sizes, repeatable)
        if key not in self._chosen:
            self._chosen[key] = self._choose(q_SBND, k_TBMD, v_TBMV, scale, repeatable)
        value, reason = self._chosen[key]
        return Choice(value, reason)

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, scale: float, repeatable: bool) -> Choice[TorchBlock | None]:
        forms = self._forms(q, k, v, repeatable)
        found = check.first_that_agrees(forms, lambda block: _error(block, q, k, v, scale), q.dtype)
        if found.value is not None:
            return found
        told = found.reason or "none gives the log-sum-exp of its rows"
        return Choice(None, f"torch has no block of attention here, {whole.ATTENTION}={self._asked}: {told}")

    def _forms(self, q: Tensor, k: Tensor, v: Tensor, repeatable: bool) -> Iterator[TorchBlock]:
        """A CPU's kernel reads as many key heads as there are query heads, unchecked: there they are repeated."""
        on_cpu, shares, narrow = q.device.type == "cpu", k.shape[2] < q.shape[2], v.shape[3] < q.shape[3]
        for kernel in ("cpu",) if on_cpu else _ON_GPU.get(self._asked, ()):
            if repeatable and kernel == "cudnn":
                continue
            for pads in (False, True) if narrow else (False,):
                for repeats in ((True,) if on_cpu else (False, True)) if shares else (False,):
                    yield TorchBlock(kernel=kernel, repeats=repeats, pads=pads, repeatable=repeatable)


def torch_attention_blocks(allowed: tuple[str, ...]) -> TorchBlocks | None:
    """As ``torch_attention.torch_attention``; None: Megatron's products are asked for."""
    asked = whole.setting(whole.ATTENTION, allowed)
    return None if asked == whole.MEGATRON else TorchBlocks(asked)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before or wanted, warn_only=warns)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _error(block: TorchBlock, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float | str:
    """The largest relative error of output and gradients over a causal and a whole block, or why there are none."""
    shapes = (q.shape[2:], (q.shape[2], v.shape[3]), *(x.shape[2:] for x in (k, k, v, v)))
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        query, dy, *keys = check.small_case(shapes, q)
        small = (query, *_as_they_travel(torch.cat(keys[:2]), torch.cat(keys[2:])))
        try:
            found = _two_blocks(block, *small, dy, scale)
        except check.REFUSALS as error:
            return check.first_line(error)
    hidden = torch.ones(len(query), 2 * len(query), dtype=torch.bool, device=q.device).triu_(1)
    hidden[:, len(query) :] = False
    call = AttentionCall(heads=q.shape[2], scale=scale, mask=hidden)
    with torch.inference_mode(False), torch.enable_grad():
        wanted = check.with_gradients(check.plain_products, [x.float() for x in small], dy.float().flatten(2), call)
    return check.largest_error(found, wanted)


def _as_they_travel(k_TBMD: Tensor, v_TBMV: Tensor) -> tuple[Tensor, Tensor]:
    """The same as views of rows that hold both, as a ring's blocks are."""
    rows = torch.cat([k_TBMD.flatten(2), v_TBMV.flatten(2)], -1)
    keys, values = rows.split([k_TBMD[0, 0].numel(), v_TBMV[0, 0].numel()], -1)
    return keys.unflatten(-1, k_TBMD.shape[2:]), values.unflatten(-1, v_TBMV.shape[2:])


def _two_blocks(block: TorchBlock, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Output ``[S, B, N * V]`` and gradients of q, k, v: keys of the first block by causality, all of the second."""
    blocks = list(zip(k.chunk(2), v.chunk(2), (True, False), strict=True))
    (first, lse, kept), (second, more, also) = (
        block.forward(q, keys, values, scale, causal) for keys, values, causal in blocks
    )
    out, lse = first.float(), lse.clone()
    merge_block_(out, lse, second, more)
    out = out.to(q.dtype)
    grads = [
        block.backward(dy, q, keys, values, out, lse, of_call, scale, causal)
        for (keys, values, causal), of_call in zip(blocks, (kept, also), strict=True)
    ]
    dq = grads[0][0].float() + grads[1][0].float()
    return out.flatten(2), dq, *(torch.cat([grad[which] for grad in grads]) for which in (1, 2))
