"""A run's summary for people. Keys that are missing or None are left out or said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LABEL = 22


def format_summary(summary: Mapping[str, Any]) -> str:
    """Plain text from the keys of summary.json.

    Reads loss_first, loss_last, unigram_entropy (nats per token), steps, step_ms_median, tokens_per_s, a2a_ms,
    a2a_bytes and a2a_plain_bytes (of a step and rank), hidden_ms (ms per step; a signed difference), hidden_fraction
    (of what dW could cover, or None where nothing was overlapped), peak_memory_mb, device, versions (mapping), overlap
    (mapping or pair of value and reason), generated, out.
    """
    lines = ["Training finished" if summary.get("loss_last") is not None else "Training ended without a loss"]
    for label, text in (
        ("loss", _loss(summary)),
        ("speed", _speed(summary)),
        ("AllToAll", _alltoall(summary)),
        ("bytes", _bytes(summary)),
        ("overlap", _overlap(summary)),
        ("peak memory", _figure(summary, "peak_memory_mb", "{:,.0f} MB on the fullest rank")),
        ("device", _text(summary, "device")),
        ("versions", _versions(summary)),
        ("the model writes", _generated(summary)),
        ("outputs", _text(summary, "out")),
    ):
        if text:
            lines.append(f"  {label.ljust(_LABEL)}{text}")
    return "\n".join(lines)


def _loss(summary: Mapping[str, Any]) -> str | None:
    first, last = summary.get("loss_first"), summary.get("loss_last")
    if first is None or last is None:
        return None
    change = "fell by" if last <= first else "rose by"
    text = f"{first:.3f} -> {last:.3f} ({change} {abs(first - last):.3f} in {summary.get('steps', '?')} steps)"
    entropy = summary.get("unigram_entropy")
    if entropy is not None:
        than = "below" if last < entropy else "not yet below"
        text += f"; {than} the unigram entropy {entropy:.3f} (knowing only how often each token occurs)"
    return text


def _speed(summary: Mapping[str, Any]) -> str | None:
    parts = [
        _figure(summary, "tokens_per_s", "{:,.0f} tokens/s"),
        _figure(summary, "step_ms_median", "{:,.1f} ms per step (median)"),
    ]
    return ", ".join(part for part in parts if part) or None


def _alltoall(summary: Mapping[str, Any]) -> str | None:
    total, hidden = summary.get("a2a_ms"), summary.get("hidden_ms")
    if total is None:
        return None
    text = f"{total:.1f} ms per step"
    if hidden is None:
        return text
    text += f", {hidden:.1f} ms of it hidden" if hidden >= 0 else f"; overlapping cost {-hidden:.1f} ms more"
    fraction = summary.get("hidden_fraction")
    if fraction is None:
        return text if hidden else text + " (nothing ran beside it)"
    return text + f" ({100 * fraction:.0f} % of what could be covered)"


def _bytes(summary: Mapping[str, Any]) -> str | None:
    sent, plain = summary.get("a2a_bytes"), summary.get("a2a_plain_bytes")
    if not sent:
        return None
    text = f"{sent / 2**20:.2f} MiB per step and rank to other ranks"
    if plain not in (None, sent):
        text += f", {plain / sent:.2f} times fewer than a row for every (token, expert)"
    return text + legs_text(summary)


def legs_text(summary: Mapping[str, Any]) -> str:
    """What crosses between nodes and what stays inside them, beside the plain form's where that is known."""
    parts = []
    for where, name in (("between nodes", "across_nodes"), ("inside them", "inside_node")):
        sent, plain = summary.get(f"a2a_{name}_bytes"), summary.get(f"a2a_plain_{name}_bytes")
        if sent is not None:
            beside = "" if plain is None else f" (plain {plain / 2**20:.2f})"
            parts.append(f"{sent / 2**20:.2f} MiB{beside} {where}")
    return f"; {', '.join(parts)}" if parts else ""


def _overlap(summary: Mapping[str, Any]) -> str | None:
    value, reason = _choice(summary.get("overlap"))
    if value is None:
        return None
    if reason in (None, "", "as asked"):
        return f"{value}, as asked"
    if value in ("off", "plain"):
        return f"overlap chose plain because {reason}; see fluid-npu bench overlap --link"
    return f"overlap chose {value} because {reason}"


def _choice(overlap: Any) -> tuple[str | None, str | None]:
    """(value, reason) from a mapping, a pair or a plain value."""
    if isinstance(overlap, Mapping):
        return overlap.get("value"), overlap.get("reason")
    if isinstance(overlap, (list, tuple)) and len(overlap) == 2:
        return overlap[0], overlap[1]
    return (str(overlap), None) if overlap is not None else (None, None)


def _generated(summary: Mapping[str, Any]) -> str | None:
    text = summary.get("generated")
    return repr(text) if text else None


def _versions(summary: Mapping[str, Any]) -> str | None:
    versions = summary.get("versions") or {}
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or None


def _text(summary: Mapping[str, Any], key: str) -> str | None:
    value = summary.get(key)
    return None if value is None else str(value)


def _figure(summary: Mapping[str, Any], key: str, form: str) -> str | None:
    value = summary.get(key)
    return None if value is None else form.format(value)
