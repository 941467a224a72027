"""What a training run is: one frozen dataclass, checked before any process starts. Standard library only.

A ``TrainConfig`` round-trips through JSON; the launcher hands it to the ranks as a file. Every error names the
flag, the value received, what is allowed and the fix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fluid_npu.comm.ctas import ctas_obstacle
from fluid_npu.train.presets import CUT_FIELDS, Preset, flag_of, get_preset

DEVICES = ("auto", "cpu", "cuda", "npu")
DTYPES = ("fp32", "bf16", "fp16")
OVERLAPS = ("off", "dw", "full", "auto")
IMPLS = ("fluid", "stock")
DISPATCHES = ("plain", "once-per-rank", "once-per-node", "static", "auto")
#: Those of layers that can be recorded; 'auto' may choose another.
RECORDED_DISPATCHES = ("static", "once-per-rank")
#: Transports whose exchanges a CUDA graph may hold.
RECORDABLE_TRANSPORTS = ("collective", "high-priority", "few-ctas")
A2A_TRANSPORTS = ("auto", "collective", "high-priority", "peer-copy", "few-ctas", "aicpu", "pairwise", "two-level")
PAYLOAD_DTYPES = ("same", "fp8")
CHUNKS_OF = ("auto", "tokens", "experts")

#: Fields that may differ between a checkpoint and the run that resumes it; all others must be equal.
RESUME_MAY_DIFFER = frozenset(
    ("device", "data", "steps", "overlap", "timeout", "out", "resume", "checkpoint_every", "twin_every")
    + (
        "plant_delay_ms",
        "carry_over",
        "trace",
        "profile",
        "dispatch",
        "moe_chunks",
        "moe_chunks_of",
        "local_first",
        "overlap_grad_reduce",
        "attention_chunks",
        "moe_cuda_graph",
        "a2a_transport",
        "a2a_node_size",
        "a2a_ctas",
        "a2a_payload_dtype",
    )
)


class ConfigError(ValueError):
    """A flag's value cannot be; the text names flag, value, rule and fix."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Sizes of the model come from ``preset`` and its ``cut`` (figure name to value).

    ``dtype`` None is the device's own; ``data`` None the default corpus; ``lr_decay_steps`` None is ``steps``.
    ``plant_delay_ms`` delays every AllToAll, for tests and demonstrations. ``carry_over`` lets dW of FC2 and of the
    router wait for the combine of the layer below. ``dispatch`` 'once-per-rank' sends a token once to each rank that
    holds some of its experts, 'once-per-node' once to each node that does. ``a2a_transport`` moves the bytes of
    AllToAlls; 'two-level' between nodes of ``a2a_node_size`` ranks, where 0 asks the launcher; 'high-priority' with
    ``a2a_ctas`` CTAs of NCCL and 'few-ctas' with so many at most, where 0 is their own number. ``a2a_payload_dtype``
    'fp8' codes the tokens of a dispatch. ``vpp`` is the number of model chunks
    per pipeline stage. ``moe_chunks`` is in how many groups of its experts, or of tokens where they are sent once per
    rank, ``overlap`` 'full' pipelines an MoE layer: a number, or 'auto'; ``moe_chunks_of`` is which of the two, with
    ``local_first`` rows that stay on their rank are a chunk before those. ``attention_chunks`` are the parts in which a
    context-parallel rank computes its heads, or 'auto', which decides from costs. ``interleave_batches`` trains MoE
    layers in two halves of a micro-batch.
    ``moe_cuda_graph`` replays each MoE layer as a CUDA graph, 'auto' where that can be. ``overlap_grad_reduce`` reduces
    gradients over data-parallel ranks during the backward, each bucket when it is ready.
    """

    preset: str = "mixtral-tiny"
    cut: Mapping[str, int] = field(default_factory=dict)
    device: str = "auto"
    data: str | None = None
    nproc: int = 2
    ep: int = 2
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    steps: int = 150
    micro_batches: int = 1
    dtype: str | None = None
    overlap: str = "auto"
    timeout: float = 60.0
    out: str = ""
    resume: bool = False
    seed: int = 1234
    lr: float = 2e-3
    min_lr: float = 2e-4
    warmup_steps: int = 15
    lr_decay_steps: int | None = None
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    checkpoint_every: int = 50
    twin_every: int = 10
    plant_delay_ms: float = 0.0
    carry_over: bool = False
    trace: bool = False
    profile: str | None = None
    dispatch: str = "plain"
    moe_chunks: int | str = "auto"
    moe_chunks_of: str = "auto"
    local_first: bool = False
    attention_chunks: int | str = 1
    interleave_batches: bool = False
    moe_cuda_graph: bool | str = False
    a2a_transport: str = "collective"
    a2a_node_size: int = 0
    a2a_ctas: int = 0
    a2a_payload_dtype: str = "same"
    impl: str = "fluid"

    def model(self) -> Preset:
        """The preset with its cut. Raises PresetError."""
        return get_preset(self.preset).cut(**self.cut)

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate falls."""
        return self.steps if self.lr_decay_steps is None else self.lr_decay_steps

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.nproc // (self.tp * self.pp * self.cp)

    def to_json(self) -> str:
        """The same object as text."""
        return json.dumps({**asdict(self), "cut": dict(self.cut)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """What ``to_json`` wrote. Raises ConfigError for unknown or missing fields."""
        try:
            return cls(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"config: not a configuration of this version ({error}); start the run anew") from error

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads a file that holds ``to_json``."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def validate(config: TrainConfig) -> TrainConfig:
    """Returns the configuration if it can run. Raises ConfigError or PresetError for the first rule it breaks."""
    _check_choices(config)
    _check_numbers(config)
    _check_parallel(config)
    _check_sizes(config, config.model())
    return config


def dense_stages(config: TrainConfig) -> int:
    """Pipeline stages, from the first on, that hold only dense layers."""
    preset = config.model()
    size = preset.layers // (config.pp * config.vpp)
    # A stage's last chunk is its highest; only the first layers of a model are dense.
    ends = [((config.vpp - 1) * config.pp + stage + 1) * size for stage in range(config.pp)]
    return sum(end <= preset.first_dense_layers for end in ends)


def differing_flag(saved: Mapping[str, Any], config: TrainConfig) -> str | None:
    """How the configuration differs from a checkpoint's, as an error text; None when it may resume it."""
    for item in fields(config):
        if item.name in RESUME_MAY_DIFFER or item.name not in saved:
            continue
        ours: Any = config.decay_steps if item.name == "lr_decay_steps" else getattr(config, item.name)
        theirs = saved[item.name]
        if item.name == "lr_decay_steps" and theirs is None:
            theirs = saved["steps"]
        if ours == theirs:
            continue
        if item.name == "cut":
            return _differing_cut(theirs, dict(ours))
        flag = flag_of(item.name)
        return f"{flag} {ours}: the checkpoint was written with {flag} {theirs}; resume with {flag} {theirs}"
    return None


def _differing_cut(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    name = next(name for name in CUT_FIELDS if theirs.get(name) != ours.get(name))
    flag, saved, given = flag_of(name), theirs.get(name), ours.get(name, "(not given)")
    if saved is None:
        return f"{flag} {given}: the checkpoint was written without {flag}; resume without it"
    return f"{flag} {given}: the checkpoint was written with {flag} {saved}; resume with {flag} {saved}"


def _check_choices(c: TrainConfig) -> None:
    for name, allowed in (
        ("device", DEVICES),
        ("impl", IMPLS),
        ("dispatch", DISPATCHES),
        ("a2a_transport", A2A_TRANSPORTS),
        ("a2a_payload_dtype", PAYLOAD_DTYPES),
    ):
        if getattr(c, name) not in allowed:
            raise ConfigError(f"{flag_of(name)} {getattr(c, name)!r}: allowed are {', '.join(allowed)}")
    if c.dtype is not None and c.dtype not in DTYPES:
        raise ConfigError(f"--dtype {c.dtype!r}: allowed are {', '.join(DTYPES)}")
    if c.overlap not in OVERLAPS:
        raise ConfigError(f"--overlap {c.overlap!r}: allowed are {', '.join(OVERLAPS)}")
    if c.carry_over and c.overlap == "off":
        raise ConfigError("--carry-over: with --overlap off no AllToAll is in flight; use --overlap dw or auto")
    _check_moe_chunks(c)
    _check_chunks_of(c)
    _check_local_first(c)
    _check_node_size(c)
    _check_interleave(c)
    _check_payload(c)
    if c.moe_cuda_graph not in (True, False, "auto"):
        raise ConfigError(f"--moe-cuda-graph {c.moe_cuda_graph!r}: allowed are on, off, auto")
    if c.moe_cuda_graph is True:
        _check_moe_cuda_graph(c)
    if c.impl == "stock":
        _check_stock(c)
    if c.profile is not None:
        _check_profile(c, c.profile)
    obstacle = ctas_obstacle(c.a2a_ctas, c.a2a_transport)
    if obstacle:
        raise ConfigError(f"--a2a-ctas {c.a2a_ctas}: {obstacle}")


def _check_moe_chunks(c: TrainConfig) -> None:
    n = c.moe_chunks
    if n == "auto":
        return
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"--moe-chunks {n}: must be a number of at least 1, or auto; leave it out for auto")
    if n == 1:
        return
    if c.overlap != "full":
        raise ConfigError(f"--moe-chunks {n}: --overlap {c.overlap} has one; use --overlap full, or leave it out")
    if c.dispatch in ("static", "once-per-node"):
        raise ConfigError(
            f"--moe-chunks {n}: --dispatch {c.dispatch} sends all tokens in one piece; use --dispatch once-per-rank, "
            "or leave it out"
        )
    if c.dispatch == "once-per-rank" and c.moe_chunks_of != "experts":
        _check_token_chunks(c, n)
    elif c.ep >= 1 and c.model().experts % c.ep == 0 and c.model().experts // c.ep % n:
        local = c.model().experts // c.ep
        allowed = ", ".join(str(d) for d in range(1, local + 1) if local % d == 0)
        raise ConfigError(
            f"--moe-chunks {n}: a rank has {local} experts (experts / ep); allowed are {allowed} and auto"
        )


def _check_chunks_of(c: TrainConfig) -> None:
    of = c.moe_chunks_of
    if of not in CHUNKS_OF:
        raise ConfigError(f"--moe-chunks-of {of!r}: allowed are {', '.join(CHUNKS_OF)}")
    if of == "auto":
        return
    if c.overlap != "full":
        raise ConfigError(f"--moe-chunks-of {of}: --overlap {c.overlap} has no chunks; use --overlap full")
    if of == "tokens" and c.dispatch == "plain":
        raise ConfigError(
            "--moe-chunks-of tokens: --dispatch plain has chunks of experts, which send the same rows and read no "
            "weight twice; use --dispatch once-per-rank, or leave it out"
        )


def _check_local_first(c: TrainConfig) -> None:
    if not c.local_first:
        return
    if c.overlap != "full":
        raise ConfigError(f"--local-first: --overlap {c.overlap} has no chunks; use --overlap full, or leave it out")
    if c.ep == 1:
        raise ConfigError("--local-first: with --ep 1 all rows are local; leave it out")
    if c.dispatch == "once-per-node":
        raise ConfigError(
            f"--local-first: --dispatch {c.dispatch} sends all tokens in one piece; use --dispatch once-per-rank, or "
            "leave it out"
        )


def _check_payload(c: TrainConfig) -> None:
    if c.a2a_payload_dtype == "fp8" and c.device == "npu":
        raise ConfigError("--a2a-payload-dtype fp8: torch_npu has no e4m3 numbers; use --a2a-payload-dtype same")
    if c.a2a_payload_dtype == "fp8" and c.dispatch == "once-per-node":
        raise ConfigError(
            "--a2a-payload-dtype fp8: --dispatch once-per-node sends received rows on, which is not coded; use "
            "--dispatch once-per-rank, or --a2a-payload-dtype same"
        )
    if c.a2a_payload_dtype == "fp8" and c.profile is not None:
        raise ConfigError(
            f"--a2a-payload-dtype fp8: --profile {c.profile} was measured without it; drop one of the two"
        )
    if c.a2a_payload_dtype == "fp8" and c.local_first:
        raise ConfigError("--a2a-payload-dtype fp8: it is not coded in chunks (--local-first); leave one of them out")
    if c.a2a_payload_dtype == "fp8" and c.moe_chunks not in ("auto", 1):
        raise ConfigError(
            f"--a2a-payload-dtype fp8: it is not coded in chunks (--moe-chunks {c.moe_chunks}); use --moe-chunks 1"
        )


def _check_node_size(c: TrainConfig) -> None:
    n = c.a2a_node_size
    if n == 0:
        return
    if n < 0 or c.nproc % n:
        raise ConfigError(f"--a2a-node-size {n}: must divide --nproc {c.nproc}; leave it out to ask the launcher")
    if c.a2a_transport not in ("auto", "two-level") and c.dispatch not in ("auto", "once-per-node"):
        raise ConfigError(
            f"--a2a-node-size {n}: --a2a-transport {c.a2a_transport} has no nodes; use two-level or auto, or "
            "--dispatch once-per-node"
        )


def _check_interleave(c: TrainConfig) -> None:
    if not c.interleave_batches:
        return
    if c.overlap == "off" or c.ep == 1:
        why = "--overlap off waits for every AllToAll" if c.overlap == "off" else "with --ep 1 there is no AllToAll"
        raise ConfigError(f"--interleave-batches: {why}; leave it out")
    samples = c.model().micro_batch_size
    if samples % 2:
        raise ConfigError(
            f"--interleave-batches: --micro-batch-size {samples} has no halves; use --micro-batch-size {samples + 1}"
        )


def _check_token_chunks(c: TrainConfig, n: int) -> None:
    """Tokens that are sent once per rank may be in chunks of tokens."""
    preset = c.model()
    tokens = preset.micro_batch_size * preset.seq_length // max(c.tp * c.cp, 1)
    if n > tokens:
        raise ConfigError(
            f"--moe-chunks {n}: with --dispatch once-per-rank chunks may be of tokens, and a rank has {tokens}; "
            "use fewer, or auto"
        )


def _check_moe_cuda_graph(c: TrainConfig) -> None:
    """What ``mcore.graph_choice`` would refuse in every process, as far as flags say it."""
    obstacles = (
        (c.impl != "fluid", f"--impl {c.impl}", "has none; use --impl fluid"),
        (c.device in ("cpu", "npu"), f"--device {c.device}", "records no graphs; use --device cuda"),
        (
            c.dispatch not in RECORDED_DISPATCHES,
            f"--dispatch {c.dispatch}",
            f"may wait for sizes on the host; use --dispatch {' or '.join(RECORDED_DISPATCHES)}",
        ),
        (c.carry_over, "--carry-over", "leaves dW for another layer; leave it out"),
        (c.pp > 1, f"--pp {c.pp}", "has several forwards waiting for their backwards; use --pp 1"),
        (c.tp > 1, f"--tp {c.tp}", "has collectives that have not been recorded yet; use --tp 1"),
        (
            c.a2a_transport not in RECORDABLE_TRANSPORTS,
            f"--a2a-transport {c.a2a_transport}",
            f"may count its exchanges on the host; use {', '.join(RECORDABLE_TRANSPORTS)}",
        ),
        (c.plant_delay_ms > 0, "--plant-delay-ms", "delays on the host; leave it out"),
        (c.interleave_batches, "--interleave-batches", "has two halves under way at a time; leave one of them out"),
    )
    for given, flag, fix in obstacles:
        if given:
            raise ConfigError(f"--moe-cuda-graph: {flag} {fix}")


def _check_stock(c: TrainConfig) -> None:
    """What stock Megatron does not have."""
    missing = (
        (c.carry_over, "--carry-over", "has none; leave it out, or use --impl fluid"),
        (c.dispatch != "plain", f"--dispatch {c.dispatch}", "has none; use --dispatch plain or --impl fluid"),
        (
            c.a2a_transport != "collective",
            f"--a2a-transport {c.a2a_transport}",
            "has none; leave it out, or use --impl fluid",
        ),
        (c.a2a_ctas != 0, f"--a2a-ctas {c.a2a_ctas}", "has none; leave it out, or use --impl fluid"),
        (c.interleave_batches, "--interleave-batches", "has none; leave it out, or use --impl fluid"),
        (c.moe_cuda_graph == "auto", "--moe-cuda-graph auto", "has none; leave it out, or use --impl fluid"),
        (
            c.a2a_payload_dtype != "same",
            f"--a2a-payload-dtype {c.a2a_payload_dtype}",
            "has none; leave it out, or use --impl fluid",
        ),
        (c.profile is not None, f"--profile {c.profile}", "has nothing to choose; leave it out, or use --impl fluid"),
        (c.cp > 1, f"--cp {c.cp}", "has no context parallelism without Transformer Engine; use --cp 1 or --impl fluid"),
        (c.plant_delay_ms > 0, "--plant-delay-ms", "cannot be delayed; leave it out, or use --impl fluid"),
        (c.overlap in ("dw", "full"), f"--overlap {c.overlap}", "has none; use --overlap off or --impl fluid"),
    )
    for given, flag, fix in missing:
        if given:
            raise ConfigError(f"{flag}: stock Megatron (--impl stock) {fix}")


def _check_profile(c: TrainConfig, path: str) -> None:
    """What a profile decides is not asked for beside it."""
    decided = (
        (c.overlap != "auto", f"--overlap {c.overlap}"),
        (c.carry_over, "--carry-over"),
        (c.dispatch != "plain", f"--dispatch {c.dispatch}"),
        (c.moe_chunks != "auto", f"--moe-chunks {c.moe_chunks}"),
        (c.moe_chunks_of != "auto", f"--moe-chunks-of {c.moe_chunks_of}"),
        (c.interleave_batches, "--interleave-batches"),
        (c.moe_cuda_graph is not False, "--moe-cuda-graph"),
        (c.attention_chunks != 1, f"--attention-chunks {c.attention_chunks}"),
        (c.a2a_transport != "collective", f"--a2a-transport {c.a2a_transport}"),
        (c.a2a_ctas != 0, f"--a2a-ctas {c.a2a_ctas}"),
    )
    for given, text in decided:
        if given:
            raise ConfigError(f"--profile {path}: it decides what {text} asks for; drop one of the two")


def _check_numbers(c: TrainConfig) -> None:
    counts = ("nproc", "ep", "tp", "pp", "vpp", "cp", "steps", "micro_batches", "checkpoint_every", "twin_every")
    for name in counts:
        if getattr(c, name) < 1:
            raise ConfigError(f"{flag_of(name)} {getattr(c, name)}: must be at least 1; use {flag_of(name)} 1")
    for name in ("warmup_steps", "plant_delay_ms", "weight_decay", "min_lr", "clip_grad", "seed"):
        if getattr(c, name) < 0:
            raise ConfigError(f"{flag_of(name)} {getattr(c, name)}: must not be negative; use {flag_of(name)} 0")
    for name in ("timeout", "lr"):
        if not getattr(c, name) > 0:
            raise ConfigError(f"{flag_of(name)} {getattr(c, name)}: must be above 0; leave it out for the default")
    if c.min_lr > c.lr:
        raise ConfigError(f"--min-lr {c.min_lr}: must be at most --lr {c.lr}; use --min-lr {c.lr / 10:g}")
    if c.decay_steps < 1:
        raise ConfigError(f"--lr-decay-steps {c.lr_decay_steps}: must be at least 1; leave it out for --steps")


def _check_parallel(c: TrainConfig) -> None:
    model_parallel = c.tp * c.pp * c.cp
    if c.nproc % model_parallel:
        raise ConfigError(
            f"--nproc {c.nproc}: must be a multiple of tp*pp*cp = {c.tp}*{c.pp}*{c.cp} = {model_parallel}; "
            f"use --nproc {_round_up(c.nproc, model_parallel)}"
        )
    # Expert parallelism takes the place of data and tensor parallelism inside one pipeline stage.
    ranks = c.nproc // c.pp
    if ranks % c.ep:
        fit = max(d for d in range(1, ranks + 1) if ranks % d == 0 and d <= max(c.ep, 1))
        raise ConfigError(
            f"--ep {c.ep}: must divide the {ranks} ranks of a pipeline stage (nproc / pp = {c.nproc} / {c.pp}); "
            f"use --ep {fit} or --nproc {_round_up(c.nproc, c.ep * c.pp)}"
        )
    _check_chunks(c)


def _check_chunks(c: TrainConfig) -> None:
    if c.vpp > 1 and c.pp == 1:
        raise ConfigError(f"--vpp {c.vpp}: needs a pipeline, and --pp is 1; use --pp 2 or leave --vpp out")
    if c.vpp > 1 and c.micro_batches % c.pp:
        raise ConfigError(
            f"--micro-batches {c.micro_batches}: must be a multiple of --pp {c.pp} with --vpp {c.vpp}, whose schedule "
            f"takes them in groups of that size; use --micro-batches {_round_up(c.micro_batches, c.pp)}"
        )


def _check_sizes(c: TrainConfig, p: Preset) -> None:
    rules = (
        ("ep", "experts", p.experts),
        ("tp", "heads", p.heads),
        ("tp", "kv_heads", p.kv_heads),
        ("tp", "hidden", p.hidden),
        ("tp", "ffn", p.ffn),
        ("tp", "seq_length", p.seq_length),
        ("pp", "layers", p.layers),
    )
    for name, figure, size in rules:
        parts = getattr(c, name)
        if size % parts:
            fit = max(d for d in range(1, parts + 1) if size % d == 0)
            raise ConfigError(
                f"--{name} {parts}: must divide {flag_of(figure)} {size} of preset {p.name}; use --{name} {fit}"
            )
    _check_context(c, p)
    chunks = c.pp * c.vpp
    if p.layers % chunks:
        raise ConfigError(
            f"--vpp {c.vpp}: pp*vpp = {c.pp}*{c.vpp} = {chunks} must divide --layers {p.layers} of preset {p.name}; "
            f"use --layers {_round_up(p.layers, chunks)} or leave --vpp out"
        )


def _check_context(c: TrainConfig, p: Preset) -> None:
    """With context parallelism each rank holds two chunks of every sequence."""
    if c.attention_chunks not in (1, "auto"):
        _check_attention_chunks(c, p)
    if c.cp == 1:
        return
    parts = 2 * c.cp * c.tp
    if p.seq_length % parts:
        raise ConfigError(
            f"--seq-length {p.seq_length}: must be a multiple of 2*cp*tp = 2*{c.cp}*{c.tp} = {parts}, because each "
            f"rank holds two chunks of a sequence; use --seq-length {_round_up(p.seq_length, parts)}"
        )


def _check_attention_chunks(c: TrainConfig, p: Preset) -> None:
    """The model refuses by itself, with more reasons, key heads that the chunks would cut."""
    flag = f"--attention-chunks {c.attention_chunks}"
    if not isinstance(c.attention_chunks, int):
        raise ConfigError(f"{flag}: a number, or auto; use --attention-chunks 1")
    if c.attention_chunks < 1:
        raise ConfigError(f"{flag}: must be at least 1; use --attention-chunks 1")
    if c.cp == 1:
        raise ConfigError(f"{flag}: with --cp 1 no heads are exchanged; use --cp 2 or leave --attention-chunks out")
    if p.mla is not None:
        raise ConfigError(f"{flag}: the multi-latent attention of preset {p.name} has none; leave it out")
    local, rest = divmod(p.heads, c.tp * c.cp)
    if rest:
        raise ConfigError(f"{flag}: --cp {c.cp} does not divide --heads {p.heads} / --tp {c.tp}; leave it out")
    if local % c.attention_chunks:
        fit = max(size for size in range(1, c.attention_chunks) if local % size == 0)
        raise ConfigError(
            f"{flag}: must divide the {local} heads of a rank (heads / tp / cp = {p.heads} / {c.tp} / {c.cp}); use "
            f"--attention-chunks {fit}"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
