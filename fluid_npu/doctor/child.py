"""Facts that are found in a process of its own: ``python -m fluid_npu.doctor.child QUESTION`` prints one line of JSON.

Everything that imports torch, torch_npu, Megatron or MindSpeed is here. A question that raises prints its error as a
fact named ``error``; one that kills the process is noticed by ``ask``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fluid_npu.doctor.ask import MARK


def torch_facts() -> dict[str, Any]:
    """Version, build, GPUs and communication backends of torch."""
    import torch
    import torch.distributed as dist

    available = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if available else []
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "gpus": [{"name": gpu.name, "gib": gpu.total_memory / 2**30, "capability": gpu.major} for gpu in gpus],
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if available and dist.is_nccl_available() else "",
    }


def npu_facts() -> dict[str, Any]:
    """Whether torch_npu imports and sees NPUs."""
    from fluid_npu.device.npu import NpuDevice, load_torch_npu, probe_npu

    usable, reason = probe_npu()
    if not usable:
        return {"usable": False, "reason": reason, "description": "", "count": 0}
    count = load_torch_npu().npu.device_count()
    return {"usable": True, "reason": reason, "description": NpuDevice().describe(), "count": count}


def substitute_facts() -> dict[str, Any]:
    """apex, Transformer Engine, MindSpeed: before and, where MindSpeed is installed, after its adaptor's import."""
    from importlib import import_module

    from fluid_npu.adaptor.providers.detect import detect_all

    plain = detect_all()
    mindspeed = {finding.name: finding.state for finding in plain}.get("mindspeed")
    if mindspeed != "installed":
        return {"findings": [asdict(finding) for finding in plain], "import_error": "", "imported": False}
    try:
        import_module("mindspeed.megatron_adaptor")
    except BaseException as error:  # it parses sys.argv, imports torch_npu and may exit
        failed = f"{type(error).__name__}: {error}"
        return {"findings": [asdict(finding) for finding in plain], "import_error": failed, "imported": False}
    return {"findings": [asdict(finding) for finding in detect_all()], "import_error": "", "imported": True}


def patch_facts() -> dict[str, Any]:
    """Every row for the installed versions, checked without applying; ``failed``: features that cannot be checked.

    The latter have a target in a module that does not import: Megatron-LM's loop from 0.18 on before Python 3.12.
    """
    from fluid_npu import adaptor

    states = adaptor.status()
    failed: dict[str, str] = {}
    for state in states:
        if not state.checked:
            failed.setdefault(state.patch.feature, state.problem or "")
    return {"rows": [_row(state) for state in states if state.patch.feature not in failed], "failed": failed}


def _row(state: Any) -> dict[str, Any]:
    return {
        "target": state.patch.target,
        "feature": state.patch.feature,
        "manifest": state.patch.manifest,
        "applied": state.applied,
        "problem": state.problem,
        "unreachable": list(state.unreachable),
    }


def dtype_facts() -> dict[str, Any]:
    """A small grouped matmul of ours on this CPU, forward and backward, in each dtype: 'ok' or what went wrong."""
    import torch

    from fluid_npu.ops.grouped_matmul import npu_gmm

    tried = {}
    for name, dtype in {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items():
        x_RK = torch.ones(5, 8, dtype=dtype, requires_grad=True)
        w_LKN = torch.ones(3, 8, 4, dtype=dtype, requires_grad=True)
        try:
            y_RN = npu_gmm(x_RK, w_LKN, group_list=[2, 2, 5])  # running totals: 2, 0 and 3 rows
            dx_RK, dw_LKN = torch.autograd.grad(y_RN.sum(), (x_RK, w_LKN))
            right = y_RN.unique().tolist() == [8] and dx_RK.unique().tolist() == [4]
            right = right and dw_LKN[:, 0, 0].tolist() == [2, 0, 3]
            tried[name] = "ok" if right else "wrong result"
        except Exception as error:  # the doctor reports whatever it is
            tried[name] = f"{type(error).__name__}: {error}"
    return {"tried": tried}


_QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "npu": npu_facts,
    "substitutes": substitute_facts,
    "patches": patch_facts,
    "dtypes": dtype_facts,
}


def main(question: str) -> int:
    """Prints the facts, or the error that stood in their way; returns 0 in both cases."""
    try:
        facts = _QUESTIONS[question]()
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + MARK + json.dumps(facts), flush=True)  # a line of its own, whatever was printed before
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
