"""Writes a report: one page that needs nothing else, plots and traces as files beside it."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fluid_npu.report import plots
from fluid_npu.report.sections import Plot, Section, loss_plot, section_of
from fluid_npu.report.sources import Source, Unread, collect
from fluid_npu.report.table import markdown
from fluid_npu.version import __version__

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What ``write_report`` did. ``page`` is None where there was no result to show."""

    page: Path | None
    plots: list[Path]
    traces: list[Path]
    results: list[str]
    unread: list[Unread]
    missing: str


def write_report(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], title: str = "") -> Written:
    """Reads all results below ``paths`` and writes the report into the folder ``out``, which is made.

    Raises FileNotFoundError for paths that are not there, ImportError with the install line where jinja2 is missing,
    and OSError where ``out`` cannot be written.
    """
    found = collect(paths)
    draw = plots.can_draw()
    sections, shown, unread = _sections(found.sources, found.unread, draw=draw)
    missing = "" if draw else plots.MISSING
    if not sections:
        return Written(page=None, plots=[], traces=[], results=[], unread=unread, missing=missing)
    losses = loss_plot(shown) if draw and sum(source.kind == "run" for source in shown) > 1 else None
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    traces = [_trace_files(folder, number, section) for number, section in enumerate(sections, 1)]
    drawn = [_plot_file(folder, "losses", losses)] if losses else []
    for number, section in enumerate(sections, 1):
        drawn += [_plot_file(folder, f"{number}-{_slug(section.name)}", plot) for plot in section.plots]
    names = [[path.relative_to(folder).as_posix() for path in one] for one in traces]
    page = folder / PAGE
    page.write_text(_page(sections, unread, losses, names, missing, title or "fluid-npu report"), encoding="utf-8")
    return Written(
        page=page,
        plots=drawn,
        traces=[path for one in traces for path in one],
        results=[section.title for section in sections],
        unread=unread,
        missing=missing,
    )


def markdown_of(paths: Sequence[str | os.PathLike[str]]) -> tuple[str, list[Unread]]:
    """All tables of the results below ``paths`` as markdown, and what is not in it."""
    found = collect(paths)
    sections, _, unread = _sections(found.sources, found.unread, draw=False)
    return "\n\n".join(_markdown(section) for section in sections), unread


def _markdown(section: Section) -> str:
    parts = [f"## {section.title}"]
    parts += ["\n".join(f"* {name}: {text}" for name, text in section.facts)] if section.facts else []
    for table in section.tables:
        parts += [f"### {table.title}", markdown(table), *([table.note] if table.note else [])]
    parts += ["\n".join(f"* {sentence}" for sentence in section.verdict)] if section.verdict else []
    return "\n\n".join(parts)


def _sections(
    sources: Sequence[Source], unread: Sequence[Unread], *, draw: bool
) -> tuple[list[Section], list[Source], list[Unread]]:
    """A result that is not as its format says is named and the others are shown."""
    sections, shown, left = [], [], list(unread)
    for source in sources:
        try:
            sections.append(section_of(source, draw=draw))
            shown.append(source)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            left.append(Unread(str(source.path), f"not as a result of its kind ({source.kind}) is: {what}"))
    return sections, shown, sorted(left)


def _page(
    sections: Sequence[Section],
    unread: Sequence[Unread],
    losses: Plot | None,
    traces: Sequence[Sequence[str]],
    missing: str,
    title: str,
) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("report: jinja2 is missing; install it with: pip install 'jinja2>=3.1'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("fluid_npu.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        sections=sections,
        unread=unread,
        losses=losses,
        trace_files=traces,
        missing=missing,
        version=__version__,
        encode=lambda png: base64.b64encode(png).decode("ascii"),
    )


def _trace_files(folder: Path, number: int, section: Section) -> list[Path]:
    written = []
    for name, trace in section.traces.items():
        path = folder / "traces" / f"{number}-{_slug(section.name)}-{'/'.join(map(_slug, name.split('/')))}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace), encoding="utf-8")
        written.append(path)
    return written


def _plot_file(folder: Path, prefix: str, plot: Plot) -> Path:
    path = folder / "plots" / f"{prefix}-{_slug(plot.name)}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(plot.png)
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
