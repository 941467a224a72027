"""What a job is: machines, parallel sizes, the model, and which layers each pipeline stage holds.

Sizes are read from Megatron's flags; nothing is checked here, so that ``validate`` can name what is wrong.
Divisions that do not come out even are rounded up.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property

from fluid_npu.cluster.flags import Arguments
from fluid_npu.train.presets import MLA, Preset


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of one kind. ``memory_gib`` is of one device (an NPU, or one die of an A3)."""

    nodes: int = 1
    per_node: int = 8
    node_rank: int = 0
    master_addr: str = "localhost"
    master_port: int = 6000
    memory_gib: float = 64.0
    imbalance: float = 1.2
    """Rows of the busiest rank over the mean: routing is not even."""

    @property
    def world(self) -> int:
        """Processes, one for each device."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Plan:
    """A job on a cluster. Names follow Megatron: dp counts ranks with other samples, edp copies of an expert."""

    cluster: Cluster
    args: Arguments
    vocab_size: int = 1
    """Where --vocab-size is not given: the tokenizer's, which only Megatron reads."""

    def size(self, flag: str, default: int = 1) -> int:
        """A whole number of a flag; never below 1, so that divisions are defined."""
        value = self.args.get(flag, default)
        return value if isinstance(value, int) and value > 0 else 1

    @property
    def tp(self) -> int:
        return self.size("--tensor-model-parallel-size")

    @property
    def pp(self) -> int:
        return self.size("--pipeline-model-parallel-size")

    @property
    def cp(self) -> int:
        return self.size("--context-parallel-size")

    @property
    def ep(self) -> int:
        return self.size("--expert-model-parallel-size")

    @property
    def etp(self) -> int:
        """Megatron takes --tensor-model-parallel-size where --expert-tensor-parallel-size is not given."""
        return self.size("--expert-tensor-parallel-size", self.tp)

    @property
    def dp(self) -> int:
        return max(1, self.cluster.world // (self.tp * self.pp * self.cp))

    @property
    def edp(self) -> int:
        return max(1, self.cluster.world // (self.etp * self.ep * self.pp))

    @property
    def micro_batch(self) -> int:
        return self.size("--micro-batch-size")

    @property
    def global_batch(self) -> int:
        return self.size("--global-batch-size", self.micro_batch * self.dp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on one rank."""
        return max(1, self.global_batch // (self.micro_batch * self.dp))

    @property
    def sequence(self) -> int:
        return self.size("--seq-length")

    @property
    def overlap(self) -> str:
        """The value of --fluid-overlap; 'off' where only stock MoE layers are left."""
        chosen = str(self.args.get("--fluid-overlap", "auto"))
        return "off" if chosen == "auto" and "--moe-grouped-gemm" not in self.args else chosen

    @cached_property
    def model(self) -> Preset:
        """The model that the flags describe. Raises PresetError or ValueError for figures that cannot be."""
        return model_of(self.args, self.vocab_size)

    @property
    def split_layers(self) -> int:
        """Layers that are dealt to the stages: the embedding and the loss may each count as one."""
        extra = sum(f"--account-for-{what}-in-pipeline-split" in self.args for what in ("embedding", "loss"))
        return self.size("--num-layers") + extra

    @property
    def vpp(self) -> int:
        """Parts of the model on one rank."""
        if "--num-virtual-stages-per-pipeline-rank" in self.args:
            return self.size("--num-virtual-stages-per-pipeline-rank")
        if "--num-layers-per-virtual-pipeline-stage" in self.args:
            per_rank = self.split_layers // self.pp
            return max(1, per_rank // self.size("--num-layers-per-virtual-pipeline-stage"))
        return 1

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Numbers from 0 of the layers that each pipeline rank holds, all its virtual stages together."""
        sizes = self._layers_per_stage()
        parts = [[size // self.vpp + (chunk < size % self.vpp) for size in sizes] for chunk in range(self.vpp)]
        held: list[list[int]] = [[] for _ in range(self.pp)]
        first, embedding = 0, "--account-for-embedding-in-pipeline-split" in self.args
        total = self.size("--num-layers")
        for chunk in range(self.vpp):
            for rank in range(self.pp):
                count = parts[chunk][rank] - (embedding and chunk == 0 and rank == 0)
                held[rank] += range(first, min(first + count, total))
                first += count
        return tuple(tuple(layers) for layers in held)

    def _layers_per_stage(self) -> list[int]:
        first = self.args.get("--decoder-first-pipeline-num-layers")
        last = self.args.get("--decoder-last-pipeline-num-layers")
        ends = (first is not None) + (last is not None)
        middle = self.pp - ends
        rest = self.split_layers - (first or 0) - (last or 0)
        even = [rest // middle + (index < rest % middle) for index in range(middle)] if middle > 0 else []
        return [*([first] if first is not None else []), *even, *([last] if last is not None else [])]


def model_of(args: Arguments, vocab_size: int = 1) -> Preset:
    """A Preset from Megatron's flags, with Megatron's defaults. Raises PresetError or ValueError."""
    heads = args.get("--num-attention-heads", 1)
    hidden = args.get("--hidden-size", 1)
    ffn = args.get("--ffn-hidden-size", 4 * hidden)
    return Preset(
        name="the flags",
        layers=args.get("--num-layers", 1),
        hidden=hidden,
        ffn=ffn,
        moe_ffn=args.get("--moe-ffn-hidden-size", ffn),
        heads=heads,
        kv_heads=args.get("--num-query-groups", 1) if "--group-query-attention" in args else heads,
        head_dim=args.get("--kv-channels"),
        experts=args.get("--num-experts", 1),
        topk=args.get("--moe-router-topk", 2),
        vocab_size=args.get("--vocab-size", vocab_size),
        seq_length=args.get("--seq-length", 1),
        rope_theta=float(args.get("--rotary-base", 10000)),
        rotary_percent=args.get("--rotary-percent", 1.0),
        normalization=args.get("--normalization", "LayerNorm"),
        norm_epsilon=args.get("--norm-epsilon", 1e-5),
        qkv_bias="--add-qkv-bias" in args,
        qk_layernorm="--qk-layernorm" in args,
        shared_expert_ffn=args.get("--moe-shared-expert-intermediate-size"),
        first_dense_layers=first_dense_layers(args.get("--moe-layer-freq", "1"), args.get("--num-layers", 1)),
        score_function=args.get("--moe-router-score-function", "softmax"),
        expert_bias="--moe-router-enable-expert-bias" in args,
        router_groups=args.get("--moe-router-num-groups"),
        group_topk=args.get("--moe-router-group-topk"),
        topk_scaling_factor=args.get("--moe-router-topk-scaling-factor"),
        pre_softmax="--moe-router-pre-softmax" in args,
        mla=_mla(args) if "--multi-latent-attention" in args else None,
        aux_loss_coeff=_single(args.get("--moe-aux-loss-coeff", 0.0)),
        tie_embeddings="--untie-embeddings-and-output-weights" not in args,
        micro_batch_size=args.get("--micro-batch-size", 1),
    )


def _single(value: float | list[float]) -> float:
    """--moe-aux-loss-coeff is one number in 0.12 and a list later."""
    return value[0] if isinstance(value, list) else value


def _mla(args: Arguments) -> MLA:
    return MLA(
        q_lora_rank=args.get("--q-lora-rank"),
        kv_lora_rank=args.get("--kv-lora-rank", 32),
        qk_nope_head_dim=args.get("--qk-head-dim", 128),
        qk_rope_head_dim=args.get("--qk-pos-emb-head-dim", 64),
        v_head_dim=args.get("--v-head-dim", 128),
    )


def first_dense_layers(pattern: str, layers: int) -> int:
    """Dense layers before the first with experts, from --moe-layer-freq such as '([0]*3+[1]*58)' or '1'.

    Raises ValueError for other patterns: the estimate knows only dense layers at the start.
    """
    try:
        held = _list_of(ast.parse(pattern, mode="eval").body)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"--moe-layer-freq {pattern}: not a whole number or a list of 0 and 1; {error}") from error
    if held == 1:
        return 0
    if not isinstance(held, list) or len(held) != layers or sorted(held) != held or not set(held) <= {0, 1}:
        raise ValueError(
            f"--moe-layer-freq {pattern}: must name all {layers} layers of --num-layers, dense ones (0) first; "
            f"write '([0]*1+[1]*{layers - 1})'"
        )
    return held.count(0)


def _list_of(node: ast.expr) -> int | list[int]:
    """A whole number, a list of them, or + and * of these; nothing else is evaluated."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        items = [_list_of(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return items  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _list_of(node.left), _list_of(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right  # type: ignore[operator]
    raise ValueError(f"{ast.unparse(node)!r} is neither")
