"""Can an AllToAll be hidden behind computation here, by which transport, and what is known about it.

The answer is about the machine. Whether it pays for a model is measured by ``fluid-npu train --overlap auto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fluid_npu.doctor.finding import Item

#: What ``value`` can be.
VALUES = {
    "yes": "transfers need nothing that computation needs",
    "partly": "they share processors or memory; how much hides depends on sizes",
    "between machines": "only a network between the ranks leaves something to hide",
    "no": "there is no second rank, or nothing that could compute meanwhile",
}


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """The answer for one device; unpacks as ``value, reason``. ``transport`` moves the bytes, ``next`` is a command."""

    value: str
    reason: str
    device: str
    transport: str
    next: str = ""

    def __iter__(self) -> Iterator[str]:
        return iter((self.value, self.reason))


def overlap_readiness(device: str, count: int, environ: Mapping[str, str], cores: int = 1) -> Readiness:
    """The answer for ``device`` ('npu', 'cuda' or 'cpu') with ``count`` of them on this machine."""
    if device == "npu":
        return _npu(count, environ)
    if device == "cuda":
        return _cuda(count, environ)
    return _cpu(cores)


def _npu(count: int, environ: Mapping[str, str]) -> Readiness:
    blocking = _blocking(environ, "ASCEND_LAUNCH_BLOCKING", "TORCH_HCCL_BLOCKING_WAIT")
    common = {"device": "npu", "transport": "collective (HCCL)"}
    if blocking:
        return Readiness(value="no", reason=f"{blocking} makes the host wait for every exchange", **common)
    if count < 2:
        return Readiness(value="between machines", reason="one NPU here: the other ranks must be elsewhere", **common)
    if environ.get("HCCL_OP_EXPANSION_MODE", "").upper() == "AIV":
        reason = "HCCL_OP_EXPANSION_MODE=AIV moves bytes with the vector cores that activations and norms need"
        return Readiness(value="partly", reason=reason, next="unset HCCL_OP_EXPANSION_MODE", **common)
    reason = (
        "HCCL driven by AICPU and SDMA takes no cube cores (Huawei's documentation; not measured by us); exchanges of "
        "one group run one after the other"
    )
    return Readiness(value="yes", reason=reason, **common)


def _cuda(count: int, environ: Mapping[str, str]) -> Readiness:
    blocking = _blocking(environ, "CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
    common = {"device": "cuda", "transport": "collective (NCCL)"}
    if blocking:
        return Readiness(value="no", reason=f"{blocking} makes the host wait for every exchange", **common)
    if count < 2:
        return Readiness(value="between machines", reason="one GPU here: the other ranks must be elsewhere", **common)
    reason = (
        "NCCL needs SMs and a full-size GEMM holds them all: 0 to 3 % of the exchange hid beside one GEMM on 2 x H200; "
        "63 to 78 % beside a GEMM in 16 pieces; 83 to 96 % needs copy engines, which this version does not drive"
    )
    return Readiness(
        value="partly", reason=reason, next="fluid-npu bench train-step --device cuda --dtype bf16", **common
    )


def _cpu(cores: int) -> Readiness:
    common = {"device": "cpu", "transport": "collective (gloo)"}
    reason = (
        "gloo runs on a thread of its own, so an exchange and dW do run side by side; on one machine's loopback the "
        "copy itself is CPU work and nothing is gained"
    )
    if cores < 2:
        reason = "gloo runs on a thread of its own, but there is one core"
    command = "fluid-npu train --preset mixtral-tiny --overlap dw --plant-delay-ms 20"
    return Readiness(value="between machines", reason=reason, next=command, **common)


def _blocking(environ: Mapping[str, str], *names: str) -> str:
    """The first of these variables that is on, as 'NAME=1'."""
    return next((f"{name}={environ[name]}" for name in names if environ.get(name, "0").lower() in ("1", "true")), "")


def readiness_item(readiness: Readiness) -> Item:
    """As a finding: 'no' because of a variable is a warning, the rest is information."""
    level = {"yes": "ok", "no": "warn"}.get(readiness.value, "note")
    text = f"{readiness.value}, by {readiness.transport}: {readiness.reason}"
    fix = "unset the variable" if level == "warn" else ""
    return Item(name=f"overlap on {readiness.device}", level=level, text=text, fix=fix)
