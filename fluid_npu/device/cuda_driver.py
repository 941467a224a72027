"""The calls of CUDA's driver that torch has no name for: copies by the copy engines, and waits and writes of a stream.

A stream memory operation makes a stream wait until a 4-byte word of device memory has come to a value, or writes one
when the stream comes there. Neither is a kernel: while GEMMs hold every multiprocessor, both go on. The same holds for
copies between two GPUs. A copy inside one GPU is a kernel.

Addresses and streams are integers, as ``Tensor.data_ptr()`` and ``Stream.cuda_stream`` give them. A CUDA context must
be current on the calling thread: any torch call for the device makes one.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_WAIT_UNTIL_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: the difference counts, so the numbers may wrap around
_NEEDED = ("cuMemcpyAsync", "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2", "cuGetErrorName")


class CudaDriver:
    """libcuda's functions with their argument types. Raises OSError or AttributeError where one is missing."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        for name in _NEEDED:
            getattr(self._cuda, name)
        address, size, stream = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
        self._copy = self._typed("cuMemcpyAsync", address, address, size, stream)
        self._write = self._typed("cuStreamWriteValue32_v2", stream, address, ctypes.c_uint32, ctypes.c_uint)
        self._wait = self._typed("cuStreamWaitValue32_v2", stream, address, ctypes.c_uint32, ctypes.c_uint)

    def _typed(self, name: str, *types: Any) -> Any:
        function = getattr(self._cuda, name)
        function.argtypes, function.restype = types, ctypes.c_int
        return function

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """``size`` bytes from one address to another; between two GPUs the copy engines do it."""
        self._check(self._copy(target, source, size, stream))

    def write(self, address: int, value: int, stream: int) -> None:
        """The word at the address becomes ``value``, after everything before it on the stream is visible."""
        self._check(self._write(stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, address: int, value: int, stream: int) -> None:
        """The stream goes on when the word is at least ``value``, counted around 2**32."""
        self._check(self._wait(stream, address, value & 0xFFFFFFFF, _WAIT_UNTIL_AT_LEAST))

    def context(self) -> int:
        """The CUDA context of the calling thread, for ``enter`` on another one."""
        found = ctypes.c_void_p()
        self._check(self._cuda.cuCtxGetCurrent(ctypes.byref(found)))
        return found.value or 0

    def enter(self, context: int) -> None:
        """Makes the context that of the calling thread."""
        self._check(self._cuda.cuCtxSetCurrent(ctypes.c_void_p(context)))

    def _check(self, result: int) -> None:
        if result:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(result, ctypes.byref(name))
            raise RuntimeError(f"CUDA driver: {(name.value or b'?').decode()} (code {result})")


@cache
def cuda_driver() -> CudaDriver:
    """The driver of this process. Raises OSError or AttributeError with what is missing."""
    return CudaDriver()
