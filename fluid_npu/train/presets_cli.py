"""`fluid-npu presets [NAME] [--json]`: model sizes, with the source of each figure."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

from fluid_npu.train.presets import FIGURES, PRESETS, Preset, PresetError, get_preset, table


def add_presets_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register `presets`; the parsed arguments carry ``func(args) -> exit code`` (0 ok, 2 unknown name)."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "presets",
        help="model sizes, with the source of each figure",
        description="Lists the model presets; with NAME, every figure of one and where it comes from.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(func=run_presets)
    return parser


def run_presets(args: argparse.Namespace) -> int:
    """Print the table or one preset."""
    if args.name is None:
        print(json.dumps(table(), indent=2) if args.json else format_table(table()))
        return 0
    try:
        preset = get_preset(args.name)
    except PresetError as error:
        print(f"fluid-npu presets: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_dict(preset), indent=2) if args.json else format_preset(preset))
    return 0


def as_dict(preset: Preset) -> dict[str, Any]:
    """One preset as plain data: ``figures`` maps a name to ``{"value", "source"}``."""
    return {
        "name": preset.name,
        "total_params": preset.total_params(),
        "active_params": preset.active_params(),
        "published": dict(preset.published),
        "published_source": preset.source.get("published"),
        "limits": preset.source.get("limits"),
        "figures": {
            name: {"value": _plain(getattr(preset, name)), "source": preset.source_of(name)} for name in FIGURES
        },
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """The overview: one line per preset."""
    head = ("name", "layers", "hidden", "moe_ffn", "heads", "experts", "topk", "total", "active", "source")
    lines = [head]
    for row in rows:
        cells = [str(row[name]) for name in ("name", "layers", "hidden", "moe_ffn")]
        cells += [f"{row['heads']}/{row['kv_heads']}", str(row["experts"]), str(row["topk"])]
        cells += [human(row["total_params"]), human(row["active_params"]), row["source"]]
        lines.append(tuple(cells))  # type: ignore[arg-type]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    text = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join([*text, "", "'fluid-npu presets NAME' shows every figure of one preset and its source."])


def format_preset(preset: Preset) -> str:
    """Every figure of one preset with its source."""
    lines = [f"{preset.name}: {human(preset.total_params())} parameters, {human(preset.active_params())} active"]
    if preset.published:
        sizes = ", ".join(f"{human(size)} {what}" for what, size in preset.published.items())
        lines.append(f"published: {sizes}; {preset.source.get('published')}")
    if "limits" in preset.source:
        lines.append(f"limits: {preset.source['limits']}")
    values = {name: str(_plain(getattr(preset, name))) for name in FIGURES}
    name_width, value_width = max(map(len, values)), min(max(map(len, values.values())), 14)
    lines += [
        f"  {name.ljust(name_width)}  {value.ljust(value_width)}  {preset.source_of(name)}"
        for name, value in values.items()
    ]
    return "\n".join(lines)


def human(count: float) -> str:
    """46702792704 -> '46.7B'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(int(count))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
