"""What one rank computes at each point of the two sweeps. Standard library only.

H hidden, F ffn of this rank, L local experts, R rows. On a CPU the shapes are scaled down by fixed factors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_CONFIG = re.compile(r"tp(\d+)ep(\d+)e(\d+)")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one rank's experts. ``scale``: by what H, F and R were divided, 1 for none."""

    hidden: int
    ffn: int
    local_experts: int
    rows: int
    scale: tuple[int, int, int] = (1, 1, 1)

    def scaled(self, hidden: int, ffn: int, rows: int) -> Shape:
        """Smaller by these factors; never below 16 columns."""
        return Shape(
            hidden=self.hidden // hidden,
            ffn=max(16, self.ffn // ffn),
            local_experts=self.local_experts,
            rows=self.rows // rows,
            scale=(hidden, ffn, rows),
        )

    def as_dict(self) -> dict[str, Any]:
        """For a row of a result."""
        return {**vars(self), "scale": list(self.scale)}


def ffn_shape(ffn: int, *, small: bool) -> Shape:
    """Grok on an expert parallel size of 2: H 6144, 4 local experts, 8192 rows. Raises ValueError."""
    if not 512 <= ffn <= 131072:
        raise ValueError(f"--ffn {ffn}: must be between 512 and 131072; MindSpeed's table has 4096 to 32768")
    shape = Shape(hidden=6144, ffn=ffn, local_experts=4, rows=8192)
    return shape.scaled(24, 32, 16) if small else shape


def parallel_shape(config: str, *, small: bool) -> Shape:
    """Mixtral-8x7B split over tensor and expert parallel ranks: H 4096, F 14336/tp, E/ep local experts, 8192 rows.

    Raises ValueError naming the flag.
    """
    found = _CONFIG.fullmatch(config)
    if found is None:
        raise ValueError(f"--config {config}: not of the form tp4ep2e16 (tensor, expert parallel size, experts)")
    tp, ep, experts = (int(part) for part in found.groups())
    if not (tp and ep and experts) or 14336 % tp or experts % ep:
        raise ValueError(f"--config {config}: tp must divide the ffn 14336, and ep the experts; try tp4ep2e16")
    if experts // ep < 2:
        raise ValueError(f"--config {config}: a rank has one expert, nothing to group; use e{2 * ep} or more")
    shape = Shape(hidden=4096, ffn=14336 // tp, local_experts=experts // ep, rows=8192)
    return shape.scaled(16, 16, 16) if small else shape
