"""One decision for all ranks: the first rank that meets a question answers it, the others take its answer.

Nothing collective: a rank that never meets the question (no rows, another pipeline stage) is not waited for. The rank
that answers needs no work of a rank that waits, because that rank launched all that comes before the question.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Agreement = Callable[[str, Callable[[], str]], str]
_PREFIX = "fluid_npu/decision/"


class StoreAgreement:
    """Decisions of a job on its torch.distributed store.

    Args:
        store: shared by all ranks; this object alone uses it (a blocked read would hold its lock).
        timeout_s: how long to wait for the rank that answers.
    """

    def __init__(self, store: Any, timeout_s: float = 300.0) -> None:
        self._store = store
        self._timeout = timedelta(seconds=timeout_s)

    def __call__(self, question: str, decide: Callable[[], str]) -> str:
        """The answer to ``question``, by ``decide`` on the rank that asks first. Raises RuntimeError on a time-out."""
        key = _PREFIX + question
        if self._store.add(f"{key}/asked", 1) == 1:
            answer = decide()
            self._store.set(key, answer)
            return answer
        try:
            self._store.wait([key], self._timeout)
        except RuntimeError as error:
            seconds = self._timeout.total_seconds()
            raise RuntimeError(f"no answer to '{question}' in {seconds:.0f} s from the rank that decides it") from error
        return str(self._store.get(key).decode())


def alone(question: str, decide: Callable[[], str]) -> str:
    """The agreement of a job of one process."""
    return decide()


_stores: dict[int, tuple[Any, Any]] = {}
_of_job: dict[int, Agreement] = {}


def store_of_job() -> Any:
    """A client of its own of the default process group's store, the same at every call."""
    default = dist.distributed_c10d._get_default_store()
    if id(default) not in _stores:
        # The default store is kept too: another one in its place in memory would be taken for it.
        _stores[id(default)] = default, default.clone() if hasattr(default, "clone") else default
    return _stores[id(default)][1]


def of_this_job() -> Agreement:
    """``StoreAgreement`` on a client of its own of the default process group's store, or ``alone`` without one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return alone
    store = store_of_job()
    if id(store) not in _of_job:
        _of_job[id(store)] = StoreAgreement(store)
    return _of_job[id(store)]
