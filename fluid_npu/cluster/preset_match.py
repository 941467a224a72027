"""Whether Megatron's flags describe the model of a preset: a script of a model must not drift from it."""

from __future__ import annotations

from fluid_npu.cluster.plan import Plan
from fluid_npu.cluster.problem import WARNING, Problem
from fluid_npu.train.presets import Preset, flag_of


def differences(plan: Plan, preset: Preset) -> list[Problem]:
    """Where the flags describe another model than the preset of that name; a warning, since one may want to."""
    mine, found = plan.model, []
    for name in _COMPARED:
        ours, theirs = getattr(mine, name), getattr(preset, name)
        if name == "head_dim":
            ours, theirs = mine.channels, preset.channels
        if ours != theirs:
            flag = _MEGATRON.get(name, flag_of(name))
            rule = f"preset {preset.name} has {theirs}: this is another model"
            fix = "use the preset's value, or --preset none"
            found.append(Problem(kind="preset", flag=flag, value=str(ours), rule=rule, fix=fix, level=WARNING))
    return found


_COMPARED = (
    *("layers", "hidden", "ffn", "moe_ffn", "heads", "kv_heads", "head_dim", "experts", "topk", "rope_theta"),
    *("normalization", "norm_epsilon", "qkv_bias", "qk_layernorm", "shared_expert_ffn", "first_dense_layers"),
    *("score_function", "expert_bias", "router_groups", "group_topk", "topk_scaling_factor", "pre_softmax", "mla"),
    *("aux_loss_coeff", "tie_embeddings", "vocab_size"),
)
_MEGATRON = {
    "layers": "--num-layers",
    "hidden": "--hidden-size",
    "ffn": "--ffn-hidden-size",
    "moe_ffn": "--moe-ffn-hidden-size",
    "heads": "--num-attention-heads",
    "kv_heads": "--num-query-groups",
    "head_dim": "--kv-channels",
    "experts": "--num-experts",
    "topk": "--moe-router-topk",
    "rope_theta": "--rotary-base",
    "shared_expert_ffn": "--moe-shared-expert-intermediate-size",
    "first_dense_layers": "--moe-layer-freq",
    "mla": "--multi-latent-attention",
    "qkv_bias": "--add-qkv-bias",
    "tie_embeddings": "--untie-embeddings-and-output-weights",
    **{
        name: f"--moe-router-{name.replace('_', '-')}"
        for name in ("score_function", "group_topk", "topk_scaling_factor", "pre_softmax")
    },
    "expert_bias": "--moe-router-enable-expert-bias",
    "router_groups": "--moe-router-num-groups",
    "aux_loss_coeff": "--moe-aux-loss-coeff",
}
