"""``fluid-npu train``: flags, checks, and the run itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from fluid_npu.adaptor.versions import installed_version
from fluid_npu.train import exit_codes
from fluid_npu.train.config import (
    A2A_TRANSPORTS,
    DISPATCHES,
    DTYPES,
    IMPLS,
    OVERLAPS,
    PAYLOAD_DTYPES,
    ConfigError,
    TrainConfig,
    validate,
)
from fluid_npu.train.launch import launch, write_config
from fluid_npu.train.presets import CUT_FIELDS, PRESETS, PresetError, flag_of
from fluid_npu.train.profile import Profile

_MEGATRON_LINE = "0.16"
_DEFAULT_RUNS = Path("runs")
_DEFAULTS = TrainConfig()


def add_train_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``train``; the parsed arguments carry ``func(args) -> exit code``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a preset on this machine's processes, or under torchrun",
        description="Trains a preset with real Megatron-Core. Starts its own processes; under torchrun it is a rank.",
        epilog=exit_codes.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_run_flags(parser)
    _add_training_flags(parser)
    cuts = parser.add_argument_group("cutting the preset", "any figure can be replaced by a whole number")
    for name in CUT_FIELDS:
        cuts.add_argument(flag_of(name), type=int, metavar="N", dest=f"cut_{name}", help=argparse.SUPPRESS)
    cuts.description = f"replaces a figure of the preset: {' '.join(f'{flag_of(name)} N' for name in CUT_FIELDS)}"
    parser.set_defaults(func=run_train)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    default = _DEFAULTS
    parser.add_argument("--preset", default=default.preset, metavar="NAME", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--device", default=default.device, metavar="NAME", help="auto, cpu, cuda or npu (auto)")
    parser.add_argument("--data", metavar="PREFIX", help="data set; default: the Python standard library's text")
    for name, text in (
        ("nproc", "processes on this machine"),
        ("ep", "expert parallel size"),
        ("tp", "tensor parallel size"),
        ("pp", "pipeline stages"),
        ("vpp", "virtual pipeline stages: model chunks per stage, interleaved; needs --pp"),
        ("cp", "context parallel size: ranks that share each sequence"),
        ("steps", "steps in all"),
        ("micro_batches", "micro-batches per step and rank"),
    ):
        shown = f"{text} ({getattr(default, name)})"
        parser.add_argument(flag_of(name), type=int, default=getattr(default, name), metavar="N", help=shown)
    parser.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (fp32 on a CPU, else bf16)")
    parser.add_argument("--overlap", default=default.overlap, metavar="NAME", help=f"{', '.join(OVERLAPS)} (auto)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=default.timeout,
        metavar="SECONDS",
        help=f"longest time a collective may take ({default.timeout:g})",
    )
    parser.add_argument("--out", default="", metavar="DIR", help="outputs; default: a new folder below runs/")
    parser.add_argument("--resume", action="store_true", help="continue the newest complete checkpoint in --out")
    parser.add_argument("--json", action="store_true", help="print summary.json, and nothing else, on standard output")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    numbers: tuple[tuple[str, type, str], ...] = (
        ("lr", float, "highest learning rate"),
        ("min_lr", float, "learning rate at the end"),
        ("warmup_steps", int, "steps of linear warm-up"),
        ("lr_decay_steps", int, "steps until --min-lr; default: --steps"),
        ("weight_decay", float, "of AdamW"),
        ("clip_grad", float, "largest gradient norm, 0: no clipping"),
        ("seed", int, "of weights and data order"),
        ("checkpoint_every", int, "steps between checkpoints"),
        ("twin_every", int, "every so many steps run as the serialised twin"),
        ("plant_delay_ms", float, "delay every AllToAll by this much (tests, demonstrations)"),
    )
    for name, kind, text in numbers:
        value = getattr(_DEFAULTS, name)
        shown = text if value is None else f"{text} ({value:g})"
        group.add_argument(flag_of(name), type=kind, default=value, metavar="X", help=shown)
    group.add_argument("--distributed-optimizer", action="store_true", help="shard optimizer states over ranks")
    text = "reduce gradients over data-parallel ranks during the backward, each bucket when it is ready"
    group.add_argument("--overlap-grad-reduce", action="store_true", help=text)
    text = "dW of FC2, the router, attention and dense linears may wait for the combine of the layer below"
    group.add_argument("--carry-over", action="store_true", help=text)
    group.add_argument("--trace", action="store_true", help="record the AllToAlls of the last steps in lanes.json")
    group.add_argument("--profile", metavar="FILE", help="overlap as 'fluid-npu tune' found best here")
    text = f"how often a token is sent to a rank with several of its experts: {', '.join(DISPATCHES)} (plain)"
    group.add_argument("--dispatch", default=_DEFAULTS.dispatch, metavar="NAME", help=text)
    text = "with --overlap full: chunks of experts, or of tokens sent once per rank, of an MoE layer, or auto (auto)"
    group.add_argument("--moe-chunks", default="auto", metavar="N", type=_number_or_auto, help=text)
    text = "with --overlap full and --dispatch once-per-rank: what chunks are of, tokens (each reads all weights) or "
    text += "experts (a token may be sent in several), or auto, which takes experts for hardly more rows (auto)"
    group.add_argument("--moe-chunks-of", default=_DEFAULTS.moe_chunks_of, metavar="NAME", help=text)
    text = "with --overlap full: rows that stay on their rank are a chunk before the others"
    group.add_argument("--local-first", action="store_true", help=text)
    text = "with --dispatch static or once-per-rank on CUDA: record each MoE layer and replay it by one call of the "
    text += "host; on (the flag alone), off, or auto, which does so where nothing is in the way and says what is (off)"
    words: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": _on_off_auto, "metavar": "NAME"}
    group.add_argument("--moe-cuda-graph", **words, help=text)
    text = "with --cp: parts of a rank's heads, each part's AllToAlls beside the computation of others, or auto (1)"
    group.add_argument("--attention-chunks", type=_number_or_auto, default=1, metavar="N", help=text)
    text = "train MoE layers in two halves of a micro-batch, the AllToAlls of each beside the other's computation"
    group.add_argument("--interleave-batches", action="store_true", help=text)
    text = f"what moves the bytes of AllToAlls: {', '.join(A2A_TRANSPORTS)} ({_DEFAULTS.a2a_transport})"
    group.add_argument("--a2a-transport", default=_DEFAULTS.a2a_transport, metavar="NAME", help=text)
    text = "ranks of a node, for --a2a-transport two-level and --dispatch once-per-node; 0: those of the launcher (0)"
    group.add_argument("--a2a-node-size", type=int, default=0, metavar="N", help=text)
    text = "NCCL's CTAs for an exchange: so many with --a2a-transport high-priority, at most so many with few-ctas; a "
    text += "power of 2 up to 64; 0: NCCL's choice, 8 with few-ctas (0)"
    group.add_argument("--a2a-ctas", type=int, default=0, metavar="N", help=text)
    text = f"of tokens in a dispatch: {', '.join(PAYLOAD_DTYPES)}; fp8 is e4m3 with a scale a token (same)"
    group.add_argument("--a2a-payload-dtype", default=_DEFAULTS.a2a_payload_dtype, metavar="NAME", help=text)
    impl = _DEFAULTS.impl
    group.add_argument("--impl", default=impl, metavar="NAME", help=f"MoE layers: {' or '.join(IMPLS)} ({impl})")


def _number_or_auto(text: str) -> int | str:
    """What ``validate`` judges: a number where it is one."""
    try:
        return int(text)
    except ValueError:
        return text


def _on_off_auto(text: str) -> bool | str:
    """What ``validate`` judges: a bool where it is one."""
    return {"on": True, "off": False}.get(text, text)


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the flags describe, checked. Raises ConfigError or PresetError."""
    names = {item.name for item in dataclasses.fields(TrainConfig)} - {"cut"}
    values = {name: value for name, value in vars(args).items() if name in names}
    cut = {name: getattr(args, f"cut_{name}") for name in CUT_FIELDS if getattr(args, f"cut_{name}") is not None}
    if under_torchrun():
        values["nproc"] = int(os.environ["WORLD_SIZE"])
    return validate(TrainConfig(**values, cut=cut))


def check_megatron(version: str | None) -> None:
    """Refuses a Megatron-Core whose optimizer checkpoints this trainer cannot write. Raises ConfigError."""
    if version is None or not version.startswith(f"{_MEGATRON_LINE}."):
        raise ConfigError(
            f"megatron-core {version or 'is not installed'}: this trainer needs {_MEGATRON_LINE}; "
            f"pip install 'megatron-core=={_MEGATRON_LINE}.*'. On other lines use the Layer Spec in your own loop, or "
            "Megatron-LM's (docs/MEGATRON_VERSIONS.md)"
        )


def under_torchrun() -> bool:
    """Whether this process is already a rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_train(args: argparse.Namespace) -> int:
    """Checks, prepares the data, runs, prints the summary."""
    try:
        config = config_of(args)
        check_megatron(installed_version("megatron-core"))
        if config.profile is not None:
            Profile.read(config.profile)
        if under_torchrun():
            return _run_as_rank(config, as_json=args.json)
        config = dataclasses.replace(config, out=str(choose_out(config)))
        config = dataclasses.replace(config, data=prepare_data(config, quiet=args.json))
        write_config(config)
    except (ConfigError, PresetError) as error:
        return _fail(error, exit_codes.USAGE)
    except OSError as error:
        return _fail(f"--out {config.out}: cannot be written ({error.strerror}); choose another", exit_codes.FAILED)
    except Exception as error:
        if type(error).__name__ != "DataError":
            raise
        return _fail(error, exit_codes.DATA)
    code = launch(config, quiet_stdout=args.json)
    if code == exit_codes.OK:
        show_summary(config.out, as_json=args.json)
    return code


def choose_out(config: TrainConfig) -> Path:
    """Creates and returns the output directory. Raises ConfigError rather than mixing two runs in one."""
    from fluid_npu.train.checkpoint_files import folder_of, latest_checkpoint

    if config.out:
        out = Path(config.out)
        if not config.resume and latest_checkpoint(folder_of(out)) is not None:
            raise ConfigError(f"--out {out}: holds the checkpoints of a run; add --resume or choose another directory")
    else:
        earlier = sorted(_DEFAULT_RUNS.glob(f"{config.preset}-[0-9]*"), key=lambda path: path.stat().st_mtime)
        if config.resume and not earlier:
            raise ConfigError(f"--resume: there is no run of {config.preset} below {_DEFAULT_RUNS}; give --out DIR")
        out = earlier[-1] if config.resume else _fresh(config.preset)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _fresh(preset: str) -> Path:
    number = 1
    while (_DEFAULT_RUNS / f"{preset}-{number}").exists():
        number += 1
    return _DEFAULT_RUNS / f"{preset}-{number}"


def prepare_data(config: TrainConfig, *, quiet: bool = False) -> str:
    """The data prefix, checked; the default data set is built at its first use. Raises DataError."""
    from fluid_npu.train.data.build import ensure_default, info
    from fluid_npu.train.quiet import hush_known_warnings

    hush_known_warnings()
    if config.data is not None:
        info(config.data)
        return config.data
    cache = default_data_folder()
    print(f"data: the Python standard library's text in {cache}", file=sys.stderr if quiet else sys.stdout, flush=True)
    return ensure_default(cache)


def default_data_folder() -> Path:
    """Where the default data set is kept: FLUID_NPU_CACHE, or the user's cache directory."""
    chosen = os.environ.get("FLUID_NPU_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fluid_npu"


def show_summary(out: str, *, as_json: bool) -> None:
    """Prints the summary for people or for machines."""
    from fluid_npu.report.summary_text import format_summary
    from fluid_npu.train.summary import read_summary

    summary = read_summary(out)
    print(json.dumps(summary) if as_json else format_summary(summary), flush=True)


def _run_as_rank(config: TrainConfig, *, as_json: bool) -> int:
    """Under torchrun: all ranks derive the same output directory and data prefix from the flags."""
    if not config.out:
        raise ConfigError("--out: under torchrun it must be given, so that all ranks use the same directory")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if os.environ["RANK"] == "0":
        choose_out(config)
    data = prepare_data(config, quiet=True)  # a lock lets one rank of a machine build, the others wait
    config = dataclasses.replace(config, data=data)
    from fluid_npu.train.worker import run_rank

    stdout = os.dup(1)
    if as_json:
        os.dup2(2, 1)
    code = run_rank(config)
    os.dup2(stdout, 1)
    if code == exit_codes.OK and os.environ["RANK"] == "0":
        show_summary(config.out, as_json=as_json)
    return code


def _fail(reason: object, code: int) -> int:
    print(f"fluid-npu train: {reason}", file=sys.stderr, flush=True)
    return code
