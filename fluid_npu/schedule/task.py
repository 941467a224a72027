"""One weight gradient that may run later than the input gradient of the same operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluid_npu.device.base import Device


@dataclass(frozen=True, kw_only=True)
class DWTask:
    """A unit of queued work.

    ``run`` owns its inputs: they stay alive, and must stay unchanged, until it ran. ``shape`` is (rows, inputs,
    outputs) of this rank and ``flops`` its cost, 2 * rows * inputs * outputs. ``carry`` marks work that may be
    left for the combine of the layer below; ``flight`` is the kind of exchange that it waits for (``comm_type``), ""
    for the next one; a combine takes it in any case. ``device`` is where it runs, for timing. ``held_bytes`` is
    what the inputs take while it waits, 0 where nobody counted.
    """

    name: str
    run: Callable[[], None]
    shape: tuple[int, int, int]
    device: Device
    carry: bool = False
    flight: str = ""
    held_bytes: int = 0

    def fits(self, comm_type: str) -> bool:
        """Whether it may run beside the backward of an exchange of this kind."""
        if comm_type == "moe_combine":
            return True
        if comm_type == "moe_dispatch":
            return not self.carry
        if comm_type == "moe_inside_node":
            return False  # its exchange between nodes follows, which takes longer
        return self.flight in ("", comm_type)

    @property
    def flops(self) -> int:
        """Multiply-adds count as two."""
        rows, inputs, outputs = self.shape
        return 2 * rows * inputs * outputs
