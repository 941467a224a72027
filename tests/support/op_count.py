"""Counts what a call launches: torch operators that compute or copy, and Triton kernels in the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "alias", "lift_fresh")


def is_work(func: Any) -> bool:
    """Whether an operator computes or copies."""
    return not (func.is_view or func.overloadpacket.__name__ in _NOTHING)


class OpCount(TorchDispatchMode):
    """``ops`` by name, without views, allocations and what happens inside a Triton kernel; ``kernels`` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_work(func) and not self._inside:
            self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def with_kernels(self) -> Iterator[OpCount]:
        """Counts the launches of interpreted Triton kernels too."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels[executor.fn.__name__] += 1
            self._inside = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._inside = False

        with mock.patch.object(GridExecutor, "__call__", counted), self:
            yield self
