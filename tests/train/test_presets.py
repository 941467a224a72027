"""Preset figures against published sizes, the rules of cuts, and `fluid-npu presets`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fluid_npu.train.presets import FIGURES, PRESETS, PresetError, get_preset, table
from fluid_npu.train.presets_cli import add_presets_parser

pytestmark = pytest.mark.host

# Published by the authors, in billions: total, active per token, what the active figure leaves out.
# DeepSeek-V2's 2.4B is a rounded figure without the input embedding; GLM's 12B is without embedding and head.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9, 0),
    "mixtral-8x22b": (141, 39, 0),
    "deepseek-v2-lite": (15.7, 2.4, 1),
    "deepseek-v3": (671, 37, 0),
    "qwen3-30b-a3b": (30.5, 3.3, 0),
    "qwen3-235b-a22b": (235, 22, 0),
    "dbrx": (132, 36, 0),
    "phi-3.5-moe": (41.9, 6.6, 0),
    "olmoe-1b-7b": (6.9, 1.3, 0),
    "glm-4.5-air": (106, 12, 2),
}


def presets_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_presets_parser(parser.add_subparsers())
    args = parser.parse_args(["presets", *words])
    return int(args.func(args))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_agree_with_the_published_ones(name: str) -> None:
    preset = get_preset(name)
    total, active, left_out = PUBLISHED[name]
    assert preset.total_params() / 1e9 == pytest.approx(total, rel=0.02)
    counted = (preset.active_params() - left_out * preset.embedding_params()) / 1e9
    assert counted == pytest.approx(active, rel=0.025 if name == "deepseek-v2-lite" else 0.02)
    assert preset.published == {"total": total * 1e9, "active": active * 1e9}


def test_glm_air_agrees_to_the_last_parameter_with_an_independent_count() -> None:
    assert get_preset("glm-4.5-air").total_params() == 106_852_245_504  # a public fine-tuning benchmark's constant


def test_mixtral_tiny_is_the_size_that_the_quickstart_promises() -> None:
    tiny = get_preset("mixtral-tiny")
    sizes = (tiny.hidden, tiny.moe_ffn, tiny.layers, tiny.heads, tiny.kv_heads, tiny.experts, tiny.topk)
    assert sizes == (256, 896, 4, 8, 2, 8, 2)
    assert (tiny.seq_length, tiny.normalization, tiny.vocab_size) == (256, "RMSNorm", 4096)
    # Counted by hand: attention 2*256*256 + 2*256*64, experts 8*3*256*896, router, norms, embeddings.
    layer = 2 * 256 * 256 + 2 * 256 * 64 + 8 * 3 * 256 * 896 + 8 * 256 + 2 * 256
    assert tiny.total_params() == 4 * layer + 256 + 2 * 4096 * 256


def test_bench_case_h64() -> None:
    h64 = get_preset("h64")
    sizes = (h64.layers, h64.hidden, h64.moe_ffn, h64.heads, h64.experts, h64.topk, h64.vocab_size)
    assert sizes == (2, 64, 128, 4, 8, 2, 256)
    assert (h64.seq_length, h64.micro_batch_size) == (64, 4)


def test_every_figure_has_a_source() -> None:
    for preset in PRESETS.values():
        assert all(preset.source_of(figure) for figure in FIGURES), preset.name
        named = set(preset.source) - {"*", "published", "limits"}
        assert named <= set(FIGURES), f"{preset.name}: sources of unknown figures {named - set(FIGURES)}"
        assert bool(preset.published) == ("published" in preset.source)


def test_unknown_name_tells_flag_value_and_choices() -> None:
    with pytest.raises(PresetError, match="--preset 'mixtral': .*choose from: mixtral-tiny, mixtral-8x7b"):
        get_preset("mixtral")


def test_cut_changes_what_is_given_and_says_so() -> None:
    cut = get_preset("deepseek-v3").cut(layers=4, experts=16, hidden=None)
    assert (cut.layers, cut.experts, cut.hidden) == (4, 16, 7168)
    assert cut.source_of("layers") == "cut from deepseek-v3 by the caller"
    assert "slime" in cut.source_of("hidden")
    assert not cut.published
    assert get_preset("h64").cut(layers=2) is get_preset("h64")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral-8x7b", {"hidden": 100}, r"--heads 32: must divide --hidden 100; use --heads 25"),
        ("mixtral-8x7b", {"heads": 4, "hidden": 512}, r"--kv-heads 8: must divide --heads 4; use --kv-heads 4"),
        ("mixtral-8x7b", {"experts": 1}, r"--topk 2: must be at most --experts 1; use --topk 1"),
        ("mixtral-8x7b", {"layers": 0}, r"--layers 0: must be at least 1"),
        ("mixtral-8x7b", {"layers": 2.5}, r"--layers 2.5: must be a whole number"),
        ("mixtral-8x7b", {"name": 3}, r"--name: a preset has no figure 'name' that can be cut"),
        ("h64", {"heads": 64, "kv_heads": 64}, r"--head-dim 1: must be even for rotary positions; use --head-dim 2"),
        ("deepseek-v3", {"layers": 3}, r"--layers 3: the first 3 are dense.*--layers 4 or --first-dense-layers 2"),
        ("deepseek-v3", {"experts": 12}, r"--router-groups 8: must divide --experts 12; use --router-groups 6"),
        ("deepseek-v3", {"router_groups": 2}, r"--group-topk 4: must be at most --router-groups 2"),
        ("deepseek-v3", {"experts": 8}, r"--topk 8: only 4 experts are reachable .* use --topk 4"),
        ("deepseek-v3", {"topk": 6}, r"--topk 6: must be a multiple of --group-topk 4; use --topk 4"),
        ("h64", {"router_groups": 2}, r"--router-groups and --group-topk: give both or neither"),
    ],
)
def test_impossible_cut_names_flag_value_rule_and_fix(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        get_preset(name).cut(**changes)


def test_table_has_a_row_for_each_preset() -> None:
    rows = table()
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(row["active_params"] < row["total_params"] and row["source"] for row in rows)


def test_command_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets_command() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert presets_command("--json") == 0
    assert json.loads(capsys.readouterr().out) == table()


def test_command_shows_each_figure_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets_command("dbrx") == 0
    out = capsys.readouterr().out
    assert "rope_theta" in out
    assert "config.json of databricks/dbrx-instruct" in out
    assert "limits:" in out
    assert presets_command("deepseek-v3", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["figures"]["mla"]["value"]["q_lora_rank"] == 1536
    assert shown["figures"]["topk"] == {"value": 8, "source": get_preset("deepseek-v3").source_of("topk")}


def test_command_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert presets_command("gpt-2") == 2
    assert "--preset 'gpt-2'" in capsys.readouterr().err


def test_listing_presets_loads_no_torch() -> None:
    code = "import sys, fluid_npu.train.presets_cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def megatron_counts(cuts: dict[str, dict[str, int]]) -> dict[str, int]:
    """Parameters of the real GPTModel of each cut preset."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    counts = {}
    for name, cut in cuts.items():
        p = get_preset(name).cut(**cut)
        config = TransformerConfig(
            num_layers=p.layers,
            hidden_size=p.hidden,
            num_attention_heads=p.heads,
            num_query_groups=p.kv_heads,
            kv_channels=p.channels,
            ffn_hidden_size=p.ffn,
            moe_ffn_hidden_size=p.moe_ffn,
            num_moe_experts=p.experts,
            moe_router_topk=p.topk,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            add_qkv_bias=p.qkv_bias,
            normalization=p.normalization,
            qk_layernorm=p.qk_layernorm,
            use_cpu_initialization=True,
        )
        spec = get_gpt_layer_local_spec(p.experts, False, p.qk_layernorm, normalization=p.normalization)
        model = GPTModel(config, spec, p.vocab_size, p.seq_length, position_embedding_type="rope")
        counts[name] = sum(weight.numel() for weight in model.parameters())
        assert not model.share_embeddings_and_output_weights
    return counts


def test_total_agrees_with_the_real_megatron_model(run_ranks: Callable[..., list[Any]]) -> None:
    small = {"layers": 2, "hidden": 128, "moe_ffn": 64, "experts": 8, "vocab_size": 512}
    cuts = {
        "mixtral-tiny": {},
        "h64": {},
        "qwen3-30b-a3b": small,
        "phi-3.5-moe": {**small, "heads": 8, "kv_heads": 2},
    }
    counted = run_ranks(1, megatron_counts, cuts, sizes={})[0]
    assert counted == {name: get_preset(name).cut(**cut).total_params() for name, cut in cuts.items()}
