"""Runs from results files, by task; and what the seeds of one optimizer have in common: medians, bounds, losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import results
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.training.optimizers import names

SIXTEEN_BITS = ("bf16", "fp16")

Result = dict[str, Any]
Found = dict[str, list[Result]]
"""Results by task."""


def collect(folders: Sequence[Path]) -> Found:
    """Every run in ``FOLDER/runs/TASK/*.json``, in the order of the tasks. A later folder's replace an earlier's.

    Only runs of the same data, epochs and steps stand beside each other: of several lengths in a precision the one
    with the most files is taken, the longest of equals.
    """
    found: Found = {}
    for task in TASKS:
        by_file: dict[str, Result] = {}
        for folder in folders:
            for path in sorted((folder / "runs" / task).glob("*.json")):
                by_file[path.name] = results.load(path)
        kinds: dict[tuple[str, str, int], list[Result]] = {}
        for run in by_file.values():
            kinds.setdefault((run["precision"], run["data"], run["total_steps"]), []).append(run)
        chosen: dict[str, list[Result]] = {}
        for (precision, _, _), runs in sorted(kinds.items(), key=lambda x: (len(x[1]), x[0][2]), reverse=True):
            chosen.setdefault(precision, runs)
        if chosen:
            found[task] = sorted((run for runs in chosen.values() for run in runs), key=_place)
    return found


def _place(run: Result) -> tuple[Any, ...]:
    """First-order methods first, each with its scheduled form after it; 16 bits last."""
    known, optimizer = names(), run["optimizer"]
    base = optimizer.partition("+")[0]
    place = known.index(base) if base in known else len(known)
    return run["precision"] in SIXTEEN_BITS, place, optimizer, run["seed"]


def described(runs: Sequence[Result]) -> str:
    """The data, the length and the machine of the runs."""
    machines = sorted({run["environment"]["device"] for run in runs})
    unfinished = sum(run["status"] == "unfinished" for run in runs)
    cut = f", {unfinished} cut off" if unfinished else ""
    epochs = f"{runs[0]['epochs']:.3g} epochs"
    return f"{runs[0]['data']}; {epochs}{cut}; {', '.join(machines)}"


@dataclass(frozen=True)
class SeedGroup:
    """The seeds of one optimizer on one task in one precision."""

    runs: Sequence[Result]

    @property
    def first(self) -> Result:
        return self.runs[0]

    @property
    def name(self) -> str:
        """The optimizer, with its precision where that isn't the task's own."""
        name, precision = self.first["optimizer"], self.first["precision"]
        return f"{name} {precision}" if precision in ("bf16", "fp16") else str(name)

    def losses_up_to(self, axis: str, limit: float) -> list[list[float]]:
        """Each seed's losses up to a step, or a time in seconds. The first is that before the first step."""
        found = []
        for curve in (run["curve"] for run in self.runs):
            rows = zip(curve[axis], curve["loss"], strict=True)
            found.append([float(loss) for x, loss in rows if float(x) <= limit * (1 + 1e-9)])
        return found

    def loss_at(self, axis: str, limit: float) -> list[float]:
        """Each seed's last loss up to there; infinite for one that diverged before."""
        return [losses[-1] if losses else math.nan for losses in self.losses_up_to(axis, limit)]

    def last(self, column: str) -> list[float]:
        """Each seed's last value."""
        return [float(run["curve"][column][-1]) for run in self.runs]

    @property
    def step_ms(self) -> float:
        """Milliseconds per step: the seeds' median time, over the most steps that one took."""
        return 1000 * median(self.last("seconds")) / max(self.last("step"))

    @property
    def diverged(self) -> int:
        return sum(run["status"] == "diverged" for run in self.runs)

    def band(self, x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """``(x, median, least, greatest)`` over the seeds, row by row as far as all go; ``x`` is a median too."""
        rows = min(len(run["curve"][y]) for run in self.runs)
        xs = [[float(run["curve"][x][i]) for run in self.runs] for i in range(rows)]
        ys = [[float(run["curve"][y][i]) for run in self.runs] for i in range(rows)]
        return [median(v) for v in xs], [median(v) for v in ys], [min(v) for v in ys], [max(v) for v in ys]


def grouped(runs: Sequence[Result]) -> list[SeedGroup]:
    """Runs by optimizer and precision, in the order in which they come."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        groups.setdefault((run["optimizer"], run["precision"]), []).append(run)
    return [SeedGroup(each) for each in groups.values()]
