"""The table of one task: every optimizer after equal steps and after equal times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.report.aggregate import grouped

__all__ = ["COLUMNS", "comparison", "rows"]

COLUMNS = ("optimizer", "seeds", "loss, steps", "of the seeds", "loss, time", "metric", "rate", "s", "ms/step")


def rows(runs: Sequence[dict[str, Any]]) -> tuple[list[list[str]], str]:
    """Cells by optimizer (:data:`COLUMNS`), and a caption that says what is equal."""
    groups = grouped(runs)
    lasting = [g for g in groups if not g.diverged] or groups
    step = min(min(g.last("step")) for g in lasting)
    seconds = min(median(g.last("seconds")) for g in lasting)
    cells = []
    for group in groups:
        first, losses = group.first, group.at_step(step)
        status = f" ({group.diverged} diverged)" if group.diverged else ""
        steps = max(sum(group.last("step")), 1)
        cells.append(
            [
                group.name,
                f"{len(group.runs)}{status}",
                f"{median(losses):.3g}",
                f"{min(losses):.2g} … {max(losses):.2g}" if len(losses) > 1 else "",
                f"{median(group.at_time(seconds)):.3g}",
                f"{median(group.last('metric')):.4g}",
                f"{median(group.last('rate')):.2g}",
                f"{median(group.last('seconds')):.3g}",
                f"{1000 * sum(group.last('seconds')) / steps:.3g}",
            ]
        )
    first = runs[0]
    scores = [f"{run['optimizer']} {name} {value:.2f}" for run in runs for name, value in run["scores"].items()]
    caption = (
        f"{first['data']}. Loss: {first['loss_name']} of {first['judged_on']:,} training examples, median over seeds, "
        f"after {step:,.0f} steps ({step * first['epochs'] / max(first['total_steps'], 1):.3g} epochs) and after "
        f"{seconds:.3g} s of training. Hyperparameters: {_origins(runs)}."
    )
    return cells, " ".join([caption, *([f"{'; '.join(scores)}."] if scores else [])])


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
    table = Table(title=f"{runs[0]['task']}: {runs[0]['title']}", caption=caption, caption_justify="left", box=SIMPLE)
    shown = [i for i, column in enumerate(COLUMNS) if column != "of the seeds" or any(row[i] for row in cells)]
    for i in shown:
        heading = runs[0]["metric_name"] if COLUMNS[i] == "metric" else COLUMNS[i]
        table.add_column(heading, justify="left" if COLUMNS[i] == "optimizer" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    return table
