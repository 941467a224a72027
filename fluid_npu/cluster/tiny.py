"""The same job with tiny sizes: Megatron's arguments for two CPU processes, and what they are for our own trainer.

Flags stay what they are, values shrink: layers, widths, experts, sequence, batch and parallel sizes. Flags that name
machines, files or more than one pipeline stage go; nothing goes without being told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluid_npu.cluster.flags import Arguments
from fluid_npu.cluster.plan import first_dense_layers

RANKS = 2

#: Sizes that two CPU cores train in a second; MLA's are per head.
_SIZES: Mapping[str, Any] = {
    "--num-layers": 2,
    "--hidden-size": 64,
    "--ffn-hidden-size": 128,
    "--num-attention-heads": 4,
    "--kv-channels": 16,
    "--num-query-groups": 2,
    "--q-lora-rank": 32,
    "--kv-lora-rank": 32,
    "--qk-head-dim": 16,
    "--qk-pos-emb-head-dim": 16,
    "--v-head-dim": 16,
    "--num-experts": 8,
    "--moe-ffn-hidden-size": 64,
    "--moe-shared-expert-intermediate-size": 64,
    "--seq-length": 64,
    "--max-position-embeddings": 64,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--expert-model-parallel-size": RANKS,
    "--expert-tensor-parallel-size": 1,
    "--micro-batch-size": 2,
    "--global-batch-size": 2 * RANKS * 2,
    "--recompute-num-layers": 1,
    "--eval-iters": 1,
    "--eval-interval": 1000,
    "--save-interval": 1000,
    "--fluid-moe-chunks": "auto",
    "--fluid-attention-chunks": 1,
    "--fluid-a2a-transport": "collective",
    "--fluid-a2a-node-size": 0,
    "--fluid-a2a-ctas": 0,
}
#: At most these: a smaller value stays.
_AT_MOST = {"--moe-router-topk": 2, "--moe-router-num-groups": 2, "--moe-router-group-topk": 1}

_DROPPED = {
    **dict.fromkeys(("--data-path", "--tokenizer-type", "--tokenizer-model", "--split"), "random tokens instead"),
    **dict.fromkeys(("--save", "--load", "--tensorboard-dir"), "a trial keeps no checkpoint"),
    **dict.fromkeys(
        (
            *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
            *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
            *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
        ),
        "one pipeline stage",
    ),
    "--sequence-parallel": "one tensor-parallel rank",
}


@dataclass(frozen=True)
class Change:
    """A flag whose value another one took; ``now`` is '' for a flag that went, with the reason."""

    flag: str
    was: str
    now: str
    reason: str = ""

    def text(self) -> str:
        """One line."""
        return f"{self.flag} {self.was}".rstrip() + (f" -> {self.now}" if self.now else f" left out: {self.reason}")


def shrink(args: Arguments, steps: int) -> tuple[dict[str, Any], list[Change]]:
    """Flags with tiny values, and every difference to what was given."""
    values: dict[str, Any] = {}
    changes: list[Change] = []
    for flag, value in args.values.items():
        if flag in _DROPPED:
            changes.append(Change(flag, _text(value), "", _DROPPED[flag]))
            continue
        if flag in args.of_mindspeed:
            changes.append(Change(flag, _text(value), "", "MindSpeed's, which is not on a CPU"))
            continue
        values[flag] = _tiny(flag, value, args, steps)
        if values[flag] != value:
            changes.append(Change(flag, _text(value), _text(values[flag])))
    return values, changes


def _tiny(flag: str, value: Any, args: Arguments, steps: int) -> Any:
    if flag == "--train-iters":
        return steps
    if flag == "--moe-layer-freq":
        dense = first_dense_layers(value, args.get("--num-layers", 1))
        return "([0]*1+[1]*1)" if dense else "([1]*2)"
    if flag in _AT_MOST:
        return min(value, _AT_MOST[flag])
    return _SIZES.get(flag, value)


def words_of(values: Mapping[str, Any]) -> list[str]:
    """A command line of flags and values."""
    words: list[str] = []
    for flag, value in values.items():
        words.append(flag)
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def _text(value: Any) -> str:
    if value is True:
        return ""
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


#: Megatron's flag and the flag of `fluid-npu train` that means the same.
TRAINER = {
    "--num-layers": "--layers",
    "--hidden-size": "--hidden",
    "--ffn-hidden-size": "--ffn",
    "--num-attention-heads": "--heads",
    "--num-query-groups": "--kv-heads",
    "--kv-channels": "--head-dim",
    "--num-experts": "--experts",
    "--moe-router-topk": "--topk",
    "--moe-ffn-hidden-size": "--moe-ffn",
    "--moe-shared-expert-intermediate-size": "--shared-expert-ffn",
    "--moe-router-num-groups": "--router-groups",
    "--moe-router-group-topk": "--group-topk",
    "--seq-length": "--seq-length",
    "--micro-batch-size": "--micro-batch-size",
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--context-parallel-size": "--cp",
    "--expert-model-parallel-size": "--ep",
    "--train-iters": "--steps",
    "--fluid-overlap": "--overlap",
    "--fluid-carry-over": "--carry-over",
    "--fluid-moe-chunks": "--moe-chunks",
    "--fluid-dispatch": "--dispatch",
    "--fluid-a2a-transport": "--a2a-transport",
    "--fluid-a2a-ctas": "--a2a-ctas",
    "--fluid-a2a-payload-dtype": "--a2a-payload-dtype",
    "--fluid-attention-chunks": "--attention-chunks",
    "--fluid-interleave-batches": "--interleave-batches",
    "--weight-decay": "--weight-decay",
    "--clip-grad": "--clip-grad",
    "--use-distributed-optimizer": "--distributed-optimizer",
}

#: What the preset of the trainer says by itself; the check compares it with the flags.
FROM_PRESET = frozenset(
    ("--group-query-attention", "--multi-latent-attention", "--normalization", "--norm-epsilon", "--swiglu")
    + ("--disable-bias-linear", "--untie-embeddings-and-output-weights", "--qk-layernorm", "--add-qkv-bias")
    + ("--position-embedding-type", "--rotary-base", "--rotary-scaling-factor", "--moe-router-score-function")
    + ("--moe-router-enable-expert-bias", "--moe-router-topk-scaling-factor", "--moe-router-pre-softmax")
    + ("--moe-aux-loss-coeff", "--max-position-embeddings", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim")
    + ("--qk-pos-emb-head-dim", "--v-head-dim")
)
#: What the trainer always does.
ALWAYS = frozenset(
    (
        "--distributed-backend",
        "--moe-token-dispatcher-type",
        "--moe-grouped-gemm",
        "--gemm-gradient-accumulation-fusion",
        "--no-rope-fusion",
    )
    + ("--transformer-impl", "--no-masked-softmax-fusion", "--attention-softmax-in-fp32", "--attention-dropout")
    + ("--hidden-dropout", "--moe-router-dtype", "--expert-tensor-parallel-size", "--adam-beta1", "--adam-beta2")
)


def trainer_flags(preset: str, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The arguments of ``fluid-npu train`` for tiny values, and the flags that it has no counterpart for.

    A model with dense layers keeps one; micro-batches follow from the batch sizes; MLA's sizes are the preset's.
    """
    words = ["--preset", preset, "--nproc", str(RANKS), "--vocab-size", "4096"]  # the default data's
    left_out = []
    for flag, value in values.items():
        if flag in TRAINER:
            words += [TRAINER[flag]] if value is True else [TRAINER[flag], str(value)]
        elif flag == "--bf16":
            words += ["--dtype", "bf16"]
        elif flag == "--moe-layer-freq":
            words += ["--first-dense-layers", str(first_dense_layers(value, values["--num-layers"]))]
        elif flag == "--global-batch-size":
            words += ["--micro-batches", str(value // (RANKS * values["--micro-batch-size"]))]
        elif flag not in FROM_PRESET | ALWAYS:
            left_out.append(flag)
    if "--num-query-groups" not in values:
        words += ["--kv-heads", str(values["--num-attention-heads"])]
    if "--moe-ffn-hidden-size" not in values:  # Megatron takes the dense width; a preset has both
        words += ["--moe-ffn", str(values["--ffn-hidden-size"])]
    return words, left_out
