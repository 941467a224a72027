"""Weights whose gradient may land after the backward of their own layer.

Megatron's DDP with ``delay_wgrad_compute`` asks for this by an attribute and a method (megatron-core 0.16.1,
``distributed/distributed_data_parallel.py``): a parameter with ``skip_backward_post_hook`` gets no hook on its autograd
node; the hook is handed to its module, which calls it when the gradient is in ``main_grad``. With any other DDP nothing
is handed over, and the gradient must be delivered by autograd as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.nn.parameter import Parameter


class LateWeights:
    """Mixin of a module: which of its weights may be late, and the DDP hooks that wait for them."""

    _late: dict[Parameter, list[Callable[[], None]]] | None = None

    def take_late(self, *weights: Parameter) -> None:
        """Marks weights, in the order of ``parameters()``. Must be called before DDP wraps the model."""
        self._late = {}
        for weight in weights:
            weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
            self._late[weight] = []

    def late_hooks(self, weight: Parameter) -> Sequence[Callable[[], None]]:
        """The hooks to call once the gradient of ``weight`` has landed; empty: it must not be late."""
        return (self._late or {}).get(weight, ())

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Called by Megatron's DDP, once for each marked weight, in the order of ``parameters()``."""
        for hooks in (self._late or {}).values():
            if not hooks:
                hooks.append(hook)
                return
        raise RuntimeError(f"{type(self).__name__} got more DDP hooks than late weights; was the model wrapped twice?")
