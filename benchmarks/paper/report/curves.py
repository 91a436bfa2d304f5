"""Curves of runs: a line for each optimizer, and the figure of one task."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.report.runs import grouped

Runs = Sequence[dict[str, Any]]

COLOURS = {
    "sgd": "#999999",
    "sgdm": "#E69F00",
    "rmsprop": "#56B4E9",
    "adam": "#009E73",
    "adamw": "#009E73",
    "kfac": "#D55E00",
    "ekfac": "#CC79A7",
    "shampoo": "#F0E442",
    "apo": "#0072B2",
    "apo-defaults": "#000000",
}
"""Okabe and Ito's, which every kind of eye tells apart. Learned and scheduled forms share that of their base."""


def draw(runs: Runs, path: Path) -> Path:
    """Write the figure of one task: loss by step and by time, metric, rate."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    grid = figure.subplots(1, 4)
    columns = (("step", "loss"), ("seconds", "loss"), ("epoch", "metric"), ("step", "rate"))
    for axes, (x, y) in zip(grid, columns, strict=True):
        panel(axes, runs, x, y)
    return save(figure, grid[:1], f"{runs[0]['title']}\n{runs[0]['data']}", path)


def save(figure: Figure, labelled: Sequence[Axes], title: str, path: Path) -> Path:
    """With one legend for these axes below."""
    handles: dict[str, Artist] = {}
    for axes in labelled:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=10)
    below: dict[str, Any] = {"loc": "outside lower center", "ncols": 8, "fontsize": 8, "frameon": False}
    figure.legend(handles=list(handles.values()), labels=list(handles), **below)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def panel(axes: Axes, runs: Runs, x: str, y: str) -> None:
    """A line and a band for each optimizer: the median over the seeds, from the least to the greatest.

    Solid at a fixed rate, dashed where the rate is learned, dotted under a manual schedule. What isn't finite is left
    out.
    """
    first = runs[0]
    for group in grouped(runs):
        xs, middle, low, high = group.band(x, y)
        keep = [i for i in range(len(xs)) if all(map(math.isfinite, (middle[i], low[i], high[i])))]
        xs, middle, low, high = ([v[i] for i in keep] for v in (xs, middle, low, high))
        base, plus, _ = str(group.first["optimizer"]).partition("+")
        learned = base.startswith("apo-lr")
        colour = COLOURS.get((base.partition(":")[2] or "sgdm") if learned else base, "black")
        axes.plot(xs, middle, label=group.name, lw=1.4, color=colour, ls="--" if learned else ":" if plus else "-")
        if len(group.runs) > 1:
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
    names = {"loss": f"training loss ({first['loss_name']})", "metric": f"test {first['metric_name']}"}
    axes.set(xlabel="seconds of training" if x == "seconds" else x, ylabel=names.get(y, "learning rate"))
    if y != "metric" or not first["higher_is_better"]:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
