#!/usr/bin/env python3
"""Many steps of one MoE layer with tokens, and so routing, that change with every step: what grew?

    python3 scripts/soak.py [--steps 1000] [--nproc 2] [--impl ours-overlapped ours-once ...] [--device auto] [--json]

A layer of mixtral's form with h64 f64 E16 top-4, or with the sizes of --cut. Prints one line for each implementation of
``fluid-npu bench layer`` that was asked for; exit code 1 when memory, tensors, objects of this package, file
descriptors or threads grew on any rank between a third of the steps and their end.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fluid_npu.bench.job import Job  # noqa: E402
from fluid_npu.bench.launch import run_job  # noqa: E402
from fluid_npu.bench.layer_cli import IMPLS  # noqa: E402
from fluid_npu.train.config import TrainConfig, validate  # noqa: E402

OURS = [name for name in IMPLS if name.startswith("ours")]
_SMALL = {"hidden": 64, "ffn": 64, "moe_ffn": 64, "heads": 4, "kv_heads": 4, "experts": 16, "topk": 4}
_CUT = {"layers": 1, "vocab_size": 128, "seq_length": 64, "micro_batch_size": 1}


def main() -> int:
    """Runs the steps and prints what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--impl", nargs="+", default=OURS, choices=OURS, metavar="I", help=", ".join(OURS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    if a.steps < 3:
        parser.error(f"--steps {a.steps}: at least 3 are needed to see growth")
    run = {"nproc": a.nproc, "ep": a.nproc, "device": a.device, "dtype": a.dtype, "overlap": "dw"}
    config = validate(TrainConfig(preset="mixtral-8x7b", cut={**_SMALL, **_CUT}, **run))
    options = {"impls": a.impl, "steps": a.steps}
    code, result = run_job(Job(task="fluid_npu.bench.soak:measure", config=config, options=options, command="soak"))
    if result is None:
        return code
    if a.json:
        print(json.dumps(result))
        return 1 if result["problems"] else 0
    for row in result["rows"]:
        print(f"{a.nproc} ranks, {a.steps} steps, {result['device']}, {', '.join(f'{k} {v}' for k, v in row.items())}")
    print("\n".join(result["problems"]) or "nothing grew")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
