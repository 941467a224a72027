#!/usr/bin/env python3
"""Every GPU operation of one forward and backward of our MoE layer, and what the host costs.

    python3 scripts/gpu_layer_ops.py OUT_DIR [--nproc N] [--cases mixtral fine tiny] [--impl ours-overlapped ...]

Cases: mixtral (h4096 f14336 E8 top-2) and fine (h2048 f1408 E64 top-6), 4096 tokens a rank; tiny is fine with h64, f64
and 64 tokens a rank, where the step is the host's time. Each prints the time of a step and of its floor, the kernel
table, the operations in order and, for tiny, Python's profile. Everything lands in OUT_DIR/layer-ops.txt. A case takes
10 to 40 s. Also runs on CPUs (--device cpu --dtype fp32 --cases tiny), without the kernel table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.bench.job import Job  # noqa: E402
from fluid_npu.bench.launch import run_job  # noqa: E402
from fluid_npu.bench.layer_cli import IMPLS  # noqa: E402
from fluid_npu.train.config import A2A_TRANSPORTS, TrainConfig, validate  # noqa: E402

OURS = [name for name in IMPLS if name.startswith("ours")]
_FINE = {"moe_ffn": 1408, "hidden": 2048, "experts": 64, "topk": 6}
_TINY = {"moe_ffn": 64, "ffn": 64, "hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "seq_length": 64}
CASES = {"mixtral": {}, "fine": _FINE, "tiny": {**_FINE, **_TINY}}


def main() -> int:
    """Runs the cases one after another; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--impl", nargs="+", default=["ours-overlapped"], choices=OURS, metavar="I", help=", ".join(OURS)
    )
    parser.add_argument("--dispatch", default="plain", choices=("plain", "once-per-rank", "auto"))
    parser.add_argument("--a2a-transport", default="auto", choices=A2A_TRANSPORTS, metavar="NAME")
    parser.add_argument("--a2a-ctas", type=int, default=0, metavar="N", help="as fluid-npu bench layer's (0)")
    parser.add_argument("--workload", default="W0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--router", action="store_true", help="the router decides, not the workload")
    parser.add_argument("--no-order", action="store_true", help="leave out the operations in order")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return max(_run(arguments, case, impl) for case in arguments.cases for impl in arguments.impl)


def _run(arguments: argparse.Namespace, case: str, impl: str) -> int:
    cut = {"layers": 1, "first_dense_layers": 0, "vocab_size": 128, "seq_length": 4096, **CASES[case]}
    n, a = arguments.nproc, arguments
    run = {"nproc": n, "ep": n, "device": a.device, "dtype": a.dtype, "dispatch": a.dispatch, "overlap": "dw"}
    run |= {"a2a_transport": a.a2a_transport, "a2a_ctas": a.a2a_ctas}
    config = validate(TrainConfig(preset="mixtral-8x7b", cut=cut, **run))
    options = {"impl": impl, "order": not a.no_order, "cprofile": case == "tiny", "workload": a.workload}
    options |= {"router": a.router, "plant_error": 0.0}
    job = Job(task="fluid_npu.bench.layer_ops:measure", config=config, options=options, command="gpu_layer_ops")
    code, result = run_job(job)
    text = f"case {case}, {n} ranks: failed with exit code {code}\n"
    if result is not None:
        text = f"case {case}, {n} ranks\n{result['text']}\n"
        for rank, other in enumerate(result["others"], 1):
            text += f"rank {rank}: " + "\n        ".join(line for line in other.splitlines()[1:5]) + "\n"
    print(text, flush=True)
    with open(a.out / "layer-ops.txt", "a", encoding="utf-8") as record:
        record.write(text + "\n")
    return 0 if result is not None else 1


if __name__ == "__main__":
    sys.exit(main())
