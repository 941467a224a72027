"""The two tables of MindSpeed's "Grouped GEMM" page, as printed there. Standard library only.

Their unit is not stated; less is better. By the page's own times gain = baseline / grouped - 1; two of its eight
printed gains do not follow from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ROUNDING = 0.0005  # of a gain, where the page rounds or cuts off


@dataclass(frozen=True)
class Published:
    """One row: times in the source's unit, gain as printed, a fraction."""

    baseline: float
    grouped: float
    gain_printed: float

    @property
    def gain_computed(self) -> float:
        """What the times give."""
        return self.baseline / self.grouped - 1.0

    @property
    def wrong(self) -> bool:
        """Whether the printed gain does not follow from the times, beyond rounding."""
        return abs(self.gain_printed - self.gain_computed) > _ROUNDING

    def as_dict(self) -> dict[str, Any]:
        """For a row of a result."""
        return {**vars(self), "gain_computed": self.gain_computed, "wrong": self.wrong}


#: Table 1, Grok: by ffn_hidden_size.
FFN = {
    32768: Published(2280, 2416, -0.0530),
    16384: Published(1780, 1719, 0.0353),
    8192: Published(1537, 1448, 0.0612),
    4096: Published(1446, 1331, 0.0860),
}
#: Table 2, Mixtral-8x7B: by tensor parallel size, expert parallel size and number of experts.
PARALLEL = {
    "tp4ep2e16": Published(27969, 19415, 0.4406),
    "tp4ep2e8": Published(20127, 17361, 0.1793),
    "tp2ep4e16": Published(11976, 11049, 0.0839),
    "tp2ep4e8": Published(13981, 14290, -0.0219),
}
