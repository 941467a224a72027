"""``fluid-npu tune``: measures the settings of a model here and writes a profile for ``train``. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_npu.bench.options import add_common_flags, add_engine_flags, add_model_flags, add_rounds_flag, fail, run_task
from fluid_npu.train import exit_codes

#: What a model is cut to: its layers are alike, and a profile is for any number of them.
CUT = {"layers": 2, "first_dense_layers": 0}
_COMMAND = "fluid-npu tune"


def add_tune_parser(subparsers: Any) -> None:
    """Register ``tune``."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which settings are fastest for a model here, write a profile",
        description="Runs forward and backward of two layers of the model under every setting: gradients checked "
        "against stock Megatron and against the serialised twin, then timed in paired, interleaved rounds; on CUDA "
        "also with MoE layers recorded. Writes the fastest into a profile, or plain where nothing is told from it. "
        "'fluid-npu train --profile FILE' takes it.",
    )
    add_model_flags(parser, "mixtral-tiny")
    add_rounds_flag(parser, "20")
    parser.add_argument(
        "--plant-delay-ms", type=float, default=0.0, metavar="D", help="delay every AllToAll of ours, on a CPU"
    )
    parser.add_argument("--cp", type=int, default=1, metavar="N", help="context parallel size (1)")
    parser.add_argument("--link", metavar="RATE", help="put the ranks behind links of this rate, such as 1gbit (root)")
    parser.add_argument("--out", default="profile.json", metavar="FILE", help="where the profile goes (profile.json)")
    add_engine_flags(parser)
    add_common_flags(parser)
    parser.set_defaults(func=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    """Runs ``tune``."""
    from fluid_npu.bench.output import show

    path = Path(args.out)
    if not path.parent.is_dir():
        return fail(_COMMAND, f"--out {args.out}: the folder {path.parent} does not exist; make it or choose another")
    options = {"rounds": args.rounds or 20, "link": args.link}
    values = {"preset": args.preset, "cut": CUT, "plant_delay_ms": args.plant_delay_ms, "cp": args.cp}
    code, result = run_task(args, _COMMAND, "fluid_npu.bench.tune:measure", options, **values)
    if result is None:
        return code
    try:
        path.write_text(json.dumps({**result["profile"], "measured": result}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        return fail(_COMMAND, f"--out {args.out}: cannot be written ({error.strerror})", exit_codes.FAILED)
    show(result, tune_text(result, args.out), as_json=args.json)
    return exit_codes.OK


def tune_text(result: dict[str, Any], path: str) -> str:
    """A table of the settings, where it was measured, what was chosen and why."""
    from fluid_npu.bench.output import machine_text, number, table

    head = ("setting", "", "median ms", "p10", "p90", "peak MiB", "plain/this (95 %)", "error")
    lines = []
    for row in result["rows"]:
        if row["refused"]:
            lines.append((row["setting"], "REFUSED", *(["-"] * 6)))
            continue
        ratio, low, high = (row[f"ratio_plain_over_this{end}"] for end in ("", "_low", "_high"))
        figures = [number(row[name]) for name in ("median_ms", "p10_ms", "p90_ms", "peak_memory_mb")]
        noisy = "" if row["judged"] else "NOISY"
        error = f"{row['error']:.1e}"
        lines.append((row["setting"], noisy, *figures, f"{ratio:.3f} ({low:.3f} to {high:.3f})", error))
    cut = "".join(f" --{name.replace('_', '-')} {value}" for name, value in result["cut"].items())
    model = f"{result['preset']}{cut}, {result['dtype']}; forward and backward into main_grad, not reduced; "
    model += "peak: with what recorded layers keep for themselves"
    profile = result["profile"]
    settings = ", ".join(f"{name} {value}" for name, value in profile["settings"].items())
    refused = [f"REFUSED {row['setting']}: {row['refused']}" for row in result["rows"] if row["refused"]]
    chosen = [f"Chosen: {settings} ({profile['reason']}).", f"Written to {path}: fluid-npu train --profile {path}"]
    stock = "stock Megatron's" if result["compared_with"] == "stock" else f"those of {result['compared_with']}"
    model += f"; gradients compared with {stock}"
    return "\n".join([table(head, lines), "", machine_text(result), model, *refused, "", *chosen])
