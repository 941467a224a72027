"""One network namespace that nothing can leave behind.

A network namespace belongs to a thread. The thread that lives here makes a nameless one and stays in it; functions
run on that thread, and processes started there belong to it. A nameless namespace ends with its last thread and
process, and takes its interfaces along: whatever ends the program, also SIGKILL, the kernel cleans up.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fluid_npu.link.errors import LinkError

_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


class Namespace:
    """A new, empty network namespace. Raises OSError where the kernel refuses (EPERM without root).

    ``tid`` is the thread inside, by which ``ip link ... netns`` can name the namespace.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netns-{name}")
        try:
            self.run(_leave_for_a_new_one)
        except BaseException:
            self.close()
            raise
        self.tid = self.run(threading.get_native_id)

    def run(self, function: Callable[[], T]) -> T:
        """Calls it inside: sockets it makes and processes it starts stay in this namespace."""
        return self._thread.submit(function).result()

    def command(self, *command: str) -> str:
        """Runs a program inside and returns its output. Raises LinkError with what the program said."""
        return self.run(lambda: _checked(command))

    def close(self) -> None:
        """Ends the thread; the namespace goes when its processes have ended too."""
        self._thread.shutdown(wait=True)


def _leave_for_a_new_one() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no new network namespace: {os.strerror(number)}")


def _checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise LinkError(
            f"'{' '.join(command)}' failed: {done.stderr.strip() or f'exit code {done.returncode}'}; "
            "the kernel needs veth, bridge and sch_tbf (modprobe loads them where they are modules)"
        )
    return done.stdout
