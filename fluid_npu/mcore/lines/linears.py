"""How a parallel linear of Megatron asks for its product: ``_forward_impl(input=, weight=, ...)`` on every line.

On 0.12 that is an attribute which ``forward`` sets before it calls it, later a method; a property with a setter that
does nothing stands in for both. The keywords are those of ``linear_with_grad_accumulation_and_async_allreduce``; each
line knows some more than the line before.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from fluid_npu.mcore.lines.arguments import taken


def stock_product(*, weight: Any, **keywords: Any) -> Tensor:
    """Megatron's own product, with a backward that computes dX and dW together."""
    frozen = layers.linear_with_frozen_weight
    product = layers.linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else frozen
    y: Tensor = product(weight=weight, **keywords)
    return y


def tensor_group(given: Any) -> Any:
    """The tensor-parallel group of a call; 0.12 passes none and means the global one."""
    return given if given is not None else parallel_state.get_tensor_model_parallel_group()


def only_stock_can(weight: Any, keywords: dict[str, Any]) -> str:
    """Why a call must take Megatron's own product; empty: it need not."""
    if not weight.requires_grad:
        return "the weight is frozen"
    if keywords.get("grad_output_buffer") is not None:
        return "defer_embedding_wgrad_compute keeps the gradients of the output layer"
    if keywords.get("gtp_remat_size", 1) > 1:
        return "the weight is sharded and gathered by Megatron (gtp_remat_size)"
    if hasattr(weight, "__fsdp_param__"):
        return "Megatron-FSDP makes main_grad inside its own backward"
    return ""


def enter_columns(linear: Any, x: Tensor) -> Tensor:
    """The whole input of a column-parallel linear, as its tensor ranks share it; its gradient is reduced over them."""
    if linear.sequence_parallel:
        return _mapped(linear, "gather_from_sequence_parallel_region", x)
    return _mapped(linear, "copy_to_tensor_model_parallel_region", x) if linear.allreduce_dgrad else x


def leave_rows(linear: Any, y: Tensor) -> Tensor:
    """The sum over the tensor ranks of a row-parallel linear's products: all of it, or this rank's rows."""
    if linear.sequence_parallel:
        return _mapped(linear, "reduce_scatter_to_sequence_parallel_region", y)
    return _mapped(linear, "reduce_from_tensor_model_parallel_region", y)


def _mapped(linear: Any, name: str, x: Tensor) -> Tensor:
    """Through Megatron's mapping of that name, over the linear's tensor-parallel group where the line takes one."""
    mapping, group = getattr(mappings, name), getattr(linear, "tp_group", None)
    there: Tensor = mapping(x) if group is None else mapping(x, **taken(mapping, group=group))
    return there
