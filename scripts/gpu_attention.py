#!/usr/bin/env python3
"""Whole transformer layers under context parallelism on GPUs, over kinds of network, beside stock Megatron with TE.

    python3 scripts/gpu_attention.py OUT_DIR [--nproc 2] [--regimes nvlink ...] [--parts mixtral-8x7b ...]
        [--order nvlink:ops p2p-off:mixtral-8x7b ...] [--deadline 560] [--limit 60] [--rounds 8] [--device cpu --tiny]

Parts, each a process tree of its own with a time limit; --order names pairs of regime and part and runs them so:

    tests             attention of the GPU, and layers under context parallelism, against float64 (once)
    kernels           cuDNN's, flash and the efficient attention alone, at the models' sizes, sliding windows, dropout,
                      and a ring's blocks beside plain products (once)
    MODEL             ``bench block`` of mixtral-8x7b, deepseek-v2-lite, olmoe-1b-7b, dbrx: a layer, 4,096 tokens a rank
    fluidmoe-block    FluidMoE's: two Mixtral layers, sequences of 4,096, micro-batch 2, experts with GELU without gate
    ops               of mixtral-8x7b's layer: the parts of an iteration, and one forward and backward of stock with TE,
                      ours overlapped and ours in chunks in torch's profiler: kernels and the host's operators by time
    ops-fluidmoe      the same of FluidMoE's block

Regimes: nvlink (as it is), p2p-off (NCCL_P2P_DISABLE=1), p2p-off-1-cta (that and NCCL_MAX_CTAS=1). Context and expert
parallelism are --nproc. After every part OUT_DIR/attention.txt and OUT_DIR/attention.json hold all there is so far; of
a part that its limit cut off, what it had measured; OUT_DIR/parts.tar.gz what each wrote.
Exit code 1 if one failed. Needs fluid_npu importable by python3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.bench.block_cli import IMPLS, PARTIAL  # noqa: E402

REGIMES = {
    "nvlink": {},
    "p2p-off": {"NCCL_P2P_DISABLE": "1"},
    "p2p-off-1-cta": {"NCCL_P2P_DISABLE": "1", "NCCL_MAX_CTAS": "1"},
}
#: cuBLAS repeats its bits on several streams only so: the twins are compared bit by bit.
REPEATS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
MODELS = ("mixtral-8x7b", "deepseek-v2-lite", "olmoe-1b-7b", "dbrx")
BLOCK = "fluidmoe-block"
#: Parts that profile, and whose layers.
OPS = {"ops": "mixtral-8x7b", "ops-fluidmoe": BLOCK}
_PROFILED = ("stock-te", "ours-overlapped", "ours-attention-chunks")
ONCE = ("tests", "kernels")
PARTS = (*ONCE, *MODELS, BLOCK, *OPS)
TOKENS = 4096  # of a rank
WINDOW = (1024, 0)  # of part kernels
_TESTS_LIMIT = 1.5  # times --limit, of part tests: two process groups and many kernels to check
TINY = {"hidden": 64, "ffn": 48, "moe_ffn": 48, "heads": 8, "experts": 8, "topk": 2, "seq_length": 64}
#: Milliseconds of an iteration of that block on two H200, measured on 2026-11-20 with FluidMoE's own script.
QUOTED = {
    "nvlink": "Megatron with TE 38.86, FluidMoE v5 full 40.88",
    "p2p-off": "Megatron with TE 64.39, FluidMoE v5 full 56.53",
    "p2p-off-1-cta": "Megatron with TE 109.77, FluidMoE v5 full 95.82",
}
#: Query heads, key heads, head size, size of values: of all heads.
HEADS = {
    "mixtral-8x7b": (32, 8, 128, 128),
    "deepseek-v2-lite": (16, 16, 192, 128),
    "olmoe-1b-7b": (16, 16, 128, 128),
    "dbrx": (48, 8, 128, 128),
}
_RESULTS = ("block.json", PARTIAL)
TESTS = ("tests/device/test_cuda_attention.py", "tests/device/test_cuda_context.py")


@dataclass
class Part:
    """What runs, and what came of it."""

    regime: str
    name: str
    command: list[str]
    seconds: float = 0.0
    status: str = "not started"
    output: str = ""
    result: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Runs the parts in order; 1 when one failed or no time was left for it."""
    a = _arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    start, parts = time.monotonic(), [_part(regime, name, a) for regime, name in a.order or _every(a)]
    with tempfile.TemporaryDirectory(prefix="gpu-attention-") as work:
        for part in parts:
            left = a.deadline - (time.monotonic() - start)
            if left < a.limit / 2:
                part.status = "left out, no time"
            else:
                _run(part, Path(work), min(a.limit * (_TESTS_LIMIT if part.name == "tests" else 1.0), left))
            _pack(Path(work), a.out)
            _write(a, parts)
            print(f"{part.regime} {part.name}: {part.status}, {part.seconds:.0f} s", flush=True)
    print((a.out / "attention.txt").read_text(), end="")
    return int(any(part.status != "ok" for part in parts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--parts", nargs="+", default=[*ONCE, *MODELS, BLOCK], choices=PARTS)
    parser.add_argument(
        "--order", nargs="+", type=_pair, metavar="REGIME:PART", help="instead of --regimes and --parts"
    )
    parser.add_argument("--impl", nargs="+", default=[], help="of bench block; all by default")
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a part")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes in fp32, for a trial on CPUs")
    parser.add_argument("--time-kernels", action="store_true", help=argparse.SUPPRESS)  # the body of part kernels
    parser.add_argument("--profile", choices=OPS, help=argparse.SUPPRESS)  # the body of parts that profile
    arguments = parser.parse_args()
    if arguments.time_kernels:
        _time_kernels(arguments)
        sys.exit(0)
    if arguments.profile:
        sys.exit(_profile(arguments))
    return arguments


def _pair(text: str) -> tuple[str, str]:
    """'nvlink:ops' as (regime, part)."""
    regime, _, part = text.partition(":")
    if regime not in REGIMES or part not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}: REGIME:PART of {', '.join(REGIMES)} and {', '.join(PARTS)}")
    return regime, part


def _every(a: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What is asked once, then regime by regime."""
    yield from (("nvlink", name) for name in a.parts if name in ONCE)
    yield from ((regime, name) for regime in a.regimes for name in a.parts if name not in ONCE)


def _part(regime: str, name: str, a: argparse.Namespace) -> Part:
    own = [sys.executable, str(Path(__file__).resolve()), "OUT", "--device", a.device, *(["--tiny"] if a.tiny else [])]
    environment = {**REPEATS, **REGIMES[regime]}
    if name == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "-rP", "-W", "ignore", "-p", "no:cacheprovider", *TESTS]
        return Part(regime, name, command)
    if name == "kernels":
        return Part(regime, name, [*own, "--time-kernels"])
    if name in OPS:
        impls = ["--impl", *(a.impl or _PROFILED)]
        return Part(regime, name, [*own, "--profile", name, "--nproc", str(a.nproc), *impls], environment=environment)
    return Part(regime, name, _bench(name, regime, a), environment=environment)


def _bench(name: str, regime: str, a: argparse.Namespace) -> list[str]:
    """The command of a model's layers, without --out. Peer copies do not go through NCCL: a network has none."""
    preset, sizes = _sizes(name, a)
    flags = [word for key, value in sizes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    ranks, dtype = str(a.nproc), "fp32" if a.tiny else "bf16"
    words = ["bench", "block", "--device", a.device, "--dtype", dtype, "--preset", preset, *flags]
    words += ["--nproc", ranks, "--cp", ranks, "--ep", ranks, "--rounds", str(a.rounds)]
    words += ["--activation", "gelu"] if name == BLOCK else []
    impls = [one for one in a.impl or IMPLS if regime == "nvlink" or one != "ours-peer"]
    words += ["--impl", *impls]
    return [sys.executable, "-m", "fluid_npu", *words]


def _sizes(name: str, a: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """The preset of a part's layers, and what of it is another."""
    preset = "mixtral-8x7b" if name == BLOCK else name
    whole = name in ("mixtral-8x7b", "dbrx")  # long sequences; the others' are as long as the model's
    sizes = {"seq_length": TOKENS * a.nproc if whole else TOKENS, "micro_batch_size": 1 if whole else a.nproc}
    if name == BLOCK:
        sizes = {"seq_length": TOKENS, "micro_batch_size": 2, "layers": 2}
    if a.tiny:
        sizes |= TINY
        sizes |= {"kv_heads": 8 if preset == "deepseek-v2-lite" else 4}
    return preset, sizes


def _run(part: Part, work: Path, limit: float) -> None:
    """Runs it; INT first at its limit, so that the launcher stops its ranks, then KILL for the whole group."""
    folder = work / f"{part.regime}-{part.name}"
    folder.mkdir(exist_ok=True)
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)
    command = [*part.command, "--out", str(folder)] if "block" in part.command else part.command
    environment = {**os.environ, **part.environment}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    start = time.monotonic()
    with open(folder / "output.txt", "w+") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            part.status = "ok" if child.wait(limit) == 0 else f"FAILED, exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            part.status = f"FAILED, over {limit:.0f} s"
            _stop(child)
        output.seek(0)
        text = output.read()
    part.seconds = time.monotonic() - start
    # The record travels with the repository: no paths of this machine in it.
    part.output = text.replace(str(folder.resolve()), "OUT").replace(str(work), "OUT").replace(f"{ROOT}/", "")
    for name in _RESULTS:
        if part.result is None and (folder / name).exists():
            part.result = json.loads((folder / name).read_text())


def _pack(work: Path, out: Path) -> None:
    """What all parts have written, in one file: few come back from a lent machine."""
    with tarfile.open(out / "parts.tar.gz", "w:gz") as packed:
        for folder in sorted(work.iterdir()):
            packed.add(folder, folder.name)


def _stop(child: subprocess.Popen[bytes]) -> None:
    for number, wait in ((signal.SIGINT, 8.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wait)
            return


def _write(a: argparse.Namespace, parts: list[Part]) -> None:
    from fluid_npu.bench.block_text import block_text

    lines, records = [], []
    for part in parts:
        command = " ".join(["python3", *part.command[1:]]).replace(str(a.out), "OUT").replace(f"{ROOT}/", "")
        settings = " ".join(f"{name}={value}" for name, value in part.environment.items())
        lines += [f"==== {part.regime}, {part.name}: {part.status}, {part.seconds:.0f} s; {settings or 'no settings'}"]
        lines += [f"$ {command}", ""]
        if part.name == BLOCK:
            lines += [f"quoted, two H200 with FluidMoE's own script, not of this run: {QUOTED[part.regime]} ms", ""]
        if part.result is not None:
            part.result["command"] = command
            lines += [block_text(part.result), ""]
        if part.result is None or part.status != "ok":
            shown = 400 if part.name in OPS else 60
            lines += [*part.output.splitlines()[-shown:], ""]
        record = {"regime": part.regime, "part": part.name, "status": part.status, "seconds": round(part.seconds, 1)}
        records.append({**record, "environment": part.environment, "result": part.result})
    (a.out / "attention.txt").write_text("\n".join(lines) + "\n")
    (a.out / "attention.json").write_text(json.dumps(records, indent=1) + "\n")


def _profile(a: argparse.Namespace) -> int:
    """The body of part ops: prints what rank 0 found, and of the other ranks the times."""
    from fluid_npu.bench.job import Job
    from fluid_npu.bench.launch import run_job
    from fluid_npu.train.config import TrainConfig, validate

    preset, sizes = _sizes(OPS[a.profile], a)
    cut = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, **sizes}
    run = {"nproc": a.nproc, "cp": a.nproc, "ep": a.nproc, "device": a.device, "dtype": "fp32" if a.tiny else "bf16"}
    config = validate(TrainConfig(preset=preset, cut=cut, **run))
    options = {"impls": a.impl or list(_PROFILED), "activation": "gelu" if OPS[a.profile] == BLOCK else "preset"}
    job = Job(
        task="fluid_npu.bench.block_ops:measure", config=config, options=options, command="gpu_attention --profile"
    )
    code, result = run_job(job)
    if result is not None:
        print(result["text"])
        for rank, other in enumerate(result["others"], 1):
            told = [line for line in other.splitlines() if line.startswith(("==", "ms of", "  waits"))]
            print(f"rank {rank}:", *told, sep="\n  ")
    return code


def _time_kernels(a: argparse.Namespace) -> None:
    """What torch has for the heads of one of two ranks, forward with backward: median of ten."""
    import torch

    from fluid_npu.device import get_device

    device = get_device(a.device).value
    device.set_current(0)
    place = device.torch_device(0)
    dtype, rows = (torch.float32, 64) if a.tiny else (torch.bfloat16, 2 * TOKENS)
    print(f"{device.describe()}, torch {torch.__version__}, {dtype}, {rows} rows, forward and backward")
    for model, (heads, shared, size, values) in HEADS.items():
        sizes = ((heads // 2, size), (shared // 2, size), (shared // 2, values))
        qkv = [torch.randn(rows, 1, *shape, device=place).to(dtype).requires_grad_() for shape in sizes]
        for row in (*_whole_attention(qkv, a.device), *_ring_blocks(qkv, a.device)):
            kernel, kind, attend, reason = row
            figure = "none" if attend is None else f"{_median_ms(attend, device):.3f} ms"
            print(f"{model:18} {kernel:10} {kind:14} {figure}  ({reason})", flush=True)


def _whole_attention(qkv: list[Any], device: str) -> Iterator[tuple[str, str, Any, str]]:
    """(kernel, kind, what to time or None, reason): each kernel causal, and windows and dropout by what auto takes."""
    from fluid_npu.device.kernels.fused import AttentionCall
    from fluid_npu.device.kernels.torch_attention import TORCH, TorchAttention

    gpu = device == "cuda"
    kinds = [
        (word, "causal", {"causal": True}) for word in (("cudnn", "flash", "efficient", TORCH) if gpu else (TORCH,))
    ]
    auto = "auto" if gpu else TORCH
    kinds += [
        (auto, f"window {WINDOW[0]}", {"window": WINDOW}),
        (auto, "dropout 0.1", {"causal": True, "dropout": 0.1}),
    ]
    for kernel, kind, changes in kinds:
        chosen = TorchAttention(kernel)
        call = AttentionCall(heads=qkv[0].shape[2], scale=qkv[0].shape[3] ** -0.5, **changes)
        accepted, reason = chosen.accepts(*qkv, call)

        def attend(chosen: Any = chosen, call: Any = call) -> None:
            out = chosen.compute(*qkv, call)
            out.backward(out.detach())

        yield kernel, kind, attend if accepted else None, reason


def _ring_blocks(qkv: list[Any], device: str) -> Iterator[tuple[str, str, Any, str]]:
    """The same of a ring of one rank, which is its first step; by plain products too."""
    from fluid_npu.device.kernels.torch_attention import TORCH
    from fluid_npu.device.kernels.torch_attention_blocks import TorchBlocks
    from fluid_npu.ops.ring_attention import RingCall, ring_attention

    half = [x.detach()[: len(x) // 2].requires_grad_() for x in qkv]
    for kernel in ("plain", *(("cudnn", "flash") if device == "cuda" else (TORCH,))):
        scale = qkv[0].shape[3] ** -0.5
        block, reason = (None, "") if kernel == "plain" else TorchBlocks(kernel).choose(*half, scale)
        call = RingCall(scale=scale, ranks=1, rank=0, pass_on=lambda rows, back: lambda: rows, right=0, block=block)

        def attend(call: Any = call) -> None:
            out = ring_attention(*half, call)
            out.backward(out.detach())

        timed = kernel == "plain" or block is not None
        yield kernel, "ring's block", attend if timed else None, reason or f"{len(half[0])} rows, causal"


def _median_ms(attend: Any, device: Any) -> float:
    """Of forward and backward; three to warm up."""
    from statistics import median

    found = []
    for number in range(13):
        start, end = device.event(), device.event()
        start.record()
        attend()
        end.record()
        device.synchronize()
        if number > 2:
            found.append(end.elapsed_ms(start))
    return median(found)


if __name__ == "__main__":
    sys.exit(main())
