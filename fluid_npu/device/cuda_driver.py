"""Calls of CUDA's driver: copies by the copy engines, waits and writes of a stream, events without torch's overhead.

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
_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING
_NOT_YET = 600  # CUDA_ERROR_NOT_READY


class CudaDriver:
    """libcuda's functions with their argument types. Raises OSError or AttributeError where one is missing."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        address, stream, event = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p
        self._copy = self._typed("cuMemcpyAsync", address, address, ctypes.c_size_t, stream)
        self._write = self._typed("cuStreamWriteValue32_v2", stream, address, ctypes.c_uint32, ctypes.c_uint)
        self._wait = self._typed("cuStreamWaitValue32_v2", stream, address, ctypes.c_uint32, ctypes.c_uint)
        self._create = self._typed("cuEventCreate", ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)
        self._record = self._typed("cuEventRecord", event, stream)
        self._follow = self._typed("cuStreamWaitEvent", stream, event, ctypes.c_uint)
        self._query = self._typed("cuEventQuery", event)
        self._events: list[int] = []

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

    def mark(self, stream: int) -> CudaMark:
        """The point that the stream has been given work up to."""
        if self._events:
            event = self._events.pop()
        else:
            made = ctypes.c_void_p()
            self._check(self._create(ctypes.byref(made), _WITHOUT_TIME))
            event = made.value or 0
        self._check(self._record(event, stream))
        return CudaMark(self, event)

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


class CudaMark:
    """An event of the driver: cheaper for the host than torch's. It is used again when nobody holds this object."""

    def __init__(self, driver: CudaDriver, event: int) -> None:
        self._driver = driver
        self._event = event

    def hold_back(self, stream: int) -> None:
        """The stream goes on when the mark has been reached."""
        self._driver._check(self._driver._follow(stream, self._event, 0))

    def query(self) -> bool:
        """Whether it has been reached."""
        result = self._driver._query(self._event)
        if result != _NOT_YET:
            self._driver._check(result)
        return bool(result == 0)

    def __del__(self) -> None:
        # A stream that was told to wait for it has taken note of it, so the event may mark another point.
        self._driver._events.append(self._event)


@cache
def cuda_driver() -> CudaDriver:
    """The driver of this process. Raises OSError or AttributeError with what is missing."""
    return CudaDriver()
