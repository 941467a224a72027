"""What stock Megatron does with ``--moe-grouped-gemm`` in each dtype, and what ours does: the bf16 question.

The documentation of MindSpeed says that stock Megatron does not support the flag with ``--bf16``. The code says the
reverse: it requires bf16, by an assertion of the argument parser up to 0.15, by one in ``GroupedMLP.forward`` in 0.16;
from 0.17 on the class is gone, and without Transformer Engine the flag gives SequentialMLP without a word.
``docs/DTYPES.md`` has the proofs; ``dtypes_sources.py`` the line numbers. Standard library only, so that the doctor
can say all of it where torch is broken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fluid_npu.adaptor.dtypes_sources import BACKENDS, EXPERTS, LINES, OLD_SPECS, Line
from fluid_npu.adaptor.manifest import manifest_names
from fluid_npu.probes import installed

DTYPES = ("fp32", "fp16", "bf16")
DEVICES = ("cpu", "cuda", "npu")
DOORS = ("launch", "library")

#: What a cell can say.
VALUES = {
    "runs": "grouped experts run",
    "simulated": "grouped experts run on the simulated NPU; on hardware they never have",
    "refuses": "an assertion about the dtype stops it",
    "stops": "it stops for another reason than the dtype",
    "sequential": "SequentialMLP runs instead, without a word",
    "unsupported": "this Megatron line has no manifest of ours",
}

_PACKAGE = "grouped_gemm csrc/grouped_gemm.cu TORCH_CHECK(... == torch::kBFloat16)"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One cell of the matrix; unpacks as ``value, reason``.

    ``source``: 'tag path:line' in Megatron, or our own file. ``ran``: where it was really run; "" means read only.
    """

    value: str
    reason: str
    source: str = ""
    ran: str = ""

    def __iter__(self) -> Iterator[str]:
        return iter((self.value, self.reason))


def line_of(megatron_version: str) -> Line:
    """What is known of the minor version that ``megatron_version`` ('0.16.1') belongs to; the newest for a newer one.

    Raises ValueError for what is no version, or one from before the flag existed.
    """
    match = re.match(r"(\d+)\.(\d+)", megatron_version)
    if match is None:
        raise ValueError(f"megatron_version={megatron_version!r} is no version; write it like '0.16.1'")
    found = (int(match[1]), int(match[2]))
    if found < (0, 5):
        raise ValueError(f"megatron_version={megatron_version!r}: --moe-grouped-gemm appeared in 0.5; use a later one")
    return LINES.get(f"{found[0]}.{found[1]}", LINES[list(LINES)[-1]])


def stock_would(
    megatron_version: str,
    dtype: str,
    device: str,
    *,
    transformer_engine: bool | None = None,
    door: str = "launch",
) -> Answer:
    """What stock Megatron does with ``--moe-grouped-gemm``.

    Args:
        megatron_version: such as '0.16.1'.
        dtype: 'fp32', 'fp16' or 'bf16'.
        device: 'cpu', 'cuda' or 'npu'; Megatron alone, without MindSpeed.
        transformer_engine: whether its layers are used (CUDA only); None: whether the package can be found.
        door: 'launch' is Megatron-LM's argument parser, 'library' a layer spec with ``moe_grouped_gemm=True``.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    line = line_of(megatron_version)
    _check(dtype=(dtype, DTYPES), device=(device, DEVICES), door=(door, DOORS))
    if transformer_engine is None:
        transformer_engine = installed("transformer_engine").value
    if door == "launch":
        stopped = _parser_stops(line, dtype, device)
        if stopped is not None:
            return stopped
    if device == "cuda" and transformer_engine and line.te_grouped_mlp is not None:
        where = line.at(EXPERTS, line.te_grouped_mlp)
        return Answer(value="runs", reason="TEGroupedMLP; Megatron checks no dtype here", source=where)
    if line.grouped_mlp is None:
        return _sequential(line)
    return _legacy(line, dtype, device)


def _parser_stops(line: Line, dtype: str, device: str) -> Answer | None:
    if line.argparse_bf16 is not None and dtype != "bf16":
        fp16 = "; with expert parallelism fp16 is refused once more" if dtype == "fp16" else ""
        return Answer(
            value="refuses",
            reason=f"validate_args: 'Currently GroupedGEMM for MoE only supports bf16 dtype.'{fp16}",
            source=line.at(line.arguments, line.argparse_bf16),
        )
    if device == "cuda":
        return None
    return Answer(
        value="stops",
        reason="validate_args calls torch.cuda.get_device_capability(), which raises without CUDA"
        + ("; MindSpeed replaces it, and then bf16 runs" if device == "npu" and line.grouped_mlp else ""),
        source=line.at(line.arguments, line.capability),
    )


def _sequential(line: Line) -> Answer:
    return Answer(
        value="sequential",
        reason="GroupedMLP was removed in 0.17; without Transformer Engine LocalSpecProvider ignores the flag",
        source=line.at(BACKENDS, line.local_sequential),
    )


def _legacy(line: Line, dtype: str, device: str) -> Answer:
    if device != "cuda":
        then = "" if line.forward_bf16 is None or dtype == "bf16" else "; after that forward() asserts bf16"
        return Answer(
            value="stops",
            reason=f"GroupedMLP needs the package grouped_gemm, which is CUDA only{then}",
            source=line.at(EXPERTS, line.needs_package),
        )
    if dtype == "bf16":
        spec = OLD_SPECS if line.name in ("0.11", "0.12") else EXPERTS
        number = 52 if spec == OLD_SPECS else line.grouped_mlp
        return Answer(
            value="runs",
            reason="GroupedMLP over the package grouped_gemm, on compute capability 8 or more",
            source=line.at(spec, number),
        )
    if line.forward_bf16 is not None:
        return Answer(
            value="refuses",
            reason="GroupedMLP.forward: 'Currently GroupedMLP for MoE only supports bf16.'",
            source=line.at(EXPERTS, line.forward_bf16),
        )
    return Answer(
        value="refuses", reason="GroupedMLP asserts nothing, the package grouped_gemm takes bf16 only", source=_PACKAGE
    )


_OURS = {
    "cpu": (
        "torch's grouped_mm, or a loop of mm where this torch has none",
        "fluid_npu/device/kernels/torch_kernels.py",
    ),
    "cuda": (
        "the fastest measured of torch's grouped_mm, cuBLAS and Triton; dW into fp32 main_grad",
        "fluid_npu/device/kernels/cuda_kernels.py",
    ),
    "npu": (
        "npu_grouped_matmul takes it; dW by npu_grouped_matmul_add_ into fp32 main_grad",
        "fluid_npu/device/kernels/npu_kernels.py",
    ),
}
_NPU_FP32 = "npu_grouped_matmul takes it; dW by npu_grouped_matmul, then add_: the adding operator takes halves only"
_CPU = "CPU, gloo, every commit"
_GPU = "2 x H200, 2026-11-21"
_SIM = "simulated NPU under the real torch_npu 2.13.0, every commit"
#: Operators know nothing of Megatron, so these hold on every line.
_RAN = {
    ("cpu", "fp32"): f"{_CPU}: operators, 20 steps as stock",
    ("cpu", "fp16"): f"{_CPU}: operators, layer",
    ("cpu", "bf16"): f"{_CPU}: operators, layer",
    **{("cuda", dtype): f"{_GPU}: operators alone" for dtype in DTYPES},
    **{("npu", dtype): f"{_SIM}: operators alone" for dtype in DTYPES},
}
#: What was run on top with 0.16.
_RAN_0_16 = {
    ("cpu", "fp32"): f"{_CPU}: operators, 20 steps as stock, parity, training",
    ("cpu", "fp16"): f"{_CPU}: operators, layer, training",
    ("cpu", "bf16"): f"{_CPU}: operators, layer, training",
    ("cuda", "fp32"): f"{_GPU}: operators, parity with stock",
    ("cuda", "fp16"): f"{_GPU}: operators, training",
    ("cuda", "bf16"): f"{_GPU}: operators, parity with stock, training",
    ("npu", "fp32"): f"{_SIM}: operators, training as on a CPU",
}


def ours_would(megatron_version: str, dtype: str, device: str, *, supported: Sequence[str] | None = None) -> Answer:
    """What ours does with the same arguments as ``stock_would``.

    A dtype outside the operator table is refused by name, as ``npu_gmm`` does with a TypeError. ``supported`` are
    the Megatron lines; by default those with a manifest. Raises ValueError for an unknown device.
    """
    name = line_of(megatron_version).name
    lines = supported_lines() if supported is None else supported
    _check(device=(device, DEVICES))
    if name not in lines:
        return Answer(value="unsupported", reason=f"no manifest for {name}; there are: {', '.join(lines)}")
    if dtype not in DTYPES:
        return Answer(
            value="refuses",
            reason=f"{dtype} is not in the operator table: npu_gmm takes float16, bfloat16 and float32",
            source="fluid_npu/ops/gmm_contract.py",
        )
    reason, source = _OURS[device]
    if device == "npu" and dtype == "fp32":
        reason = _NPU_FP32
    if dtype == "fp16" and LINES[name].expert_fp16 is not None:
        reason += "; Megatron-LM's own parser refuses fp16 with expert parallelism on this line, a layer spec does not"
    # No accelerator of this kind was at hand: the word must not be the one for what hardware has shown.
    value = "simulated" if device == "npu" else "runs"
    return Answer(value=value, reason=reason, source=source, ran=_ran(name, device, dtype))


def _ran(line: str, device: str, dtype: str) -> str:
    table = {**_RAN, **_RAN_0_16} if line == "0.16" else _RAN
    return table.get((device, dtype), "")


def supported_lines() -> list[str]:
    """Megatron-Core lines that have a manifest, oldest first: ['0.12', '0.16']."""
    prefix = "megatron_core-"
    names = [name.removeprefix(prefix) for name in manifest_names() if name.startswith(prefix)]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def launch_line(megatron_version: str, dtype: str, device: str, *, transformer_engine: bool | None = None) -> str:
    """The one line at launch: what stock would have done and what ours does."""
    stock = stock_would(megatron_version, dtype, device, transformer_engine=transformer_engine)
    ours = ours_would(megatron_version, dtype, device)
    did = {"runs": "runs it", "refuses": "refuses it", "stops": "stops", "sequential": "silently runs SequentialMLP"}
    did["simulated"] = "runs it, which only the simulated NPU has shown"
    return (
        f"--moe-grouped-gemm in {dtype} on {device}: stock Megatron {megatron_version} {did[stock.value]} "
        f"({stock.reason}); fluid_npu {did.get(ours.value, 'does not support this line')} ({ours.reason})"
    )


def _check(**arguments: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in arguments.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}")
