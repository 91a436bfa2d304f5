"""The figure of one task: loss by step and by time, metric, rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.report.aggregate import Group, grouped
from benchmarks.paper.report.colours import colour, dashes


def draw(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the PNG. Lines are medians over seeds, bands go from the least to the greatest."""
    first, groups = runs[0], grouped(runs)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    by_step, by_time, metric, rate = figure.subplots(1, 4)
    lines(by_step, groups, "step", "loss")
    lines(by_time, groups, "seconds", "loss")
    lines(metric, groups, "epoch", "metric")
    lines(rate, groups, "step", "rate")
    by_step.set(xlabel="step", ylabel=f"training loss ({first['loss_name']})", yscale="log")
    by_time.set(xlabel="seconds of training", yscale="log")
    metric.set(xlabel="epoch", ylabel=f"test {first['metric_name']}")
    rate.set(xlabel="step", ylabel="learning rate", yscale="log")
    if not first["higher_is_better"]:
        metric.set_yscale("log")
    figure.suptitle(f"{first['title']}\n{first['data']}", fontsize=9)
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def lines(axes: Axes, groups: Sequence[Group], x: str, y: str) -> None:
    """A line and a band each. What isn't finite is left out."""
    for group in groups:
        xs, middle, low, high = group.band(x, y)
        keep = [i for i in range(len(xs)) if all(map(math.isfinite, (middle[i], low[i], high[i])))]
        xs, middle, low, high = ([v[i] for i in keep] for v in (xs, middle, low, high))
        shade = colour(group.first["optimizer"])
        axes.plot(xs, middle, label=group.name, lw=1.4, color=shade, ls=dashes(group.first["optimizer"]))
        if len(group.runs) > 1:
            axes.fill_between(xs, low, high, color=shade, alpha=0.15, lw=0)
    axes.grid(alpha=0.25)
