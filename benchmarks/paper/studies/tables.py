"""The study's table, from its results alone."""

import math
from statistics import median
from typing import Any

from benchmarks.common import tables
from benchmarks.paper.studies.variants import BASELINES, NO_LONGER_RUN, START, VARIANTS

Cell = tuple[float, float, float, int]


def summary(runs: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """``[way][task]``: median, least and greatest final loss of the seeds, and how many. A baseline at its best
    setting: the lowest median among those run with most seeds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for key, held in runs.items():
        (task, name, _, *setting), last = key.split("/"), float(held["losses"][-1])
        found.setdefault((name, task, "/".join(setting)), []).append(last if math.isfinite(last) else math.inf)
    best: dict[tuple[str, str], list[float]] = {}
    for (name, task, _), losses in found.items():
        now = best.get((name, task))
        if now is None or (-len(losses), median(losses)) < (-len(now), median(now)):
            best[name, task] = losses
    rows: dict[str, dict[str, Cell]] = {}
    for (name, task), losses in best.items():
        rows.setdefault(name, {})[task] = (median(losses), min(losses), max(losses), len(losses))
    return rows


def markdown(runs: dict[str, Any]) -> str:
    """Final training loss after equal steps, median (least to greatest; seeds), and seconds per run."""
    rows, tasks = summary(runs), list(dict.fromkeys(key.split("/")[0] for key in runs))
    header = ["way", "what", *tasks, *(f"s, {task}" for task in tasks)]
    lines = []
    baselines = {name: f"best of {len(baseline.grid)} settings" for name, baseline in BASELINES.items()}
    variants = {name: variant.what for name, variant in (VARIANTS | START).items()}
    for name, what in (baselines | variants | NO_LONGER_RUN).items():
        if name in rows:
            found = [rows[name].get(task) for task in tasks]
            cells = ["" if own is None else "{:#.3g} ({:#.3g} to {:#.3g}; {})".format(*own) for own in found]
            lines.append([name, what, *cells, *(_seconds(runs, name, task) for task in tasks)])
    return tables.markdown(header, lines) + "\n"


def _seconds(runs: dict[str, Any], name: str, task: str) -> str:
    """Of the runs that went to their end."""
    own = [run for key, run in runs.items() if key.split("/")[:2] == [task, name]]
    held = [run["seconds"][-1] for run in own if math.isfinite(float(run["losses"][-1]))]
    return f"{median(held):.1f}" if held else ""
