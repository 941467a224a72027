"""Model sizes by name, with the source of each figure.

A `Preset` says what the model is (layers, hidden, experts, router ...), not how it is trained. All presets are
SwiGLU decoders without biases in their MLPs. `Preset.cut(...)` makes a smaller one; every figure is checked.
Standard library only: the command line lists presets without loading torch.

What Megatron cannot express is said in `source["limits"]` (for example Phi-3.5-MoE's SparseMixer router).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

MEMORY = "from memory, not checked against the published file"
_OWN = "fluid_npu's own choice"


class PresetError(ValueError):
    """A preset name or a cut that cannot be; the text names flag, value, rule and fix."""


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-latent attention (DeepSeek). Sizes per head, ranks of the low-rank projections."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model. Sizes are counts of elements; `moe_ffn` and `shared_expert_ffn` are per layer.

    `head_dim` None means hidden / heads. `shared_expert_ffn` is the total over all shared experts.
    `pre_softmax` True: the router's softmax runs over all experts and the chosen weights are not renormalised.
    With `mla`, `qk_layernorm` normalises the latents.
    `source` maps a figure's name to where it comes from; `"*"` covers the figures not named.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    moe_ffn: int
    heads: int
    kv_heads: int
    experts: int
    topk: int
    vocab_size: int
    seq_length: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rotary_percent: float = 1.0
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_layernorm: bool = False
    shared_expert_ffn: int | None = None
    first_dense_layers: int = 0
    score_function: str = "softmax"
    expert_bias: bool = False
    router_groups: int | None = None
    group_topk: int | None = None
    topk_scaling_factor: float | None = None
    pre_softmax: bool = False
    mla: MLA | None = None
    aux_loss_coeff: float = 0.0
    tie_embeddings: bool = False
    micro_batch_size: int = 1
    published: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _check(self)

    @property
    def channels(self) -> int:
        """Elements of one attention head (query and key)."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def moe_layers(self) -> int:
        """Layers that hold experts."""
        return self.layers - self.first_dense_layers

    def source_of(self, figure: str) -> str:
        """Where a figure comes from."""
        if figure == "micro_batch_size":
            return self.source.get(figure, _OWN + ", not part of the model")
        return self.source.get(figure, self.source.get("*", MEMORY))

    def cut(self, **changes: Any) -> Preset:
        """This preset with other figures, e.g. ``cut(layers=2, experts=16)``; None leaves a figure alone.

        Raises PresetError naming the flag, the value, the rule it breaks and a fix.
        """
        wanted = {key: value for key, value in changes.items() if value is not None}
        for key, value in wanted.items():
            if key not in CUT_FIELDS:
                raise PresetError(
                    f"{flag_of(key)}: a preset has no figure {key!r} that can be cut; "
                    f"what can: {', '.join(flag_of(name) for name in CUT_FIELDS)}"
                )
            if isinstance(value, bool) or not isinstance(value, int):
                raise PresetError(f"{flag_of(key)} {value!r}: must be a whole number")
        changed = {key: value for key, value in wanted.items() if getattr(self, key) != value}
        if not changed:
            return self
        cut_from = f"cut from {self.name} by the caller"
        source = {**self.source, **dict.fromkeys(changed, cut_from)}
        return replace(self, **changed, published=MappingProxyType({}), source=MappingProxyType(source))

    def attention_params(self) -> int:
        """Parameters of one attention block, its two layer norms not counted."""
        if self.mla is not None:
            return _mla_params(self.hidden, self.heads, self.mla)
        q, kv = self.heads * self.channels, self.kv_heads * self.channels
        bias = q + 2 * kv if self.qkv_bias else 0
        qk_norm = 2 * self.channels if self.qk_layernorm else 0
        return self.hidden * (2 * q + 2 * kv) + bias + qk_norm

    def expert_params(self) -> int:
        """Parameters of one routed expert (SwiGLU: gate, up, down)."""
        return 3 * self.hidden * self.moe_ffn

    def total_params(self) -> int:
        """All parameters; the router's expert bias is a buffer and not counted, nor are MTP layers."""
        norm = self.hidden * (2 if self.normalization == "LayerNorm" else 1)
        dense_mlp = 3 * self.hidden * self.ffn
        shared = 3 * self.hidden * (self.shared_expert_ffn or 0)
        moe = self.experts * (self.expert_params() + self.hidden) + shared
        blocks = self.layers * (self.attention_params() + 2 * norm)
        blocks += self.first_dense_layers * dense_mlp + self.moe_layers * moe
        embeddings = self.vocab_size * self.hidden * (1 if self.tie_embeddings else 2)
        return blocks + norm + embeddings

    def embedding_params(self) -> int:
        """Parameters of the input embedding alone."""
        return self.vocab_size * self.hidden

    def active_params(self) -> int:
        """Parameters one token uses: all but the experts it is not routed to (embeddings are counted)."""
        return self.total_params() - self.moe_layers * (self.experts - self.topk) * self.expert_params()


def _mla_params(hidden: int, heads: int, mla: MLA) -> int:
    q_head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    q = hidden * heads * q_head
    if mla.q_lora_rank is not None:  # down projection, its norm, up projection
        q = mla.q_lora_rank * (hidden + 1 + heads * q_head)
    kv_down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
    kv_up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return q + kv_down + kv_up + heads * mla.v_head_dim * hidden


# What `cut` may change, in the order of the command line's help.
CUT_FIELDS = (
    *("layers", "hidden", "ffn", "moe_ffn", "heads", "kv_heads", "head_dim", "experts", "topk", "vocab_size"),
    *("seq_length", "shared_expert_ffn", "first_dense_layers", "router_groups", "group_topk", "micro_batch_size"),
)


def flag_of(figure: str) -> str:
    """The command-line flag of a figure: ``kv_heads`` -> ``--kv-heads``."""
    return "--" + figure.replace("_", "-")


def _check(p: Preset) -> None:
    """Raise PresetError for the first rule that `p` breaks."""
    for name in CUT_FIELDS:
        value = getattr(p, name)
        least = 0 if name == "first_dense_layers" else 1
        if value is not None and value < least:
            raise PresetError(f"{flag_of(name)} {value}: must be at least {least}")
    if p.head_dim is None and p.hidden % p.heads:
        fit = _nearest_divisor(p.hidden, p.heads)
        raise PresetError(f"--heads {p.heads}: must divide --hidden {p.hidden}; use --heads {fit} or give --head-dim")
    if p.heads % p.kv_heads:
        fit = _nearest_divisor(p.heads, p.kv_heads)
        raise PresetError(f"--kv-heads {p.kv_heads}: must divide --heads {p.heads}; use --kv-heads {fit}")
    if p.mla is None and p.channels % 2:
        raise PresetError(
            f"--head-dim {p.channels}: must be even for rotary positions; use --head-dim {p.channels + 1}"
        )
    if p.topk > p.experts:
        raise PresetError(f"--topk {p.topk}: must be at most --experts {p.experts}; use --topk {p.experts}")
    if p.first_dense_layers >= p.layers:
        raise PresetError(
            f"--layers {p.layers}: the first {p.first_dense_layers} are dense and at least one must hold experts; "
            f"use --layers {p.first_dense_layers + 1} or --first-dense-layers {p.layers - 1}"
        )
    if p.score_function not in ("softmax", "sigmoid"):
        raise PresetError(f"score_function {p.score_function!r}: must be 'softmax' or 'sigmoid'")
    if p.normalization not in ("RMSNorm", "LayerNorm"):
        raise PresetError(f"normalization {p.normalization!r}: must be 'RMSNorm' or 'LayerNorm'")
    _check_groups(p)


def _check_groups(p: Preset) -> None:
    if (p.router_groups is None) != (p.group_topk is None):
        raise PresetError("--router-groups and --group-topk: give both or neither")
    if p.router_groups is None or p.group_topk is None:
        return
    if p.experts % p.router_groups:
        fit = _nearest_divisor(p.experts, p.router_groups)
        raise PresetError(
            f"--router-groups {p.router_groups}: must divide --experts {p.experts}; use --router-groups {fit}"
        )
    if p.group_topk > p.router_groups:
        raise PresetError(
            f"--group-topk {p.group_topk}: must be at most --router-groups {p.router_groups}; "
            f"use --group-topk {p.router_groups}"
        )
    reachable = p.group_topk * (p.experts // p.router_groups)
    if p.topk > reachable:
        raise PresetError(
            f"--topk {p.topk}: only {reachable} experts are reachable ({p.group_topk} of {p.router_groups} groups "
            f"of --experts {p.experts}); use --topk {reachable} or --router-groups 1 --group-topk 1"
        )
    if p.topk % p.group_topk:
        # Megatron ranks groups by the sum of their best topk / group_topk experts.
        raise PresetError(
            f"--topk {p.topk}: must be a multiple of --group-topk {p.group_topk}; "
            f"use --topk {max(p.topk // p.group_topk, 1) * p.group_topk}"
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: (abs(d - wanted), d))


def _from(rest: str, **figures: str) -> Mapping[str, str]:
    return MappingProxyType({"*": rest, **figures})


def _published(total: float, active: float) -> Mapping[str, float]:
    """Published sizes in parameters, as the model's authors round them."""
    return MappingProxyType({"total": total, "active": active})


_RECIPE_4K = "4,096 tokens: the length of the 4k pre-training recipes; the model itself reads longer text"

_ALL = (
    Preset(
        name="mixtral-tiny",
        layers=4,
        hidden=256,
        ffn=896,
        moe_ffn=896,
        heads=8,
        kv_heads=2,
        experts=8,
        topk=2,
        vocab_size=4096,
        seq_length=256,
        aux_loss_coeff=0.02,
        micro_batch_size=4,
        source=_from(
            _OWN + ": Mixtral's architecture, small enough for two CPU cores",
            rope_theta=_OWN + ": 10,000 suits 256 tokens (Mixtral has 1,000,000 for 32,768)",
            aux_loss_coeff="as mixtral-8x7b",
        ),
    ),
    Preset(
        name="mixtral-8x7b",
        layers=32,
        hidden=4096,
        ffn=14336,
        moe_ffn=14336,
        heads=32,
        kv_heads=8,
        experts=8,
        topk=2,
        vocab_size=32000,
        seq_length=32768,
        rope_theta=1e6,
        aux_loss_coeff=0.02,
        published=_published(46.7e9, 12.9e9),
        source=_from(
            "config.json of mistralai/Mixtral-8x7B-v0.1, as quoted in huggingface/candle models/mixtral.rs (v0_1_8x7b)",
            heads="a MixtralConfig of mistralai/Mixtral-8x7B-Instruct-v0.1 printed in public code",
            aux_loss_coeff="MindSpeed-LLM 2.1.0 pretrain_mixtral_8x7b_ptd.sh",
            published="mistral.ai announcement: 46.7B total, 12.9B per token (" + MEMORY + ")",
        ),
    ),
    Preset(
        name="mixtral-8x22b",
        layers=56,
        hidden=6144,
        ffn=16384,
        moe_ffn=16384,
        heads=48,
        kv_heads=8,
        experts=8,
        topk=2,
        vocab_size=32000,
        seq_length=65536,
        rope_theta=1e6,
        aux_loss_coeff=0.001,
        published=_published(141e9, 39e9),
        source=_from(
            "AI-Hypercomputer/maxtext configs/models/mixtral-8x22b.yml",
            vocab_size="Cerebras model zoo config of mistral-community/Mixtral-8x22B-v0.1 (v0.3 has 32,768)",
            seq_length="the same Cerebras config: 65,536 positions",
            aux_loss_coeff="MindSpeed-LLM 2.1.0 pretrain_mixtral_8x22b_32k_ptd.sh",
            published="mistral.ai announcement: 141B total, 39B per token (" + MEMORY + ")",
        ),
    ),
    Preset(
        name="deepseek-v2-lite",
        layers=27,
        hidden=2048,
        ffn=10944,
        moe_ffn=1408,
        heads=16,
        kv_heads=16,
        experts=64,
        topk=6,
        vocab_size=102400,
        seq_length=4096,
        norm_epsilon=1e-6,
        qk_layernorm=True,
        shared_expert_ffn=2816,
        first_dense_layers=1,
        topk_scaling_factor=1.0,
        pre_softmax=True,
        mla=MLA(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        aux_loss_coeff=0.001,
        published=_published(15.7e9, 2.4e9),
        source=_from(
            "AI-Hypercomputer/maxtext configs/models/deepseek2-16b.yml (quotes DeepSeek-V2-Lite)",
            seq_length=_RECIPE_4K,
            shared_expert_ffn="two shared experts of 1,408 (the same file)",
            pre_softmax="norm_topk_prob false in config.json of deepseek-ai/DeepSeek-V2-Lite (" + MEMORY + ")",
            aux_loss_coeff="aux_loss_alpha of config.json of deepseek-ai/DeepSeek-V2-Lite (" + MEMORY + ")",
            published="DeepSeek-V2 paper: 15.7B total, 2.4B per token, embeddings not counted (" + MEMORY + ")",
            qk_layernorm="the latent of k and v is normalised: modeling_deepseek (" + MEMORY + ")",
            limits="YaRN scaling of the positions beyond 4,096 is not part of the preset",
        ),
    ),
    Preset(
        name="deepseek-v3",
        layers=61,
        hidden=7168,
        ffn=18432,
        moe_ffn=2048,
        heads=128,
        kv_heads=128,
        experts=256,
        topk=8,
        vocab_size=129280,
        seq_length=4096,
        norm_epsilon=1e-6,
        qk_layernorm=True,
        shared_expert_ffn=2048,
        first_dense_layers=3,
        score_function="sigmoid",
        expert_bias=True,
        router_groups=8,
        group_topk=4,
        topk_scaling_factor=2.5,
        mla=MLA(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        aux_loss_coeff=1e-4,
        published=_published(671e9, 37e9),
        source=_from(
            "zyzshishui/slime scripts/models/deepseek-v3.sh (Megatron flags of DeepSeek-V3)",
            pre_softmax="has no meaning with a sigmoid router",
            seq_length="MindSpeed-LLM deepseek3 671b 4k script",
            aux_loss_coeff="DeepSeek-V3 paper: sequence-wise balance factor 0.0001 (" + MEMORY + ")",
            published="DeepSeek-V3 paper: 671B total, 37B per token (" + MEMORY + ")",
            limits="the multi-token-prediction layer and YaRN scaling are not part of the preset",
        ),
    ),
    Preset(
        name="qwen3-30b-a3b",
        layers=48,
        hidden=2048,
        ffn=6144,
        moe_ffn=768,
        heads=32,
        kv_heads=4,
        head_dim=128,
        experts=128,
        topk=8,
        vocab_size=151936,
        seq_length=4096,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        qk_layernorm=True,
        aux_loss_coeff=0.001,
        published=_published(30.5e9, 3.3e9),
        source=_from(
            "zyzshishui/slime scripts/models/qwen3-30B-A3B.sh (Megatron flags of Qwen3-30B-A3B)",
            seq_length=_RECIPE_4K,
            pre_softmax="norm_topk_prob true in public copies of the config.json: same as a softmax over the chosen",
            aux_loss_coeff="router_aux_loss_coef of config.json of Qwen/Qwen3-30B-A3B (" + MEMORY + ")",
            published="model card: 30.5B total, 3.3B per token (" + MEMORY + ")",
        ),
    ),
    Preset(
        name="qwen3-235b-a22b",
        layers=94,
        hidden=4096,
        ffn=12288,
        moe_ffn=1536,
        heads=64,
        kv_heads=4,
        head_dim=128,
        experts=128,
        topk=8,
        vocab_size=151936,
        seq_length=4096,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        qk_layernorm=True,
        aux_loss_coeff=0.001,
        published=_published(235e9, 22e9),
        source=_from(
            "zyzshishui/slime scripts/models/qwen3-235B-A22B.sh (Megatron flags of Qwen3-235B-A22B)",
            seq_length=_RECIPE_4K,
            pre_softmax="norm_topk_prob true (" + MEMORY + "): same as a softmax over the chosen",
            aux_loss_coeff="router_aux_loss_coef of config.json of Qwen/Qwen3-235B-A22B (" + MEMORY + ")",
            published="model card: 235B total, 22B per token (" + MEMORY + ")",
        ),
    ),
    Preset(
        name="dbrx",
        layers=40,
        hidden=6144,
        ffn=10752,
        moe_ffn=10752,
        heads=48,
        kv_heads=8,
        experts=16,
        topk=4,
        vocab_size=100352,
        seq_length=32768,
        rope_theta=5e5,
        normalization="LayerNorm",
        aux_loss_coeff=0.05,
        published=_published(132e9, 36e9),
        source=_from(
            "a published copy of config.json of databricks/dbrx-instruct (d_model, n_heads, n_layers, ffn_config ...)",
            vocab_size="transformers' DbrxConfig as copied by public code: 100,352",
            normalization="LayerNorm without bias in transformers' modeling_dbrx (" + MEMORY + ")",
            norm_epsilon=MEMORY,
            pre_softmax="moe_normalize_expert_weights 1 in the same config.json: weights sum to one",
            published="model card: 132B total, 36B per token, as quoted by NVIDIA's API reference",
            limits="clip_qkv 8 is left out; Megatron's LayerNorm has a bias",
        ),
    ),
    Preset(
        name="phi-3.5-moe",
        layers=32,
        hidden=4096,
        ffn=6400,
        moe_ffn=6400,
        heads=32,
        kv_heads=8,
        experts=16,
        topk=2,
        vocab_size=32064,
        seq_length=4096,
        rope_theta=10000.0,
        normalization="LayerNorm",
        qkv_bias=True,
        pre_softmax=True,
        aux_loss_coeff=0.001,
        published=_published(41.9e9, 6.6e9),
        source=_from(
            "transformers' PhimoeConfig, whose defaults are microsoft/Phi-3.5-MoE-instruct",
            seq_length=_RECIPE_4K,
            rope_theta="config.json of microsoft/Phi-3.5-MoE-instruct (" + MEMORY + "; the class default is 1,000,000)",
            normalization="nn.LayerNorm in modeling_phimoe (" + MEMORY + ")",
            qkv_bias="attention_bias true in config.json of microsoft/Phi-3.5-MoE-instruct, as listed by a tutorial",
            published="model card: 16 x 3.8B, 41.9B total, 6.6B per token, as quoted by Azure's model catalogue",
            limits="the SparseMixer router is a plain top-2 here; long-context RoPE scaling, the biases of the "
            "output projection and of the head are left out",
        ),
    ),
    Preset(
        name="olmoe-1b-7b",
        layers=16,
        hidden=2048,
        ffn=1024,
        moe_ffn=1024,
        heads=16,
        kv_heads=16,
        experts=64,
        topk=8,
        vocab_size=50304,
        seq_length=4096,
        rope_theta=10000.0,
        qk_layernorm=True,
        pre_softmax=True,
        aux_loss_coeff=0.01,
        published=_published(6.9e9, 1.3e9),
        source=_from(
            "config.json of allenai/OLMoE-1B-7B-0924, as quoted in Megatron-Bridge's test of its OLMoE bridge",
            pre_softmax="norm_topk_prob false in the checkpoint's config.json, as quoted in public code",
            published="OLMoE paper: 6.9B total, 1.3B per token (" + MEMORY + ")",
            limits="the norm of q and k spans all heads in OLMoE, one head in Megatron",
        ),
    ),
    Preset(
        name="glm-4.5-air",
        layers=46,
        hidden=4096,
        ffn=10944,
        moe_ffn=1408,
        heads=96,
        kv_heads=8,
        head_dim=128,
        experts=128,
        topk=8,
        vocab_size=151552,
        seq_length=4096,
        rope_theta=1e6,
        rotary_percent=0.5,
        qkv_bias=True,
        shared_expert_ffn=1408,
        first_dense_layers=1,
        score_function="sigmoid",
        expert_bias=True,
        router_groups=1,
        group_topk=1,
        topk_scaling_factor=1.0,
        aux_loss_coeff=0.001,
        published=_published(106e9, 12e9),
        source=_from(
            "config.json of zai-org/GLM-4.5-Air, as quoted in Megatron-Bridge's GLM-4.5 test and in a GLM-4-MoE "
            "conversion script (CONFIG_100B)",
            layers="the same conversion script, and a public profile of GLM-4.5-Air: 46, the first dense",
            seq_length=_RECIPE_4K,
            rope_theta="config.json of zai-org/GLM-4.5-Air (" + MEMORY + "; the conversion script has 10,000)",
            score_function="transformers' Glm4Moe router (" + MEMORY + ")",
            expert_bias="e_score_correction_bias in transformers' Glm4Moe router (" + MEMORY + ")",
            router_groups="n_group 1 (GLM-4-MoE conversion script)",
            group_topk="topk_group 1 (GLM-4-MoE conversion script)",
            topk_scaling_factor="routed_scaling_factor 1.0 (GLM-4-MoE conversion script)",
            aux_loss_coeff="router_aux_loss_coef 0.001 (GLM-4-MoE conversion script)",
            published="model card: 106B total, 12B per token, embeddings and head not counted (" + MEMORY + ")",
            limits="the multi-token-prediction layer is not part of the preset",
        ),
    ),
    Preset(
        name="h64",
        layers=2,
        hidden=64,
        ffn=128,
        moe_ffn=128,
        heads=4,
        kv_heads=4,
        experts=8,
        topk=2,
        vocab_size=256,
        seq_length=64,
        micro_batch_size=4,
        source=_from(_OWN + ": the overhead-bound case of 'fluid-npu bench train-step'"),
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises PresetError naming --preset, the value and what there is."""
    if name not in PRESETS:
        raise PresetError(f"--preset {name!r}: there is no such preset; choose from: {', '.join(PRESETS)}")
    return PRESETS[name]


# The figures that the table and `fluid-npu presets NAME` show.
FIGURES = tuple(f.name for f in fields(Preset) if f.name not in ("name", "source", "published"))


def table() -> list[dict[str, Any]]:
    """One row per preset: name, sizes, total and active parameters (counts), and the source of the figures."""
    short = ("layers", "hidden", "moe_ffn", "heads", "kv_heads", "experts", "topk", "vocab_size", "seq_length")
    return [
        {
            "name": preset.name,
            **{name: getattr(preset, name) for name in short},
            "total_params": preset.total_params(),
            "active_params": preset.active_params(),
            "source": preset.source_of("*"),
        }
        for preset in PRESETS.values()
    ]
