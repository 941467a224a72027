"""The one import with an effect: ``import fluid_npu.megatron_adaptor`` in Megatron-LM's ``pretrain_gpt.py``.

Put it after ``import torch`` (``fluid-npu megatron-lm apply CHECKOUT`` does). It gives Megatron's parser our flags and
wraps its validation; what the flags ask for is switched on after Megatron has parsed and checked them, before the model
is built. Nothing is parsed here. A second import does nothing.
"""

from __future__ import annotations

from fluid_npu.adaptor import PatchError, adapt
from fluid_npu.adaptor.features import importable

if not importable("megatron.training"):
    raise PatchError(
        "import fluid_npu.megatron_adaptor: there is no megatron.training on the path; it comes with a Megatron-LM "
        "checkout, not with the megatron-core wheel. Start pretrain_gpt.py from its checkout, or use "
        "fluid_npu.adapt(['moe']) in your own code"
    )
adapt(["megatron_lm"])
