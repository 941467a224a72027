"""How Megatron's attention turns queries and keys: always through the name that its module holds, which may be patched.

``cp_group`` came after 0.12; what multiplies the angles under YaRN is a function on 0.16 and 0.18 and an attribute on
0.19.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import attention as upstream
from torch import Tensor

from fluid_npu.mcore.lines.arguments import taken


def apply_rotary(attention: Any, x_TBND: Tensor, angles: Tensor, bounds: Tensor | None = None) -> Tensor:
    """``x_TBND`` turned as ``attention`` turns it: by this context-parallel rank's positions.

    With the ``bounds`` of packed sequences x is ``[T, heads, D]``, and positions begin anew in each.
    """
    groups = getattr(attention, "pg_collection", None)
    known: dict[str, Any] = {
        "cu_seqlens": bounds,
        "mscale": _concentration(attention),
        "cp_group": getattr(groups, "cp", None),
    }
    optional = taken(
        upstream.apply_rotary_pos_emb, **{name: value for name, value in known.items() if value is not None}
    )
    turned: Tensor = upstream.apply_rotary_pos_emb(x_TBND, angles, config=attention.config, **optional)
    return turned


def _concentration(attention: Any) -> float | None:
    """YaRN's factor; None where the line has none."""
    if hasattr(attention, "_yarn_concentration_factor"):
        return float(attention._yarn_concentration_factor)
    of_config = getattr(upstream, "_yarn_get_concentration_factor_from_config", None)
    return None if of_config is None else float(of_config(attention.config))
