"""A stand-in for the kernels of an AllToAll: programs that hold multiprocessors for some time and do nothing.

For timing what runs beside an exchange without one, so that a rank can measure alone.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

_WARPS = 32
_KEPT = 32  # values a thread keeps, so that the registers left over are too few for a program of a matrix product


def room_for(programs: int, device: torch.device) -> Tensor:
    """What ``hold`` reads and writes."""
    return torch.zeros(programs, _WARPS * 32 * _KEPT, device=device)


def hold(room: Tensor, microseconds: float) -> None:
    """Launches as many programs as ``room_for`` was asked for; each runs that long."""
    _hold[(room.shape[0],)](room, int(microseconds * 1e3), SIZE=room.shape[1], num_warps=_WARPS)


@triton.jit
def _hold(room, nanoseconds, SIZE: tl.constexpr):
    at = room + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    kept = tl.load(at)
    now = globaltimer()
    end = now + nanoseconds
    while now < end:
        now = globaltimer()
    tl.store(at, kept)
