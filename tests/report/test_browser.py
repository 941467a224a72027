"""The page in a headless browser without a network: tables and plots are on it, and it asks for nothing else."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.link import why_unavailable
from fluid_npu.link.namespace import Namespace
from fluid_npu.report.build import Written, write_report
from tests.support import results
from tests.support.browser import find_browser

pytestmark = pytest.mark.browser

_MEASURE = """<script>
addEventListener("load", () => {
  const box = (e) => e.getBoundingClientRect();
  const found = {
    tables: [...document.querySelectorAll("table")].map((t) => [t.id, t.rows.length, box(t).height]),
    plots: [...document.images].map((i) => [i.id, i.complete ? i.naturalWidth : 0, box(i).width]),
    fetched: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
    outside: document.documentElement.scrollWidth - innerWidth,
  };
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


def run_offline(command: list[str]) -> subprocess.CompletedProcess[str]:
    """In a network namespace without even a loopback, where one can be made."""
    call = lambda: subprocess.run(command, capture_output=True, text=True, timeout=280)
    if why_unavailable() is not None:
        return call()
    nowhere = Namespace("offline")
    try:
        return nowhere.run(call)
    finally:
        nowhere.close()


def browse(page: Path, folder: Path) -> tuple[str, str]:
    """The document after it was loaded, and what the browser's console says."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr")
    place = (f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900", "--virtual-time-budget=5000")
    done = run_offline([str(find_browser()), *flags, *place, "--dump-dom", page.as_uri()])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("browser")
    results.write_benches(folder / "in" / "benches")
    results.write_run(folder / "in" / "run")
    return write_report([folder / "in"], folder / "out")


@pytest.fixture(scope="module")
def measured(written: Written, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sizes in a copy of the page that may run a script; the page itself forbids scripts."""
    assert written.page is not None
    folder = tmp_path_factory.mktemp("measured")
    text = written.page.read_text(encoding="utf-8")
    copy = re.sub(r"<meta http-equiv=[^>]*>", _MEASURE, text)
    assert copy != text
    (folder / "copy.html").write_text(copy, encoding="utf-8")
    document, _ = browse(folder / "copy.html", folder)
    found = re.search(r'<pre id="measured">(.*?)</pre>', document, re.DOTALL)
    assert found, document[-500:]
    sizes: dict[str, Any] = json.loads(html.unescape(found[1]))
    return sizes


def test_the_page_opens_and_its_own_rules_hold(written: Written, tmp_path: Path) -> None:
    assert written.page is not None
    document, console = browse(written.page, tmp_path)
    assert "What overlap says." in document and console == ""


def test_every_table_and_plot_is_shown(written: Written, measured: dict[str, Any]) -> None:
    assert len([name for name, rows, height in measured["tables"] if rows > 1 and height > 40]) == len(
        measured["tables"]
    )
    assert len(measured["tables"]) == 13  # eleven of the benches, the run's, and the files that are not shown
    assert len(measured["plots"]) == len(written.plots) == 9
    assert all(own > 300 and shown > 300 for _, own, shown in measured["plots"])


def test_it_fetches_nothing_and_fits_the_window(measured: dict[str, Any]) -> None:
    assert measured["fetched"] == []
    assert measured["outside"] <= 0, "wide tables scroll by themselves"
