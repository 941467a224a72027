"""A stand-in for ``megatron.training``, which comes with a Megatron-LM checkout and with no wheel.

Only what the rows of ``patches/megatron_lm-<line>.toml`` touch, with the signatures that they were written against; the
parser has the few flags that our checks read. It joins the installed ``megatron.core`` through the namespace package.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fluid_npu.adaptor.manifest import read_manifest

_ARGUMENTS = """
import argparse
import os

import torch


def add_megatron_arguments{add_megatron_arguments}:
    for name in ("moe-grouped-gemm", "bf16", "fp16", "disable-bias-linear", "overlap-grad-reduce"):
        parser.add_argument("--" + name, action="store_true")
    for name in ("num-experts", "expert-model-parallel-size", "context-parallel-size"):
        parser.add_argument("--" + name, type=int)
    parser.add_argument("--moe-token-dispatcher-type", default="alltoall")
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.set_defaults(expert_model_parallel_size=1, context_parallel_size=1, tensor_model_parallel_size=1)
    parser.set_defaults(pipeline_model_parallel_size=1, expert_tensor_parallel_size=None)
    return parser


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.add_bias_linear = not args.disable_bias_linear
    return args


def validate_args{validate_args}:
    assert not args.moe_grouped_gemm or args.bf16, "stock refuses"
    args.validated = True
    return args
"""
_INITIALIZE = """
import torch
from megatron.training.arguments import parse_args, validate_args

ARGS = None


def initialize_megatron{initialize_megatron}:
    global ARGS
    assert {PARSES_FIRST} or torch.cuda.is_available(), "stock refuses"
    ARGS = parsed_args if parsed_args is not None else parse_args(extra_args_provider, ignore_unknown_args)
    validate_args(ARGS, args_defaults)
    assert torch.cuda.is_available(), "stock refuses"


def _warmup_jit_function():
    raise AssertionError("compiles on CUDA")
"""
_FIRST = "(extra_args_provider=None, args_defaults={}, ignore_unknown_args=False, parsed_args=None)"
_TRAINING = """
import torch
from megatron.training.initialize import initialize_megatron


def train_step{train_step}:
    return forward_step_func(data_iterator, model)


def train{train}:
    return [
        train_step(forward_step_func, train_data_iterator, model, optimizer, opt_param_scheduler, config, None)
        for _ in range(6)
    ]
"""
_INIT = """
from megatron.training import initialize
from megatron.training.initialize import initialize_megatron
from megatron.training.training import train


def get_args():
    return initialize.ARGS
"""


def install(folder: Path, line: str = "0.16") -> None:
    """Writes the stand-in below ``folder`` and puts that on the path of this process."""
    rows = read_manifest(f"megatron_lm-{line}").rows
    parses_first = not any(row.target.endswith(".initialize_megatron") for row in rows)  # from 0.18 on
    signatures = {"PARSES_FIRST": str(parses_first), "initialize_megatron": _FIRST}
    signatures |= {row.target.rpartition(".")[2]: row.fingerprint.partition(":")[2] for row in rows}
    package = folder / "megatron" / "training"
    kernels = folder / "megatron" / "legacy" / "fused_kernels"
    for place in (package, kernels):
        place.mkdir(parents=True)
    (kernels / "__init__.py").write_text("def load(args):\n    raise AssertionError('builds with nvcc')\n")
    texts = {"arguments": _ARGUMENTS, "initialize": _INITIALIZE, "training": _TRAINING, "__init__": _INIT}
    for name, text in texts.items():
        for function, signature in signatures.items():
            text = text.replace("{" + function + "}", signature)
        (package / f"{name}.py").write_text(text)
    for name in ("utils/__init__", "utils/common_utils", "checkpointing"):
        (package / f"{name}.py").parent.mkdir(exist_ok=True)
        (package / f"{name}.py").write_text("import torch\n")
    sys.path.insert(0, str(folder))
