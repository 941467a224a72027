"""The GPU kernels beside their alternatives: ``python -m fluid_npu.bench.kernels OUT_DIR`` on one CUDA GPU.

Grouped matmuls of one rank's experts in every form (TFLOP/s), permute, activations and RMSNorm in Triton and in plain
torch (GB/s of the bytes that must move), and the experts' whole forward and backward. Every form is compared with a
loop of cuBLAS calls before it is timed. What fails is reported and the rest goes on; nothing new starts after
``--budget`` seconds. ``--warm i/n`` only compiles, on small operands: n such processes fill Triton's cache n times as
fast.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluid_npu.bench.kernels_experts import time_experts
from fluid_npu.bench.kernels_rows import time_rows
from fluid_npu.device.kernels.gemm_chooser import GemmChooser, class_of
from fluid_npu.device.kernels.gemm_forms import FORMS, Form, GemmCall, TritonForm
from fluid_npu.device.kernels.gemm_timing import Trial, try_forms
from fluid_npu.device.kernels.groups import GroupRows

#: Forms that are timed beside those that the chooser knows.
EXTRA = (
    TritonForm(128, 256, 64, 8, 3, described=True),
    TritonForm(128, 256, 64, 8, 4, described=True, swizzle=16),
    TritonForm(128, 256, 64, 8, 3, described=True, persistent=True),
)
EVERY: dict[str, Form] = {**FORMS, **{form.name: form for form in EXTRA}}
OPS = ("mm", "mm_t", "dw_add")


@dataclass(frozen=True)
class Shape:
    """The experts of one rank. ``skew``: loads from half the mean to one and a half times the mean."""

    name: str
    hidden: int
    ffn: int
    experts: int
    rows: int
    tokens: int
    topk: int
    skew: bool = False

    @property
    def counts(self) -> list[int]:
        """[L] rows of each expert."""
        mean = self.rows // self.experts
        if not self.skew:
            return [mean] * self.experts
        steps = [0.5 + index / (self.experts - 1) for index in range(self.experts)]
        counts = [int(mean * step) for step in steps]
        counts[-1] += self.rows - sum(counts)
        return counts

    @property
    def matmuls(self) -> dict[str, tuple[int, int]]:
        """(K, N) of FC1, which is gated, and FC2."""
        return {"fc1": (self.hidden, 2 * self.ffn), "fc2": (self.ffn, self.hidden)}


SHAPES = (
    Shape("mixtral", 4096, 14336, 4, 8192, 4096, 2),
    Shape("mixtral-skew", 4096, 14336, 4, 8192, 4096, 2, skew=True),
    Shape("fine", 2048, 1408, 32, 24576, 4096, 6),
    Shape("fine-skew", 2048, 1408, 32, 24576, 4096, 6, skew=True),
)
TINY = Shape("tiny", 256, 256, 2, 256, 64, 4)


def call_of(op: str, inner: int, outer: int, counts: list[int]) -> GemmCall:
    """A grouped matmul on random bf16 operands; the backward's x gradient multiplies dy [R, N] by w^T."""
    rows, groups = sum(counts), len(counts)
    on_device = GroupRows(counts, torch.tensor(counts, device="cuda"))
    if op == "dw_add":
        out = torch.zeros(groups, inner, outer, device="cuda")
        return GemmCall(op=op, a=_random(rows, inner), b=_random(rows, outer), counts=on_device, out=out)
    a = _random(rows, outer if op == "mm_t" else inner)
    return GemmCall(op=op, a=a, b=_random(groups, inner, outer), counts=on_device)


def time_matmuls(shape: Shape, forms: dict[str, Form], late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """One record for each matmul, operation and form."""
    for matmul, (inner, outer) in shape.matmuls.items():
        for op in OPS:
            if late():
                return
            call = call_of(op, inner, outer, shape.counts)
            reasons = {name: form.why_not(call) for name, form in forms.items()}
            trials = {name: Trial(None, reason) for name, reason in reasons.items() if reason is not None}
            trials |= try_forms({name: form for name, form in forms.items() if name not in trials}, call, late)
            for name, trial in trials.items():
                record: dict[str, Any] = {"shape": shape.name, "matmul": matmul, "op": op, "form": name}
                record |= {"class": class_of(call), "failure": trial.failure}
                if trial.ms is not None:
                    record |= {"ms": trial.ms, "tflops": 2 * call.multiply_adds / trial.ms / 1e9}
                yield record


def lines_of(records: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each matmul and operation: forms with TFLOP/s, the fastest first, then what failed."""
    cases = dict.fromkeys((r["shape"], r["matmul"], r["op"]) for r in records)
    for case in cases:
        own = [r for r in records if (r["shape"], r["matmul"], r["op"]) == case]
        timed = sorted((r for r in own if "ms" in r), key=lambda r: float(r["ms"]))
        yield f"{case[0]:13s} {case[1]} {case[2]:6s} " + ", ".join(f"{r['form']} {r['tflops']:.0f}" for r in timed)
        for record in own:
            if "ms" not in record:
                yield f"    not {record['form']}: {record['failure'][:160]}"


def decide(shape: Shape, chooser: GemmChooser) -> None:
    """Lets the chooser measure every class of a shape."""
    for inner, outer in shape.matmuls.values():
        for op in OPS:
            chooser.choose(call_of(op, inner, outer, shape.counts))


def warm(part: str) -> None:
    """Compiles every n-th Triton form on small operands, counted from i, for ``part`` 'i/n'."""
    index, parts = (int(number) for number in part.split("/"))
    triton_forms = [form for name, form in EVERY.items() if name.startswith("triton")]
    for form in triton_forms[index::parts]:
        for op in OPS:
            call = call_of(op, *TINY.matmuls["fc1"], TINY.counts)
            trial = try_forms({form.name: form}, call, lambda: False)[form.name]
            print(f"compiled {form.name} {op}: {trial.failure[:200] or 'ok'}", flush=True)
    if index == 0:
        for record in time_rows(TINY):
            print(f"compiled {record['kernel']} {record['form']}: {record['failure'] or 'ok'}", flush=True)


def main() -> int:
    """The command line; 1 when a Triton kernel failed where nothing kept it from the call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="gets kernels.json and gemm-profile.json")
    parser.add_argument("--warm", metavar="I/N", help="only compile the I-th of N shares of the kernels")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds (default 80)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU; these kernels run on one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if arguments.warm:
        warm(arguments.warm)
        return 0
    return run(arguments.out, arguments.budget)


def run(out: Path, budget_s: float) -> int:
    """All parts, the JSON after each."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": _machine(), "matmuls": [], "rows": [], "experts": [], "errors": []}

    def late() -> bool:
        return time.monotonic() - start > budget_s

    def part(name: str, work: Callable[[], None]) -> None:
        try:
            if late():
                result["errors"].append(f"{name}: no time left")
            else:
                work()
        except Exception as error:  # one part's failure must not take the others' figures with it
            result["errors"].append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(result["errors"][-1], flush=True)
        torch.cuda.empty_cache()
        (out / "kernels.json").write_text(json.dumps(result, indent=1))

    print(result["machine"], flush=True)
    for shape in (SHAPES[0], SHAPES[2]):
        part(f"rows {shape.name}", lambda shape=shape: _rows(shape, result))
    for shape in (SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[1]):
        part(f"matmuls {shape.name}", lambda shape=shape: _matmuls(shape, result, late))
    for shape in (SHAPES[0], SHAPES[2], SHAPES[3]):
        part(f"experts {shape.name}", lambda shape=shape: _experts(shape, result))
    chooser = GemmChooser(budget_s=10.0)
    for shape in SHAPES:
        part(f"choices {shape.name}", lambda shape=shape: decide(shape, chooser))
    (out / "gemm-profile.json").write_text(json.dumps(chooser.decisions(), indent=1))
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return 1 if result["errors"] or any(_broken(r) for r in result["matmuls"]) else 0


def _rows(shape: Shape, result: dict[str, Any]) -> None:
    for record in time_rows(shape):
        result["rows"].append(record)
        text = "{shape:8s} {kernel:17s} {form:7s} {ms:7.3f} ms {gbps:5.0f} GB/s; with launch {cold_ms:.3f} ms {failure}"
        print(text.format(**record), flush=True)


def _matmuls(shape: Shape, result: dict[str, Any], late: Callable[[], bool]) -> None:
    records = list(time_matmuls(shape, EVERY, late))
    result["matmuls"] += records
    print("\n".join(lines_of(records)), flush=True)


def _experts(shape: Shape, result: dict[str, Any]) -> None:
    for record in time_experts(shape):
        result["experts"].append(record)
        print("{shape:13s} experts forward+backward, {variant}: {ms:.3f} ms {failure}".format(**record), flush=True)


def _broken(record: dict[str, Any]) -> bool:
    """A form that took the call and then raised or was wrong."""
    return "ms" not in record and any(word in str(record["failure"]) for word in ("Error", "Exception", "off by"))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.1


def _machine() -> str:
    from fluid_npu.device.kernels.triton_support import probe_triton

    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, {probe_triton().reason}, python {sys.version.split()[0]}"


if __name__ == "__main__":
    sys.exit(main())
