"""Figures in markdown pages, filled from recorded results so that nobody types them.

A table, all of it or chosen rows (by what their cells say) and columns:

    <!-- table: benchmarks/overlap.json steps workload=W0 | workload; hidden ms; of coverable -->
    <!-- /table -->

A figure within a sentence, from the one row that fits: list, selectors, key, and a form: ``%`` for a fraction as per
cent, ``+%`` for a gain, or a number of digits.

    <!-- value: benchmarks/overlap.json steps workload=W0 hidden_fraction % -->91 %<!-- /value -->

Files are named from the root of the repository. Names of tables are those of ``report`` (``bench_tables``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluid_npu.report.bench_tables import tables_of
from fluid_npu.report.sections import machine_text, versions_text
from fluid_npu.report.sources import read_bench
from fluid_npu.report.table import Table, figure, markdown, percent, signed_percent

_BLOCK = {
    "table": re.compile(r"(<!-- table: (?P<what>[^\n]*?) -->\n).*?(<!-- /table -->)", re.DOTALL),
    "value": re.compile(r"(<!-- value: (?P<what>[^\n]*?) -->)[^\n]*?(<!-- /value -->)"),
}
_OPENING = re.compile(r"<!-- (table|value): ")
_RECORDED = {False: "Recorded in", True: "记录见"}


class BlockError(ValueError):
    """A marker that cannot be filled; the message names page, marker and reason."""


def fill(text: str, page: Path, root: Path) -> str:
    """The page's text with every block filled. Raises BlockError."""
    makers: dict[str, Callable[[str, Path, Path], str]] = {"table": _table_block, "value": _value}
    opened = len(_OPENING.findall(text))
    closed = sum(len(pattern.findall(text)) for pattern in _BLOCK.values())
    if opened != closed:
        raise BlockError(f"{page}: {opened} marker(s) open a table or value, {closed} are closed in the right place")
    for kind, pattern in _BLOCK.items():
        text = pattern.sub(lambda found, make=makers[kind]: _filled(found, make, page, root), text)
    return text


def _filled(found: re.Match[str], make: Callable[[str, Path, Path], str], page: Path, root: Path) -> str:
    try:
        return f"{found[1]}{make(found['what'], page, root)}{found[3]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise BlockError(f"{page}: '{found['what']}': {what}") from error


def _table_block(what: str, page: Path, root: Path) -> str:
    selection, _, columns = what.partition("|")
    file, name, *wanted = shlex.split(selection)
    result = read_bench(root / file)
    tables = {table.name: table for table in tables_of(result)}
    if name not in tables:
        raise ValueError(f"no table '{name}'; {file} has {', '.join(tables)}")
    table = _chosen(
        tables[name], _selectors(wanted), [column.strip() for column in columns.split(";") if column.strip()]
    )
    note = f"\n{table.note}\n" if table.note else ""
    return f"{markdown(table)}\n{note}\n{_where_from(result, file, page, root)}\n"


def _where_from(result: dict[str, Any], file: str, page: Path, root: Path) -> str:
    link = Path(os.path.relpath(root / file, page.parent)).as_posix()
    recorded = _RECORDED["zh" in page.as_posix().lower()]
    place = f"; link {result['link']['rate']}" if result.get("link") else ""
    date = f", {result['date'][:10]}" if result.get("date") else ""
    return (
        f"`{result['command']}`; {machine_text(result['machine'])}{place}; {versions_text(result)}{date}. "
        f"{recorded} [{Path(file).name}]({link})."
    )


def _chosen(table: Table, wanted: dict[str, str], columns: Sequence[str]) -> Table:
    """Rows whose cells say what is wanted, and columns, in the given order."""
    for name in (*wanted, *columns):
        if name not in table.head:
            raise ValueError(f"no column '{name}'; the table has {'; '.join(table.head)}")
    rows = [row for row in table.rows if all(row[table.head.index(name)] == value for name, value in wanted.items())]
    if not rows:
        raise ValueError(f"no row with {' '.join(f'{name}={value}' for name, value in wanted.items())}")
    places = [table.head.index(name) for name in columns] or list(range(len(table.head)))
    return replace(
        table,
        head=tuple(table.head[place] for place in places),
        rows=tuple(tuple(row[place] for place in places) for row in rows),
        words=sum(place < table.words for place in places),
    )


def _value(what: str, page: Path, root: Path) -> str:
    file, rows, *wanted, key, form = shlex.split(what)
    selectors = _selectors(wanted)
    found = [
        row
        for row in json.loads((root / file).read_text(encoding="utf-8"))[rows]
        if all(str(row[name]) == value for name, value in selectors.items())
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows fit, it must be one; add selectors such as case=h64")
    return _formed(found[0][key], form)


def _formed(value: float | None, form: str) -> str:
    if value is None:
        raise ValueError("the value is null: not measured, or not to be told from noise")
    if form in ("%", "+%"):
        return percent(value) if form == "%" else signed_percent(value)
    if not form.isdigit():
        raise ValueError(f"'{form}' is no form; give %, +% or a number of digits")
    return figure(value, int(form))


def _selectors(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    bad = [name for name, equals, _ in pairs if not equals]
    if bad:
        raise ValueError(f"'{bad[0]}' is no selector; write COLUMN=VALUE, in quotes where it has spaces")
    return {name: value for name, _, value in pairs}
