"""Multiprocessors held while a form of a grouped matmul is timed, as an AllToAll beside it would hold them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.gemm_forms import GemmCall
from fluid_npu.device.kernels.triton_support import load, triton_on

#: NCCL takes 4 to 32 for an AllToAll, by network and size. A form whose time jumps does so from the first one on.
HELD = 16
_START_CYCLES = 100_000  # 50 us: the stand-in runs by then
_RATE = 1.5e14  # multiply-adds a second that the slowest form worth taking reaches beside it
_LEAST_US = 300.0


class Occupant:
    """Holds ``HELD`` multiprocessors for a time that is longer than the call."""

    def __init__(self, kernels: ModuleType, device: torch.device, microseconds: float) -> None:
        self._kernels, self._microseconds = kernels, microseconds
        self._room = kernels.room_for(HELD, device)
        self._stream = torch.cuda.Stream(device=device, priority=-1)

    def start(self) -> None:
        """What is launched next on the current stream finds them held."""
        self._stream.wait_stream(torch.cuda.current_stream(self._room.device))
        with torch.cuda.stream(self._stream):
            self._kernels.hold(self._room, self._microseconds)
        torch.cuda._sleep(_START_CYCLES)

    def end(self) -> None:
        """What is launched next on the current stream finds them free."""
        torch.cuda.current_stream(self._room.device).wait_stream(self._stream)


def occupant_of(call: GemmCall) -> Choice[Occupant | None]:
    """What a call is timed beside, or None, and why."""
    if not call.beside:
        return Choice(None, "")
    if not call.a.is_cuda:
        return Choice(None, "nothing held: not on a GPU")
    kernels = _kernels(call.a.device)
    if kernels.value is None:
        return Choice(None, f"nothing held: {kernels.reason}")
    microseconds = max(_LEAST_US, call.multiply_adds / _RATE * 1e6)
    return Choice(Occupant(kernels.value, call.a.device, microseconds), f"beside {HELD} held multiprocessors")


@cache
def _kernels(device: torch.device) -> Choice[ModuleType | None]:
    """The stand-in's kernels, tried once on this device."""
    usable = triton_on(device)
    if not usable.value:
        return Choice(None, usable.reason)
    try:
        kernels = load("triton_hold")
        kernels.hold(kernels.room_for(1, device), 1.0)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a Triton that does not fit raises: forms are then timed alone
        return Choice(None, f"{type(error).__name__}: {str(error)[:200]}")
    return Choice(kernels, usable.reason)
