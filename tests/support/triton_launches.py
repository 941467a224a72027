"""Compiles our Triton kernels for a GPU that is not there: what their checks launch in the interpreter.

The interpreter proves values; it accepts what the compiler refuses (types that do not match in a branch, shapes that
are no powers of two, more shared memory than an SM has). Triton carries ptxas, so a CPU can compile for Hopper.

    TRITON_INTERPRET=1 python -m tests.support.triton_launches record FILE    # triton_cases, with each launch noted
    python -m tests.support.triton_launches compile FILE [all]                # one JSON line a kernel

A launch is noted as kernel, types of arguments, what Triton specialises on (1, multiples of 16) and constants; half
precision is compiled as bf16, with ``all`` also as fp16. Without ``all`` each kernel is compiled for one of its
launches, or for one of each form of activation. Grouped matmuls are also compiled with the tiles that are used on a
GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_OPTIONS = ("num_warps", "num_stages")
_SM90 = 90
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may have on Hopper (CUDA C++ Programming Guide, compute capability 9.0)."""


def note_of(value: Any) -> list[Any]:
    """A JSON form of one argument."""
    if hasattr(value, "block_shape"):
        return ["descriptor", str(value.base.dtype), list(value.block_shape)]
    if hasattr(value, "data_ptr"):
        return ["tensor", str(value.dtype)]
    if isinstance(value, int) and not isinstance(value, bool):
        # Only what Triton specialises on: whether it is 1, a multiple of 16, and larger than int32.
        kind = 1 if value == 1 else 16 if value % 16 == 0 else 17
        return ["int", kind + (1 << 40 if abs(value) >= 1 << 31 else 0)]
    return ["value", value if not hasattr(value, "name") else str(value)]


def record(path: Path) -> int:
    """Runs the checks in the interpreter and writes each distinct launch; returns what ``triton_cases`` returns."""
    from triton.runtime import interpreter

    from tests.support.triton_cases import main

    launches: dict[str, None] = {}
    plain = interpreter.GridExecutor.__call__

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launch = {
            "module": self.fn.__module__,
            "kernel": self.fn.__name__,
            "arguments": {n: note_of(x) for n, x in given.items() if n in self.arg_names and n not in self.constexprs},
            "constants": {name: given[name] for name in self.constexprs if name in given},
            "options": {name: kwargs[name] for name in _OPTIONS if name in kwargs},
        }
        launches[json.dumps(launch)] = None
        return plain(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = noting
    failed = main([])
    path.write_text("\n".join(launches) + "\n")
    return failed


class _Hopper:
    """What Triton asks a driver for when it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _SM90, 32)


def _dtype(text: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, text.removeprefix("torch."))
    return found


def _argument(note: list[Any], half: torch.dtype) -> Any:
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    kind = note[0]
    if kind in ("tensor", "descriptor"):
        dtype = _dtype(note[1])
        dtype = half if dtype == torch.float16 else dtype
        if kind == "tensor":
            return MockTensor(dtype)
        block = note[2]
        return TensorDescriptor(torch.empty(256, 256, dtype=dtype), [256, 256], [256, 1], block)
    return note[1]


def grouped_matmuls(half: torch.dtype, *, every: bool) -> None:
    """Launches the grouped matmuls with the tile shapes that are used on a GPU, or the largest: forward, dX and dW."""
    from fluid_npu.device.kernels import triton_dw_pieces
    from fluid_npu.device.kernels import triton_grouped_gemm as gemm
    from fluid_npu.device.kernels.gemm_forms import FORMS, TritonForm

    x, w, ends = torch.empty(256, 256, dtype=half), torch.empty(2, 256, 256, dtype=half), torch.tensor([128, 256])
    forms = [form for form in FORMS.values() if isinstance(form, TritonForm)]
    for form in forms if every else forms[:1]:
        tiles = gemm.Tiles(*form._sizes, **form._arguments)
        for turned in (False, True):
            gemm.grouped_mm(x, w, ends, tiles, trans_w=turned)
        for accumulate in (False, True):
            gemm.grouped_dw_(torch.empty(2, 256, 256), x, x, ends, tiles, accumulate)
        for number in (2, 4) if every else (2,):
            triton_dw_pieces.grouped_dw_pieces_(torch.empty(2, 256, 256), [(x, x, ends)] * number, tiles)


def launch_again(launches: list[dict[str, Any]], half: torch.dtype) -> None:
    """Launches what was recorded; fp16 as ``half``."""
    for launch in launches:
        function = getattr(importlib.import_module(launch["module"]), launch["kernel"])
        arguments = {name: _argument(note, half) for name, note in launch["arguments"].items()}
        function.run(**arguments, **launch["constants"], **launch["options"], grid=(1,))


def one_each(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One launch of each kernel and FORM of it, in half precision where there is one."""
    found: dict[tuple[str, str, Any], dict[str, Any]] = {}
    for launch in sorted(launches, key=lambda launch: "torch.float16" not in json.dumps(launch["arguments"])):
        found.setdefault((launch["module"], launch["kernel"], launch["constants"].get("FORM")), launch)
    return list(found.values())


def compile_all(path: Path, *, every: bool) -> int:
    """Compiles the launches and prints one JSON line a kernel. Returns how many failed."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fluid_npu.device.kernels import triton_hold

    driver.set_active(_Hopper())
    run, results = JITFunction.run, []

    def compiling(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        constants = {name: value for name, value in kwargs.items() if name.isupper() or name in _OPTIONS}
        title = f"{self.fn.__module__}.{self.fn.__name__} {constants}"
        try:
            results.append((title, run(self, *args, grid=grid, warmup=True, **kwargs)))
        except Exception as error:
            results.append((title, error))

    JITFunction.run = compiling
    launches = [json.loads(line) for line in path.read_text().splitlines()]
    for half in (torch.bfloat16, torch.float16) if every else (torch.bfloat16,):
        launch_again(launches if every else one_each(launches), half)
        grouped_matmuls(half, every=every)
    triton_hold.hold(triton_hold.room_for(1, torch.device("cpu")), 1.0)  # reads a clock, which the interpreter has not
    lines = {getattr(kernel, "hash", title): report(title, kernel) for title, kernel in results}
    for line in lines.values():
        print(json.dumps(line), flush=True)
    return sum(line["failure"] is not None for line in lines.values())


def report(title: str, kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes, or why there is none."""
    if isinstance(kernel, Exception):
        return {"kernel": title, "failure": f"{type(kernel).__name__}: {kernel}"[-2000:]}
    shared, failure = kernel.metadata.shared, None
    if shared > SHARED_LIMIT:
        failure = f"{shared} bytes of shared memory; a block on Hopper has {SHARED_LIMIT}"
    return {"kernel": title, "failure": failure, "shared": shared, **usage(kernel.asm["cubin"])}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of spilled stack, as cuobjdump reads them out of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    if sys.argv[1] == "record":
        sys.exit(record(Path(sys.argv[2])))
    sys.exit(compile_all(Path(sys.argv[2]), every="all" in sys.argv[3:]) > 0)
