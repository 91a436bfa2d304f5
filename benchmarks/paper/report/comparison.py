"""The table of one task: every optimizer after equal steps and after equal times."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common.console import console
from benchmarks.paper.report.aggregate import grouped

SPREAD = "of the seeds"
COLUMNS = ("optimizer", "seeds", "loss, steps", SPREAD, "loss, time", "metric", "rate", "s", "ms/step")


def rows(runs: Sequence[dict[str, Any]]) -> tuple[list[list[str]], str]:
    """Cells by optimizer (:data:`COLUMNS`), and a caption that says what is equal."""
    groups = grouped(runs)
    lasting = [g for g in groups if not g.diverged] or groups
    step = min(min(g.last("step")) for g in lasting)
    seconds = min(median(g.last("seconds")) for g in lasting)
    cells = []
    for group in groups:
        first, losses = group.first, group.at_step(step)
        steps = max(sum(group.last("step")), 1)
        cells.append(
            [
                group.name,
                f"{len(group.runs) - group.diverged}/{len(group.runs)}",
                _loss(losses),
                f"{min(losses):.2g} … {max(losses):.2g}" if len(losses) > 1 else "",
                _loss(group.at_time(seconds)) if group.judged_within(seconds) else "–",
                f"{median(group.last('metric')):.4g}",
                f"{median(group.last('rate')):.2g}",
                _short(median(group.last("seconds"))),
                _short(1000 * sum(group.last("seconds")) / steps),
            ]
        )
    first = runs[0]
    scores = [f"{run['optimizer']} {name} {value:.2f}" for run in runs for name, value in run["scores"].items()]
    caption = (
        f"{first['data']}. Loss: {first['loss_name']} of {first['judged_on']:,} training examples, median over seeds, "
        f"after {step:,.0f} steps ({step * first['epochs'] / max(first['total_steps'], 1):.3g} epochs) and after "
        f"{seconds:.3g} s of training (–: not judged before then). Seeds: those that came through. "
        f"Hyperparameters: {_origins(runs)}."
    )
    return cells, " ".join([caption, *([f"{'; '.join(scores)}."] if scores else [])])


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loss(losses: Sequence[float]) -> str:
    middle = median(losses)
    return f"{middle:.3g}" if isfinite(middle) else "diverged"


def _origins(runs: Sequence[dict[str, Any]]) -> str:
    """Where hyperparameters come from, said once where it is the same for all."""
    where: dict[str, list[str]] = {}
    for run in runs:
        names = where.setdefault(run["hyper_from"], [])
        if run["optimizer"] not in names:
            names.append(run["optimizer"])
    if len(where) == 1:
        return next(iter(where))
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in where.items())


def comparison(runs: Sequence[dict[str, Any]]) -> Table:
    """The same for the terminal."""
    cells, caption = rows(runs)
    title = f"{runs[0]['task']}: {runs[0]['title']}"
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    spread = console.width >= 100 and any(row[COLUMNS.index(SPREAD)] for row in cells)
    shown = [i for i, column in enumerate(COLUMNS) if column != SPREAD or spread]
    for i in shown:
        heading = runs[0]["metric_name"].partition(",")[0] if COLUMNS[i] == "metric" else COLUMNS[i]
        table.add_column(heading, justify="left" if COLUMNS[i] == "optimizer" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    return table
