"""Our flags in Megatron's own parser.

They are added when the parser is about to parse, after everybody else has added theirs: a flag that another package
brought under the same name (MindSpeed has ``--gemm-gradient-accumulation-fusion``) is shared, not added twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import wraps
from typing import Any

from fluid_npu.adaptor.settings import CHUNKS_OF, DISPATCHES, PAYLOAD_DTYPES, TRANSPORTS

GROUP = "fluid_npu"
OVERLAPS = ("off", "dw", "full", "auto")
GRAPHS = ("on", "off", "auto")
DEVICES = ("auto", "cpu", "cuda", "npu")


def number_or_auto(text: str) -> int | str:
    """What ``checks`` judges: a number where it is one."""
    return int(text) if text.lstrip("-").isdecimal() else text


#: (flag, settings of add_argument), owner by owner: the experts, the overlap, the launch.
FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--gemm-gradient-accumulation-fusion",
        {
            "action": "store_true",
            "help": "the experts' weight gradients are added straight into main_grad, also where "
            "--no-gradient-accumulation-fusion turns that off for the other layers; needs --moe-grouped-gemm",
        },
    ),
    (
        "--fluid-overlap",
        {
            "choices": OVERLAPS,
            "default": "auto",
            "help": "what runs while an AllToAll of an MoE layer flies: off nothing, dw the experts' weight gradients, "
            "full also the other chunks of the layer, forward and backward, auto decides and says why (auto)",
        },
    ),
    (
        "--fluid-moe-chunks",
        {
            "type": number_or_auto,
            "default": "auto",
            "metavar": "N",
            "help": "with --fluid-overlap full: chunks of an MoE layer, of its experts or of tokens that are sent once "
            "per rank, or auto (auto)",
        },
    ),
    (
        "--fluid-moe-chunks-of",
        {
            "choices": CHUNKS_OF,
            "default": "auto",
            "help": "with --fluid-overlap full and --fluid-dispatch once-per-rank: what chunks are of, tokens (each "
            "reads all weights) or experts (a token may be sent in several), or auto, which takes experts for hardly "
            "more rows (auto)",
        },
    ),
    (
        "--fluid-local-first",
        {
            "action": "store_true",
            "help": "with --fluid-overlap full: rows that stay on their rank are a chunk before the others, computed "
            "while the first of those travels",
        },
    ),
    (
        "--fluid-dispatch",
        {
            "choices": DISPATCHES,
            "default": "plain",
            "help": "how often a token is sent to a rank with several of its experts: plain once for each of them, "
            "once-per-rank once, once-per-node once to its node and from there once, static once whether it has some "
            "or not, so that no rank waits for sizes, auto what has clearly fewer rows (plain)",
        },
    ),
    (
        "--fluid-moe-cuda-graph",
        {
            "choices": GRAPHS,
            "nargs": "?",
            "const": "on",
            "default": "off",
            "help": "with --fluid-dispatch static or once-per-rank on CUDA: record each MoE layer and replay it by one "
            "call of the host; on (the flag alone), off, or auto: where nothing is in the way, which is said (off)",
        },
    ),
    (
        "--fluid-a2a-transport",
        {
            "choices": TRANSPORTS,
            "default": "collective",
            "help": "what moves the bytes of AllToAlls: torch.distributed's collective, copy engines inside a node "
            "(peer-copy), the collective with few CTAs, HCCL's AICPU, rounds of pairs, two legs inside and across "
            "nodes, or auto: the fastest by a short calibration, with a self-check (collective)",
        },
    ),
    (
        "--fluid-a2a-node-size",
        {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "ranks inside which links are fast, for --fluid-a2a-transport two-level and --fluid-dispatch "
            "once-per-node; 0: the launcher's (0)",
        },
    ),
    (
        "--fluid-a2a-ctas",
        {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "NCCL's CTAs for an exchange: so many with --fluid-a2a-transport high-priority, at most so many "
            "with few-ctas; a power of 2 up to 64; 0: NCCL's choice, 8 with few-ctas (0)",
        },
    ),
    (
        "--fluid-a2a-payload-dtype",
        {
            "choices": PAYLOAD_DTYPES,
            "default": "same",
            "help": "dtype in which the tokens of a dispatch travel: fp8 is e4m3 with a scale a token, combine and "
            "gradients keep theirs (same)",
        },
    ),
    (
        "--fluid-attention-chunks",
        {
            "type": number_or_auto,
            "default": 1,
            "metavar": "N",
            "help": "with --context-parallel-size: parts of a rank's heads, each part's AllToAlls beside the "
            "computation of others; auto: with --fluid-overlap full the fewest that overlap, else 1 (1)",
        },
    ),
    (
        "--fluid-carry-over",
        {
            "action": "store_true",
            "help": "the second expert GEMM's weight gradient may wait for the combine of the layer below",
        },
    ),
    (
        "--fluid-interleave-batches",
        {
            "action": "store_true",
            "help": "train MoE layers in two halves of a micro-batch, the AllToAlls of each beside the computation of "
            "the other; from Megatron 0.16 on",
        },
    ),
    (
        "--fluid-twin-every",
        {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "every N-th step waits for each AllToAll at once, so that hidden time can be measured; 0 never (0)",
        },
    ),
    (
        "--fluid-report",
        {
            "metavar": "DIR",
            "default": None,
            "help": "at the end rank 0 writes report.json and report.txt there: patches with hits, choices with "
            "reasons, AllToAll and weight-gradient times and bytes",
        },
    ),
    (
        "--fluid-fingerprints",
        {
            "choices": ("strict", "warn"),
            "default": None,
            "help": "what to do when Megatron's source is not what a patch was written against "
            "(FLUID_FINGERPRINTS, or strict)",
        },
    ),
    (
        "--fluid-device",
        {
            "choices": DEVICES,
            "default": "auto",
            "help": "auto takes an NPU or a GPU; a CPU is never taken unless named (auto)",
        },
    ),
)


def with_fluid_flags(original: Callable[..., argparse.ArgumentParser]) -> Callable[..., argparse.ArgumentParser]:
    """Wraps ``add_megatron_arguments``: the parser it returns learns our flags just before it parses."""

    @wraps(original)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        parse = parser.parse_known_args

        def parse_known_args(*args: Any, **kwargs: Any) -> Any:
            add_flags(parser)
            return parse(*args, **kwargs)

        parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
        return parser

    return add


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that the parser does not know yet."""
    missing = [(flag, settings) for flag, settings in FLAGS if flag not in parser._option_string_actions]
    if missing:
        group = parser.add_argument_group(GROUP, "AllToAll of MoE layers behind computation (docs/MEGATRON_LM.md)")
        for flag, settings in missing:
            group.add_argument(flag, **settings)
