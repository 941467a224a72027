"""When Megatron's DDP reduces gradients, and which dW may run while the last of that is under way.

With ``overlap_grad_reduce`` a bucket is reduced as soon as the last of its weights is ready, from the second step on
(in the first Megatron counts how often each is used). Buckets follow the order of the backward; experts have some of
their own, reduced over the ranks that hold the same experts. In the last micro-batch, with carry-over, the weights of
a model become ready in this order (layer 2 above layer 1, norms left out):

    output layer
    layer 2: FC1                        when its dispatch's backward has landed
             FC2, router, proj, qkv     beside the backward of layer 1's combine, oldest first
    layer 1: FC2, FC1                   in and after its dispatch's backward
             router, proj, qkv          at once: no exchange follows that they could wait for
    embedding

So what layer 2 leaves over delays its buckets until the combine of layer 1, which it fills, and no longer. A reduction
flies beside all that comes after it; nothing comes after the embedding's bucket. One dW can be kept for that place
without any price but the gap it was in: FC2 of the lowest layer, where no other rank holds the same experts, so that
nothing is reduced of it. FC1 still has the dispatch's backward. The end of the backward runs what is kept. In a
pipeline nothing is kept: the stage below waits for the end of this backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn.parameter import Parameter

from fluid_npu.device.choice import Choice


def keeps_for_reduction(weight: Parameter, hooks: Sequence[Callable[[], None]], stages: int) -> Choice[bool]:
    """Whether the dW of an expert weight of the lowest layer waits for the end of this backward, and why.

    Asked in the backward, since Megatron says no earlier which micro-batch is the last. The answer follows from
    configuration and micro-batch, so all ranks give the same.

    Args:
        weight: in a bucket of its DDP.
        hooks: what the DDP gave to be called when the gradient has landed; empty for one that takes none late.
        stages: of the pipeline.
    """
    if stages > 1:
        return Choice(False, "the stage below waits for the end of this backward")
    group = _bucket_group(weight, hooks)
    if group is None:
        return Choice(False, "this DDP takes no late gradients, or is not Megatron's")
    if not group.ddp_config.overlap_grad_reduce:
        return Choice(False, "no gradient is reduced during the backward; set overlap_grad_reduce")
    if not getattr(group, "is_last_microbatch", True) or getattr(group, "is_first_batch", False):
        return Choice(False, "nothing is reduced in this micro-batch")
    holders = _ranks(group)
    if holders != 1:
        return Choice(False, f"{holders} ranks hold the same experts, and the reduction of FC2 would come last")
    return Choice(True, "FC2 of the lowest layer, of which nothing is reduced, runs beside the last reduction")


def _bucket_group(weight: Parameter, hooks: Sequence[Callable[[], None]]) -> Any:
    """Megatron's bucket group of a weight, by way of the DDP that made its hook; None where it is not found."""
    for hook in hooks:
        code = getattr(hook, "__code__", None)
        cells = {} if code is None else dict(zip(code.co_freevars, hook.__closure__ or (), strict=True))
        ddp = cells["self"].cell_contents if "self" in cells else None
        group = getattr(ddp, "param_to_bucket_group", {}).get(weight)
        if group is not None:
            return group
    return None


def _ranks(group: Any) -> int:
    """Over which a bucket group is reduced; 0 where that is not known."""
    for name in ("intra_distributed_optimizer_instance_group", "data_parallel_group"):
        process_group = getattr(group, name, None)
        if process_group is not None:
            return int(process_group.size()) * int(getattr(group.ddp_config, "num_distributed_optimizer_instances", 1))
    return 0
