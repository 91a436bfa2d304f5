"""Figures 3, 4 and 5, as the paper has them, with what was run."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.report.curves import Runs, panel, save
from benchmarks.paper.report.runs import Found, described
from benchmarks.paper.tasks import named

UCI = ("slice", "protein", "parkinsons")
FOURTH = (("ill-conditioned",), ("mnist-autoencoder", "digits-autoencoder"), ("mnist", "digits"))
RATES = ("sgdm", "rmsprop")


def figures(found: Found, out: Path) -> list[Path]:
    """Write those for which there is a run; their paths. A stand-in takes a panel where the paper's data are absent."""
    paths = []
    third = [task for task in UCI if task in found] or [task for task in ("diabetes",) if task in found]
    if third:
        panels = [_learning_no_rate(found[task]) for task in third]
        paths.append(_losses(panels, "epoch", "Figure 3: regression", out / "figure3.png"))
    fourth: list[Runs] = [next((found[task] for task in tasks if task in found), []) for tasks in FOURTH]
    if any(fourth):
        panels = [*map(_learning_no_rate, fourth[:2]), _with_rates(fourth[2], RATES) or fourth[2]]
        title = "Figure 4: poorly-conditioned regression, autoencoder, learning rates"
        paths.append(_losses(panels, "step", title, out / "figure4.png"))
    if "cifar10-wrn-28-10" in found:
        paths.append(_rates(found["cifar10-wrn-28-10"], "Figure 5", out / "figure5.png"))
    for task in ("mnist", "digits"):
        if task in found and any(_learns_rate(run) for run in found[task]):
            title = f"The rates learned on {named(task).source.label}"
            paths.append(_rates(found[task], title, out / f"rates-{task}.png"))
    return paths


def _losses(panels: Sequence[Runs], x: str, title: str, path: Path) -> Path:
    """A column for each task: the loss by ``x`` above, by time below."""
    figure = Figure(figsize=(4.6 * len(panels) + 1, 6.4), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for column, runs in zip(grid.T, panels, strict=True):
        for axes, by in zip(column, (x, "seconds"), strict=True):
            if runs:
                panel(axes, runs, by, "loss")
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
        column[0].set_title(_caption(runs) if runs else "", fontsize=8)
    return save(figure, grid[0], title, path)


def _rates(runs: Runs, title: str, path: Path) -> Path:
    """Training loss, test accuracy and the rates, as Figure 5 has them."""
    runs = _with_rates(runs, ("sgd", "adam", *RATES))
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    grid = figure.subplots(1, 3)
    for axes, column in zip(grid, ("loss", "metric", "rate"), strict=True):
        panel(axes, runs, "epoch", column)
    return save(figure, grid, f"{title}: {_caption(runs)}", path)


def _learning_no_rate(runs: Runs) -> Runs:
    return [run for run in runs if not _learns_rate(run)] or runs


def _with_rates(runs: Runs, bases: Sequence[str]) -> Runs:
    return [run for run in runs if _learns_rate(run) or run["optimizer"].partition("+")[0] in bases]


def _learns_rate(run: dict[str, Any]) -> bool:
    return str(run["optimizer"]).startswith("apo-lr")


def _caption(runs: Runs) -> str:
    return fill(f"{runs[0]['model']} on {described(runs)}", 70)
