"""Replacements of the feature ``npu``: what Megatron's CUDA names mean on an Ascend NPU without MindSpeed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import Choice
from fluid_npu.device.npu import cuda_names_mean_the_npu
from fluid_npu.ops.rotary import fused_rotary, fuses_rotary


@contextlib.contextmanager
def cuda_names() -> Iterator[None]:
    """torch_npu's ``contrib.transfer_to_npu``. It has no way back: a rollback leaves it as it is."""
    cuda_names_mean_the_npu()
    yield


def rotary_by_the_device(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps Megatron's rotary embedding of ``[S, B, N, D]``: ``npu_rotary_mul`` where its contract allows the call.

    Otherwise the original computes it in plain torch; the reason is printed once.
    """
    signature = inspect.signature(original)

    def apply(t: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(t, freqs, *args, **kwargs)
        given.apply_defaults()
        options, width = given.arguments, freqs.shape[-1]
        # Latent attention (0.19 has a flag of its own for it) keeps pairs as neighbours and turns them as halves.
        paired = options.get("multi_latent_attention") or options.get("mla_rotary_interleaved")
        interleaved, turned = bool(options["rotary_interleaved"]), t[..., :width]
        chosen = fuses_rotary(turned, freqs, interleaved)
        Choice("fused" if chosen.value else "Megatron's", chosen.reason).announce("rotary embedding")
        if not chosen.value:
            return original(t, freqs, *args, **kwargs)
        if paired:
            turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
        cos, sin = ((wave(freqs) * options["mscale"]).to(t.dtype) for wave in (torch.cos, torch.sin))
        turned = fused_rotary(turned, cos, sin, interleaved)
        return turned if width == t.shape[-1] else torch.cat((turned, t[..., width:]), dim=-1)

    return apply
