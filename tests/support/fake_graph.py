"""A recorder for a machine without graphs: a replay calls the body again and writes its results where the first lay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FakeRecorder:
    """``device.graphs.GraphRecorder``; ``replays`` counts them all, by the order in which bodies were recorded."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self._held = 0

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        number = len(self.replays)
        self.replays.append(0)
        made = body()
        self._held += sum(tensor.nbytes for tensor in _tensors(made))

        def replay() -> None:
            self.replays[number] += 1
            for kept, new in zip(_tensors(made), _tensors(body()), strict=True):
                with torch.no_grad():
                    kept.copy_(new)

        return replay, made

    def held_bytes(self) -> int:
        """Of the results, which it keeps."""
        return self._held


def _tensors(made: Any) -> list[torch.Tensor]:
    return [t for t in (made if isinstance(made, tuple) else (made,)) if t is not None]
