"""Figures in pages come from the recorded files, and a page that does not agree with them is found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.report.blocks import BlockError, fill
from tests.support import results

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate_tables.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    results.write_benches(tmp_path / "benchmarks")
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    return tmp_path


def filled(root: Path, text: str, page: str = "docs/A.md") -> str:
    return fill(text, root / page, root)


def test_a_table_is_filled_with_its_source(root: Path) -> None:
    marker = "before\n<!-- table: benchmarks/overlap.json steps -->\nold\n<!-- /table -->\nafter\n"
    text = filled(root, marker)
    assert text.startswith("before\n") and text.endswith("<!-- /table -->\nafter\n") and "\nold\n" not in text
    assert "| W0 | balanced | 100.00 | 100.00 | 100.00 | 31.00 ±0.50 | 91 % | 31.10 | 2.00 | dw |" in text
    assert "NOISY: 1 of 2 rows" in text
    assert "`fluid-npu bench overlap --out OUT`; a processor" in text and "link 1gbit" in text
    assert "Recorded in [overlap.json](../benchmarks/overlap.json)." in text
    assert filled(root, text) == text


def test_rows_and_columns_can_be_chosen(root: Path) -> None:
    chosen = "'implementation=ours overlapped' | median ms; case"
    lines = filled(root, f"<!-- table: benchmarks/train-step.json steps {chosen} -->\n<!-- /table -->").splitlines()
    assert lines[1:4] == ["| median ms | case |", "| --- | --: |", "| 61.2 | h64 |"]


def test_a_value_within_a_sentence(root: Path) -> None:
    text = "It hid <!-- value: benchmarks/overlap.json steps workload=W0 hidden_fraction % -->2 %<!-- /value --> of it."
    assert "-->91 %<!-- /value --> of it." in filled(root, text)
    gain = "<!-- value: benchmarks/ffn-sweep.json rows ffn=8192 gain +% --><!-- /value -->"
    assert "-->+20.0 %<!--" in filled(root, gain)
    digits = "<!-- value: benchmarks/layer.json rows impl=baseline pass=forward median_ms 1 --><!-- /value -->"
    assert "-->14.1<!--" in filled(root, digits)


def test_a_chinese_page_says_where_it_is_recorded(root: Path) -> None:
    marker = "<!-- table: benchmarks/layer.json layer -->\n<!-- /table -->"
    assert "记录见 [layer.json](../../benchmarks/layer.json)" in filled(root, marker, "docs/zh/A.md")


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("<!-- table: benchmarks/none.json steps -->\n<!-- /table -->", "cannot be read: No such file"),
        (
            "<!-- table: benchmarks/layer.json steps -->\n<!-- /table -->",
            "no table 'steps'; benchmarks/layer.json has layer",
        ),
        ("<!-- table: benchmarks/layer.json layer | speed -->\n<!-- /table -->", "no column 'speed'; the table has"),
        ("<!-- table: benchmarks/layer.json layer pass=no -->\n<!-- /table -->", "no row with pass=no"),
        ("<!-- table: benchmarks/layer.json layer fast -->\n<!-- /table -->", "'fast' is no selector"),
        ("<!-- table: benchmarks/layer.json layer -->\n", r"1 marker\(s\) open a table or value, 0 are closed"),
        ("<!-- value: benchmarks/layer.json rows median_ms 1 --><!-- /value -->", "4 rows fit, it must be one"),
        (
            "<!-- value: benchmarks/overlap.json steps workload=W0 speed 1 --><!-- /value -->",
            "the key 'speed' is missing",
        ),
        ("<!-- value: benchmarks/overlap.json steps workload=W0 twin_ms x --><!-- /value -->", "'x' is no form"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error(root: Path, marker: str, reason: str) -> None:
    with pytest.raises(BlockError, match=reason) as error:
        filled(root, marker)
    assert "A.md" in str(error.value)


def test_what_could_not_be_judged_is_not_quoted(root: Path) -> None:
    result = results.overlap()
    result["steps"][0]["hidden_fraction"] = None
    (root / "benchmarks" / "overlap.json").write_text(json.dumps(result))
    marker = "<!-- value: benchmarks/overlap.json steps workload=W0 hidden_fraction % --><!-- /value -->"
    with pytest.raises(BlockError, match="the value is null"):
        filled(root, marker)


def test_the_pages_of_the_repository_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| h256 \| ours overlapped \|", text, re.MULTILINE)) == 2


def test_a_typed_figure_is_found_and_written_over(root: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import generate_tables
    finally:
        sys.path.pop(0)
    page = root / "docs" / "A.md"
    page.write_text(
        "<!-- value: benchmarks/layer.json rows impl=baseline pass=forward median_ms 1 -->9.9<!-- /value -->"
    )
    assert generate_tables.main(["--check"], root) == 1
    assert generate_tables.main([], root) == 0
    assert "-->14.1<!--" in page.read_text()
    assert generate_tables.main(["--check"], root) == 0
    assert generate_tables.main(["--chekc"], root) == 2
