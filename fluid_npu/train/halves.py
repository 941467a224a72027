"""Whether a run may be given two halves of a micro-batch without having asked for them (``mcore.interleave``)."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer

from fluid_npu.device import Choice
from fluid_npu.train.config import TrainConfig


def halves_are_the_same(config: TrainConfig) -> Choice[bool]:
    """Whether two halves of a micro-batch have the gradients of the whole and can be had, so that they may be chosen
    without being asked for; and why not."""
    preset = config.model()
    if preset.micro_batch_size % 2:
        return Choice(False, f"--micro-batch-size {preset.micro_batch_size} has no halves")
    if preset.aux_loss_coeff:
        return Choice(False, "each half would have an auxiliary loss of its own (--interleave-batches asks for that)")
    if config.cp > 1 or config.tp > 1:
        return Choice(False, f"it was not tried with --cp {config.cp} --tp {config.tp}")
    if not hasattr(TransformerLayer, "_forward_post_mlp"):
        return Choice(False, "the layers of this megatron-core have no steps")
    return Choice(not config.interleave_batches, "asked for already")
