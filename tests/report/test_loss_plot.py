"""loss.png: drawn where matplotlib is, a reason where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fluid_npu.report.loss_plot import plot_loss


def test_draws_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "loss.png"
    assert plot_loss([1, 2, 3], [8.0, float("nan"), 6.5], out, unigram_entropy=6.6, title="run") is None
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_matplotlib_gives_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = plot_loss([1], [1.0], tmp_path / "loss.png")
    assert reason is not None
    assert "pip install 'fluid-npu[plot]'" in reason
    assert not (tmp_path / "loss.png").exists()


def test_nothing_to_draw_and_no_place_to_write(tmp_path: Path) -> None:
    assert "no finite loss" in str(plot_loss([], [], tmp_path / "loss.png"))
    assert "no finite loss" in str(plot_loss([1], [float("inf")], tmp_path / "loss.png"))
    pytest.importorskip("matplotlib")
    assert "cannot be written" in str(plot_loss([1], [1.0], tmp_path / "missing" / "loss.png"))


def test_lengths_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 steps but 1 losses"):
        plot_loss([1, 2], [1.0], tmp_path / "loss.png")
