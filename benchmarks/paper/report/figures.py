"""Figures 3, 4 and 5, as the paper has them, with what was run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.report.aggregate import grouped
from benchmarks.paper.report.collect import Found, described
from benchmarks.paper.report.curves import lines
from benchmarks.paper.tasks import named

UCI = ("slice", "protein", "parkinsons")
RATES = ("sgdm", "rmsprop")


def figures(found: Found, out: Path) -> list[Path]:
    """Write those for which there is a run; their paths. A stand-in takes a panel where the paper's data are absent."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    third = [task for task in UCI if task in found] or [task for task in ("diabetes",) if task in found]
    if third:
        paths.append(_losses(found, third, "Figure 3: regression", out / "figure3.png"))
    fourth = [
        next((task for task in panel if task in found), None)
        for panel in (("ill-conditioned",), ("mnist-autoencoder", "digits-autoencoder"), ("mnist", "digits"))
    ]
    if any(fourth):
        paths.append(_fourth(found, fourth, out / "figure4.png"))
    if "cifar10-wrn-28-10" in found:
        paths.append(_rates(found["cifar10-wrn-28-10"], "Figure 5", out / "figure5.png"))
    for task in ("mnist", "digits"):
        if task in found and any(_learns_rate(run) for run in found[task]):
            title = f"The rates learned on {named(task).source.label}"
            paths.append(_rates(found[task], title, out / f"rates-{task}.png"))
    return paths


def _losses(found: Found, tasks: Sequence[str], title: str, path: Path) -> Path:
    figure = Figure(figsize=(4.6 * len(tasks) + 1, 6.4), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for place, task in enumerate(tasks):
        runs = [run for run in found[task] if not _learns_rate(run)] or found[task]
        _panel(grid[0][place], runs, "epoch", "loss")
        _panel(grid[1][place], runs, "seconds", "loss")
        grid[0][place].set_title(_caption(runs), fontsize=8)
    return _save(figure, grid[0], title, path)


def _fourth(found: Found, tasks: Sequence[str | None], path: Path) -> Path:
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    grid = figure.subplots(2, 3)
    for place, task in enumerate(tasks):
        if task is None:
            for axes in grid[:, place]:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
            continue
        runs = found[task]
        if place == 2:
            runs = [r for r in runs if _learns_rate(r) or r["optimizer"].partition("+")[0] in RATES] or runs
        else:
            runs = [run for run in runs if not _learns_rate(run)] or runs
        _panel(grid[0][place], runs, "step", "loss")
        _panel(grid[1][place], runs, "seconds", "loss")
        grid[0][place].set_title(_caption(runs), fontsize=8)
    return _save(figure, grid[0], "Figure 4: poorly-conditioned regression, autoencoder, learning rates", path)


def _rates(runs: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """Training loss, test accuracy and the rates, as Figure 5 has them."""
    runs = [r for r in runs if _learns_rate(r) or r["optimizer"].partition("+")[0] in ("sgd", "adam", *RATES)]
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    grid = figure.subplots(1, 3)
    for axes, column in zip(grid, ("loss", "metric", "rate"), strict=True):
        _panel(axes, runs, "epoch", column)
    return _save(figure, grid, f"{title}: {_caption(runs)}", path)


def _panel(axes: Axes, runs: Sequence[dict[str, Any]], x: str, y: str) -> None:
    first = runs[0]
    lines(axes, grouped(runs), x, y)
    names = {"loss": f"training loss ({first['loss_name']})", "metric": f"test {first['metric_name']}"}
    axes.set(xlabel="seconds of training" if x == "seconds" else x, ylabel=names.get(y, "learning rate"))
    if y != "metric":
        axes.set_yscale("log")


def _caption(runs: Sequence[dict[str, Any]]) -> str:
    return fill(f"{runs[0]['model']} on {described(runs)}", 70)


def _learns_rate(run: dict[str, Any]) -> bool:
    return str(run["optimizer"]).startswith("apo-lr")


def _save(figure: Figure, labelled: Sequence[Axes], title: str, path: Path) -> Path:
    handles: dict[str, Artist] = {}
    for axes in labelled:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=120)
    return path
