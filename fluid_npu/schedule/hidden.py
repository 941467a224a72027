"""How much time was hidden: some steps run as their serialised twin, and the medians of the two kinds differ by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median


def is_twin(step: int, overlap: str, every: int) -> bool:
    """Whether a step (counted from 1) runs as its serialised twin: a function of the step's number alone."""
    return overlap != "off" and step % every == 0


@dataclass
class OverlapStats:
    """Step times of overlapped steps and of twins, warm-up left out."""

    carry_over: bool = False
    overlapped_ms: list[float] = field(default_factory=list)
    twin_ms: list[float] = field(default_factory=list)
    coverable_ms: list[float] = field(default_factory=list)
    a2a_ms: list[float] = field(default_factory=list)

    def add(self, step_ms: float, counters: Mapping[str, float], *, twin: bool) -> None:
        """Takes one step; ``counters`` are the scheduler's of that step."""
        (self.twin_ms if twin else self.overlapped_ms).append(step_ms)
        if twin:
            self.a2a_ms.append(counters.get("a2a_ms", 0.0))
            # dW may run beside the dispatch's backward (carried over: beside the combine's too), and no more of
            # either than the other lasts.
            flights = counters.get("moe_dispatch_backward_ms", 0.0)
            flights += counters.get("moe_combine_backward_ms", 0.0) if self.carry_over else 0.0
            self.coverable_ms.append(min(flights, counters.get("dw_ms", 0.0)))

    def report(self, overlap: str) -> dict[str, float | None]:
        """hidden_ms, signed, and hidden_fraction; 0 and None with overlap off, None where no twin ran."""
        if overlap == "off":
            return {"hidden_ms": 0.0, "hidden_fraction": None}
        if not self.twin_ms or not self.overlapped_ms:
            return {"hidden_ms": None, "hidden_fraction": None}
        hidden = median(self.twin_ms) - median(self.overlapped_ms)
        coverable = median(self.coverable_ms)
        return {"hidden_ms": hidden, "hidden_fraction": hidden / coverable if coverable > 0 else None}
