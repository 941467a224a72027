"""Which device a launch runs on. A CPU is entered only when it is named; an NPU needs MindSpeed."""

from __future__ import annotations

import sys
from argparse import Namespace

from fluid_npu.adaptor import adapt
from fluid_npu.adaptor.megatron_lm.checks import FlagError
from fluid_npu.device import Choice, DeviceUnavailable, get_device

_ON_A_CPU = {
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "transformer_impl": ("local", "--transformer-impl local"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "bias_swiglu_fusion": (False, "--no-bias-swiglu-fusion"),
}


def enter(args: Namespace) -> Choice[str]:
    """Chooses the device of ``--fluid-device`` and makes Megatron ready for it; a second time does nothing.

    Raises FlagError naming what is missing and the fix.
    """
    chosen = choose(args.fluid_device)
    if chosen.value == "cpu":
        _check_cpu_flags(args)
        adapt(["cpu", "cpu_pretrain"], fingerprints=args.fluid_fingerprints)
    if chosen.value == "npu":
        _check_npu()
    return chosen.announce("device")


def choose(name: str) -> Choice[str]:
    """'npu', 'cuda' or 'cpu' with the reason."""
    try:
        device, reason = get_device(name)
    except DeviceUnavailable as error:
        raise FlagError(str(error).replace("--device", "--fluid-device")) from error
    if name == "auto" and device.name == "cpu":
        raise FlagError(
            f"--fluid-device auto: {reason}. To train on this machine's CPU over gloo, add --fluid-device cpu "
            "(docs/MEGATRON_LM.md lists the other flags that takes)"
        )
    return Choice(device.name, reason.replace("--device", "--fluid-device"))


def _check_cpu_flags(args: Namespace) -> None:
    """All flags at once that Megatron's defaults set to something that only CUDA has."""
    wrong = [flag for name, (value, flag) in _ON_A_CPU.items() if getattr(args, name, value) != value]
    if wrong:
        raise FlagError(f"--fluid-device cpu: Megatron's defaults need CUDA here; add {' '.join(wrong)}")


def _check_npu() -> None:
    loaded = ("mindspeed.megatron_adaptor", "torch_npu.contrib.transfer_to_npu")
    if not any(name in sys.modules for name in loaded):
        raise FlagError(
            "--fluid-device npu: Megatron calls torch.cuda, which nothing maps to the NPU here. Install MindSpeed and "
            "put `import mindspeed.megatron_adaptor` beside `import fluid_npu.megatron_adaptor` in pretrain_gpt.py; it "
            "imports torch_npu.contrib.transfer_to_npu and replaces Megatron's CUDA kernels"
        )
