"""``fluid-npu doctor --dtypes``: Megatron version x dtype x stock or ours x device, each with reason and source."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fluid_npu.adaptor.dtypes import DEVICES, DTYPES, VALUES, ours_would, stock_would
from fluid_npu.adaptor.dtypes_sources import LINES

#: The older ones behave as 0.12 and are in ``dtypes_sources.LINES``.
SHOWN = ("0.12", "0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "0.20")
#: Columns of stock: its key, the device, and whether Transformer Engine is used, which exists for CUDA alone.
STOCK = (("cpu", "cpu", False), ("cuda_te", "cuda", True), ("cuda", "cuda", False), ("npu", "npu", False))
_NAMES = {"cpu": "cpu", "cuda_te": "cuda with TE", "cuda": "cuda", "npu": "npu"}

SENTENCE = "Megatron does not natively support using `--moe-grouped-gemm` when `--bf16` is enabled."
CORRECTION = (
    "It is the reverse. Stock Megatron requires bf16: by an assertion of the argument parser up to 0.15, by one of "
    "GroupedMLP.forward in 0.16; from 0.17 on the class is gone."
)
_WIDTH = 120
_NOWHERE = "not run on this hardware"

Row = Mapping[str, Any]


def matrix(lines: Sequence[str], installed: str | None, tried: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each shown line and dtype.

    ``lines``: those with a manifest of ours; ``installed``: the line that is installed; ``tried``: dtype to 'ok' or
    an error, of the grouped matmul that was run here.
    """
    return [_row(name, dtype, lines, installed, tried) for name in SHOWN for dtype in DTYPES]


def _row(
    name: str, dtype: str, lines: Sequence[str], installed: str | None, tried: Mapping[str, str]
) -> dict[str, Any]:
    stock = {
        key: {
            door: asdict(stock_would(name, dtype, device, transformer_engine=engine, door=door))
            for door in ("launch", "library")
        }
        for key, device, engine in STOCK
    }
    ours = {device: asdict(ours_would(name, dtype, device, supported=lines)) for device in DEVICES}
    if name == installed and dtype in tried:
        ours["cpu"]["tried_here"] = tried[dtype]
    place = {"megatron": name, "read_at": LINES[name].tag, "installed": name == installed, "dtype": dtype}
    return {**place, "stock": stock, "ours": ours}


def failed_here(rows: Sequence[Row]) -> bool:
    """Whether a grouped matmul that was tried here did not work."""
    return any(row["ours"]["cpu"].get("tried_here", "ok") != "ok" for row in rows)


def dtypes_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Keys as documented in docs/DOCTOR.md."""
    return {"schema": 1, "values": VALUES, "sentence": SENTENCE, "correction": CORRECTION, "rows": list(rows)}


def dtypes_text(rows: Sequence[Row]) -> str:
    """The table with the answers at launch and a number for each reason, then the reasons with their sources."""
    notes = _Notes()
    table = [_text_row(row, notes) for row in rows]
    lines = [
        "--moe-grouped-gemm: what stock Megatron does with it at launch, and what fluid_npu does",
        f'MindSpeed\'s documentation says: "{SENTENCE}"',
        *textwrap.wrap(CORRECTION, _WIDTH),
        "",
        f"{'':<16}{'stock':<64}fluid_npu",
        f"{'megatron':<10}{'dtype':<6}" + "".join(f"{head:<16}" for head in _NAMES.values()),
    ]
    lines[-1] += "".join(f"{head:<16}" for head in DEVICES).rstrip()
    lines += [*table, "", *(f"{value:<16}{what}" for value, what in VALUES.items())]
    if any(row["installed"] for row in rows):
        lines += [f"{'*':<16}the installed line"]
    notes.library(rows)
    return "\n".join([*lines, "", *notes.text()])


def _text_row(row: Row, notes: _Notes) -> str:
    cells = [(f"stock on {_NAMES[key]}", cell["launch"]) for key, cell in row["stock"].items()]
    cells += [(f"fluid_npu on {device}", cell) for device, cell in row["ours"].items()]
    marked = row["megatron"] + ("*" if row["installed"] else "")
    text = f"{marked:<10}{row['dtype']:<6}"
    text += "".join(f"{_with_number(cell, notes.number(who, cell, row)):<16}" for who, cell in cells)
    tried = row["ours"]["cpu"].get("tried_here")
    return text.rstrip() + (f"   tried here, cpu: {tried}" if tried else "")


def _with_number(cell: Row, number: int | None) -> str:
    return cell["value"] if number is None else f"{cell['value']} [{number}]"


class _Notes:
    """Each different reason once, numbered, with every version and dtype that it holds for."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, str, str], dict[str, dict[str, None]]] = {}

    def number(self, who: str, cell: Row, row: Row) -> int | None:
        """The number of this cell's reason; None for 'unsupported', which the legend explains."""
        if cell["value"] == "unsupported":
            return None
        # A refusal is the same on every device.
        key = ("stock" if cell["value"] == "refuses" else who, cell["value"], cell["reason"])
        note = self._notes.setdefault(key, {"sources": {}, "ran": {}, "holds": {}})
        note["sources"][cell["source"]] = None
        note["holds"][f"{row['megatron']} {row['dtype']}"] = None
        if who.startswith("fluid_npu"):
            note["ran"][f"{row['megatron']} {row['dtype']}: {cell['ran'] or _NOWHERE}"] = None
        return list(self._notes).index(key) + 1

    def library(self, rows: Sequence[Row]) -> None:
        """Adds what differs where no argument parser runs."""
        for row in rows:
            for key, cell in row["stock"].items():
                if cell["library"]["value"] != cell["launch"]["value"]:
                    self.number(f"stock on {_NAMES[key]} from a layer spec, without the parser", cell["library"], row)

    def text(self) -> Iterator[str]:
        """The notes, wrapped."""
        for number, ((who, value, reason), note) in enumerate(self._notes.items(), 1):
            yield from _wrapped(f"[{number}]", f"{who}: {value}. {reason}")
            if who.endswith("parser"):
                yield from _wrapped("", f"holds for {_holds(list(note['holds']))}")
            yield from (line for ran in _runs(list(note["ran"])) for line in _wrapped("", ran))
            yield from _wrapped("", _sources(list(note["sources"])))


def _holds(places: Sequence[str]) -> str:
    """'0.12 fp32, 0.12 fp16, 0.13 fp32' as '0.12 (fp32, fp16), 0.13 (fp32)'."""
    found: dict[str, list[str]] = {}
    for place in places:
        megatron, dtype = place.split()
        found.setdefault(megatron, []).append(dtype)
    return ", ".join(f"{megatron} ({', '.join(dtypes)})" for megatron, dtypes in found.items())


def _runs(runs: Sequence[str]) -> list[str]:
    """'0.12 fp32: where' of each line and dtype as 'run with 0.12 (fp32), 0.18 (fp32): where'."""
    found: dict[str, list[str]] = {}
    for run in runs:
        place, _, where = run.partition(": ")
        found.setdefault(where, []).append(place)
    return [f"{'run with ' if where != _NOWHERE else ''}{_holds(places)}: {where}" for where, places in found.items()]


def _sources(sources: Sequence[str]) -> str:
    """'tag path:line' of each version as 'path: tag line, tag line'."""
    found: dict[str, list[str]] = {}
    for source in sources:
        tag, _, place = source.rpartition(" ")
        path, _, line = place.partition(":")
        found.setdefault(path if tag else source, []).extend([f"{tag}:{line}"] if tag and line.isdigit() else [])
    return "; ".join(f"{path} {', '.join(lines)}".strip() for path, lines in found.items())


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{head:<5}{text}", _WIDTH, subsequent_indent=" " * 5, break_long_words=False, break_on_hyphens=False
    )
