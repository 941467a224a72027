"""Draw a run's loss as a PNG. Matplotlib is optional and loaded only here, without a display."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence


def plot_loss(
    steps: Sequence[int],
    losses: Sequence[float],
    out_png: str | os.PathLike[str],
    unigram_entropy: float | None = None,
    title: str = "training loss",
) -> str | None:
    """Write `out_png`: loss (nats per token) over steps, the unigram entropy as a dashed line.

    Returns None when it was drawn, otherwise the reason, for the caller to print (no matplotlib, no finite loss,
    not writable). Raises ValueError when `steps` and `losses` differ in length.
    """
    if len(steps) != len(losses):
        raise ValueError(f"plot_loss: {len(steps)} steps but {len(losses)} losses")
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not points:
        return "no loss.png: there is no finite loss to draw"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss.png: matplotlib is missing; install it with: pip install 'fluid-npu[plot]'"
    # Not pyplot: that would choose a backend for the whole process.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), linewidth=1.2, label="loss")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=1, label="unigram entropy of the data")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(out_png, dpi=120, format="png")
    except OSError as error:
        return f"no loss.png: {out_png} cannot be written ({error.strerror or error})"
    return None
