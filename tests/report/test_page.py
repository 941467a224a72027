"""The page: every table and plot is in it, nothing outside it is asked for, and it is well-formed."""

from __future__ import annotations

import base64
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fluid_npu.report import plots
from fluid_npu.report.build import Written, write_report
from tests.support import results

_VOID = {"meta", "img", "br", "link", "input", "hr"}
TABLES = {
    "train-step": ["steps"],
    "overlap": ["steps", "alltoalls"],
    "layer": ["layer", "parts", "levers"],
    "block": ["block", "exchanges", "twins"],
    "ffn-sweep": ["sweep"],
    "parallel-sweep": ["sweep"],
}
PLOTS = {
    "train-step": ["steps"],
    "overlap": ["hidden", "timeline-W0"],
    "layer": ["parts"],
    "block": ["hidden"],
    "ffn-sweep": ["gain"],
    "parallel-sweep": ["gain"],
}


class Page(HTMLParser):
    """Cells of each table by its id, pictures, everything that names a resource, and whether tags match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cells: dict[str, list[str]] = defaultdict(list)
        self.pictures: dict[str, bytes] = {}
        self.resources: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = values.get("id", "unnamed")
        if tag in ("td", "th"):
            self.cells[self._table].append("")
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.resources.append(f"<{tag}>")
        self.resources += [value for name, value in values.items() if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            head, _, data = values["src"].partition(",")
            assert head == "data:image/png;base64" and values["alt"]
            self.pictures[values["id"]] = base64.b64decode(data, validate=True)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[self._table][-1] += data
        if self._open and self._open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("page")
    results.write_benches(folder / "in" / "benches")
    results.write_run(folder / "in" / "first")
    results.write_run(folder / "in" / "second")
    results.write_order(folder / "in" / "order")
    return write_report([folder / "in"], folder / "out")


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    assert written.page is not None
    return Page(written.page.read_text(encoding="utf-8"))


def number_of(written: Written, name: str) -> int:
    return next(n for n, title in enumerate(written.results, 1) if title.endswith(name))


@pytest.mark.parametrize("bench", results.BENCHES)
def test_tables_and_plots_of_each_bench_are_there(written: Written, page: Page, bench: str) -> None:
    number = number_of(written, f"benches/{bench}")
    for name in TABLES[bench]:
        assert page.cells[f"table-{number}-{name}"], name
    for name in PLOTS[bench]:
        assert page.pictures[f"plot-{number}-{name}"].startswith(b"\x89PNG\r\n\x1a\n"), name
    assert f"What {bench} says." in page.text
    assert f"fluid-npu bench {bench} --out OUT" in page.text


@pytest.mark.parametrize(
    ("bench", "table", "cells"),
    [
        ("train-step", "steps", ["61.2", "55.0 to 70.0", "3.00 ±0.50", "75 %", "1.21 (1.10 to 1.30)"]),
        ("overlap", "alltoalls", ["layer 1 fc2 40.00", "4,096.0", "34.00", "31.00 ±0.50"]),
        ("overlap", "steps", ["balanced (NOISY)", "91 %", "31.10 (does not agree)"]),
        ("layer", "parts", ["grad accumulation", "14.00", "14.10", "-"]),
        ("layer", "levers", ["stock GroupedMLP", "1.00 (0.50 to 1.50)", "-2.0"]),
        ("block", "exchanges", ["sp2hp AllToAll of layer 1", "4.0", "0.50 ±0.10"]),
        ("block", "twins", ["14.60", "14.10", "0.50 ±0.10"]),
        ("ffn-sweep", "sweep", ["8192", "+20.0 % (+15.0 % to +25.0 %)", "-5.3 %*", "-5.6 %", "1,537"]),
    ],
)
def test_cells_hold_the_figures(written: Written, page: Page, bench: str, table: str, cells: list[str]) -> None:
    found = page.cells[f"table-{number_of(written, f'benches/{bench}')}-{table}"]
    for cell in cells:
        assert cell in found


def test_runs_have_their_summary_metrics_and_a_common_loss_plot(written: Written, page: Page) -> None:
    number = number_of(written, "first")
    assert "7.950 -> 6.500 (fell by 1.450 in 30 steps)" in page.text
    assert "30 (twin)" in page.cells[f"table-{number}-metrics"]
    assert {"plot-losses", f"plot-{number}-loss"} <= set(page.pictures)


def test_an_order_record_has_counts_and_a_timeline(written: Written, page: Page) -> None:
    number = number_of(written, "order")
    assert page.cells[f"table-{number}-entries"][:5] == ["rank", "collective", "landed", "op", "process"]
    assert f"plot-{number}-timeline" in page.pictures


def test_nothing_outside_the_page_is_asked_for(written: Written, page: Page) -> None:
    assert written.page is not None
    inside = [name for name in page.resources if not name.startswith(("data:image/png;base64,", "#"))]
    traces = {path.relative_to(written.page.parent).as_posix() for path in written.traces}
    assert set(inside) == traces  # links to files beside it, followed only by a click


def test_what_a_result_says_is_text_and_no_markup(page: Page) -> None:
    assert "a processor <of & tests>" in page.text


def test_files_that_are_not_shown_are_on_the_page(page: Page) -> None:
    assert any(cell.endswith("config.json") for cell in page.cells["unnamed"])


def test_plots_are_files_too(written: Written, page: Page) -> None:
    assert sorted(path.read_bytes() for path in written.plots) == sorted(page.pictures.values())


def test_without_matplotlib_there_are_tables_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    results.write_benches(tmp_path / "in")
    written = write_report([tmp_path / "in"], tmp_path / "out")
    assert written.page is not None and not written.plots
    page = Page(written.page.read_text(encoding="utf-8"))
    assert not page.pictures and page.cells["table-1-block"]
    assert "pip install 'fluid-npu[plot]'" in page.text
