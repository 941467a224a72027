"""Whether what this thread computes runs beside an AllToAll, as the engine above says.

The kernels of an AllToAll hold some multiprocessors of a GPU. A product whose programs each wait for a multiprocessor
of their own and keep it to the end (cuBLAS's and CUTLASS's persistent kernels) then needs a second round for those that
found none, which can double its time; one whose programs are many and short loses no more than the share that is held.
So ``gemm_chooser`` measures both cases apart. The twin of an overlapped layer says the same as the layer itself, and so
takes the same kernels.
"""

from __future__ import annotations

import threading


class _Depth(threading.local):
    value = 0


_depth = _Depth()


class beside_exchange:
    """``with beside_exchange():`` what is computed inside runs beside an AllToAll; with False nothing is said."""

    __slots__ = ("_counts",)

    def __init__(self, on: bool = True) -> None:
        self._counts = int(on)

    def __enter__(self) -> None:
        _depth.value += self._counts

    def __exit__(self, *_: object) -> None:
        _depth.value -= self._counts


def is_beside() -> bool:
    """Whether the caller is inside of ``beside_exchange``."""
    return _depth.value > 0
