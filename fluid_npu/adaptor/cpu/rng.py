"""Megatron's CUDA random state tracker over the CPU generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker


class HostRNGStatesTracker(CudaRNGStatesTracker):
    """Keeps named states of the CPU generator, with the same seeds that Megatron gives the CUDA ones."""

    def add(self, name: str, seed: int) -> None:
        """Adds a state seeded with ``seed``. Raises RuntimeError when the name exists."""
        if name in self.states_:
            raise RuntimeError(f"random state {name!r} already exists; reset the tracker first")
        self._is_initialized = True
        self.seeds_.add(seed)
        outer = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Runs the body on the named state. Raises RuntimeError when it was never added."""
        if name not in self.states_:
            raise RuntimeError(f"random state {name!r} was not added; call model_parallel_cuda_manual_seed first")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Stands for reading the CUDA generator."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    """Stands for writing the CUDA generator."""
    torch.set_rng_state(state)
