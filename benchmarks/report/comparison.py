"""The table of one task: every optimizer after equal steps and after equal times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.report.aggregate import grouped

__all__ = ["COLUMNS", "comparison", "rows"]

COLUMNS = (
    "optimizer",
    "seeds",
    "loss at equal steps",
    "least to greatest",
    "loss at equal time",
    "metric",
    "last rate",
    "s",
    "ms a step",
    "hyperparameters from",
)


def rows(runs: Sequence[dict[str, Any]]) -> tuple[list[list[str]], str]:
    """Cells by optimizer (:data:`COLUMNS`), and a caption that says what is equal."""
    groups = grouped(runs)
    lasting = [g for g in groups if not g.diverged] or groups
    step = min(min(g.last("step")) for g in lasting)
    seconds = min(median(g.last("seconds")) for g in lasting)
    cells = []
    for group in groups:
        first, losses = group.first, group.at_step(step)
        name = (
            first["optimizer"]
            if first["precision"] in ("fp32", "fp64")
            else f"{first['optimizer']} {first['precision']}"
        )
        status = f" ({group.diverged} diverged)" if group.diverged else ""
        steps = max(sum(group.last("step")), 1)
        cells.append(
            [
                name,
                f"{len(group.runs)}{status}",
                f"{median(losses):.4g}",
                f"{min(losses):.3g} to {max(losses):.3g}",
                f"{median(group.at_time(seconds)):.4g}",
                f"{median(group.last('metric')):.4g}",
                f"{median(group.last('rate')):.2g}",
                f"{median(group.last('seconds')):.3g}",
                f"{1000 * sum(group.last('seconds')) / steps:.3g}",
                first["hyper_from"].partition(",")[0],
            ]
        )
    first = runs[0]
    scores = [f"{run['optimizer']} {name} {value:.2f}" for run in runs for name, value in run["scores"].items()]
    caption = (
        f"{first['data']}. {first['loss_name']} of {first['judged_on']:,} training examples, median over seeds, after "
        f"{step:,.0f} steps ({step * first['epochs'] / max(first['total_steps'], 1):.3g} epochs) and after "
        f"{seconds:.3g} s of training; {first['metric_name']} of the test."
    )
    return cells, " ".join([caption, *([f"{'; '.join(scores)}."] if scores else [])])


def comparison(runs: Sequence[dict[str, Any]]) -> Table:
    """The same for the terminal."""
    cells, caption = rows(runs)
    table = Table(title=f"{runs[0]['task']}: {runs[0]['title']}", caption=caption, caption_justify="left")
    for column in COLUMNS:
        heading = runs[0]["metric_name"] if column == "metric" else column
        table.add_column(heading, justify="left" if column in ("optimizer", "hyperparameters from") else "right")
    for row in cells:
        table.add_row(*row)
    return table
