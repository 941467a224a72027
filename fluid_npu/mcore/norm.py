"""Norms of the local layer spec that also work under sequence parallelism.

Megatron's WrappedTorchNorm refuses sequence parallelism, so without Transformer Engine or Apex no MoE model trains
with tensor parallelism. What is needed is the mark that makes Megatron sum the norm's gradient over tensor ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fluid_npu.ops.rms_norm import module_norm


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, computed by the device's own operator where it has one (see ``ops.rms_norm.module_norm``)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x in its dtype, ``[..., H]``."""
        assert self.eps is not None  # FluidNorm gives one
        return module_norm(x, self.weight, self.eps)


_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": FusedRMSNorm}


class FluidNorm:
    """Builds torch's LayerNorm or RMSNorm as the configuration says; parameters marked for sequence parallelism.

    Raises ValueError for a normalization or an option that torch's norms do not have.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object
    ) -> torch.nn.Module:
        if config.normalization not in _NORMS:
            raise ValueError(f"normalization={config.normalization!r}: allowed are {', '.join(_NORMS)}")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma=True: torch's norms cannot do it; unset it or install TE")
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.data = parameter.data.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        return norm
