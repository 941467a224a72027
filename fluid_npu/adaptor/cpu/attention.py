"""Attention of megatron-core that assumes Transformer Engine."""

from __future__ import annotations

#: ``multi_latent_attention.HAVE_TE``: 0.16 has True without Transformer Engine, then asks ``isinstance(x, None)``.
have_te = False
