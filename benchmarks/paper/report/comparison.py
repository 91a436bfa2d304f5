"""The table of one task: every optimizer after equal steps and after equal times."""

from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import Any

from benchmarks.common.tables import Table, short
from benchmarks.paper.report.runs import SeedGroup, grouped

COLUMNS = ("optimizer", "seeds", "loss, steps", "of the seeds", "loss, time", "metric", "rate", "s", "ms/step")


def comparison(runs: Sequence[dict[str, Any]]) -> Table:
    """A row for each optimizer (:data:`COLUMNS`), and a note that says what is equal."""
    first, groups = runs[0], grouped(runs)
    lasting = [g for g in groups if not g.diverged] or groups
    step = min(min(g.last("step")) for g in lasting)
    seconds = min(median(g.last("seconds")) for g in lasting)
    epochs = step * first["epochs"] / max(first["total_steps"], 1)
    note = (
        f"{first['data']}. Loss: {first['loss_name']} of {first['judged_on']:,} training examples, median over seeds, "
        f"after {step:,.0f} steps ({epochs:.3g} epochs) and after {seconds:.3g} s of training (–: not judged before "
        f"then). Seeds: those that came through. Hyperparameters: {_origins(runs)}."
    )
    scores = [f"{run['optimizer']} {name} {value:.2f}" for run in runs for name, value in run["scores"].items()]
    header = [first["metric_name"] if column == "metric" else column for column in COLUMNS]
    rows = [_row(group, step, seconds) for group in groups]
    return Table(f"{first['task']}: {first['title']}", header, rows, f"{note} {'; '.join(scores)}.".removesuffix(" ."))


def _row(group: SeedGroup, step: float, seconds: float) -> list[str]:
    losses = group.loss_at("step", step)
    judged = all(len(reached) > 1 for reached in group.losses_up_to("seconds", seconds))
    return [
        group.name,
        f"{len(group.runs) - group.diverged}/{len(group.runs)}",
        _loss(losses),
        f"{min(losses):.2g} … {max(losses):.2g}" if len(losses) > 1 else "",
        _loss(group.loss_at("seconds", seconds)) if judged else "–",
        f"{median(group.last('metric')):.4g}",
        f"{median(group.last('rate')):.2g}",
        short(median(group.last("seconds"))),
        short(group.step_ms),
    ]


def _loss(losses: Sequence[float]) -> str:
    return f"{median(losses):.3g}" if isfinite(median(losses)) else "diverged"


def _origins(runs: Sequence[dict[str, Any]]) -> str:
    """Where hyperparameters come from, said once where it is the same for all."""
    where: dict[str, dict[str, None]] = {}
    for run in runs:
        where.setdefault(run["hyper_from"], {})[run["optimizer"]] = None
    return "; ".join(f"{', '.join(names)}: {origin}" if len(where) > 1 else origin for origin, names in where.items())
