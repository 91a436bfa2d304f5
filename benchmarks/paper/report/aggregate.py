"""Runs over seeds: middles, bounds, and losses at equal steps and at equal times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Group:
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

    def at_step(self, step: float) -> list[float]:
        """Each seed's loss at the last row up to ``step``; infinite for one that diverged before."""
        return [_at(run, "step", step) for run in self.runs]

    def at_time(self, seconds: float) -> list[float]:
        """Likewise after so many seconds of training."""
        return [_at(run, "seconds", seconds) for run in self.runs]

    def judged_within(self, seconds: float) -> bool:
        """Whether every seed has a row by then besides the one before the first step."""
        return all(len(_reached(run, "seconds", seconds)) > 1 for run in self.runs)

    def last(self, column: str) -> list[float]:
        """Each seed's last value."""
        return [float(run["curve"][column][-1]) for run in self.runs]

    @property
    def diverged(self) -> int:
        return sum(run["status"] == "diverged" for run in self.runs)

    def band(self, x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """``(x, median, least, greatest)`` over the seeds, row by row as far as all go; ``x`` is a median too."""
        rows = min(len(run["curve"][y]) for run in self.runs)
        xs = [[float(run["curve"][x][i]) for run in self.runs] for i in range(rows)]
        ys = [[float(run["curve"][y][i]) for run in self.runs] for i in range(rows)]
        return [median(v) for v in xs], [median(v) for v in ys], [min(v) for v in ys], [max(v) for v in ys]


def grouped(runs: Sequence[Result]) -> list[Group]:
    """Runs by optimizer and precision, in the order in which they come."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        groups.setdefault((run["optimizer"], run["precision"]), []).append(run)
    return [Group(each) for each in groups.values()]


def _at(run: Result, axis: str, limit: float) -> float:
    reached = _reached(run, axis, limit)
    return reached[-1] if reached else math.nan


def _reached(run: Result, axis: str, limit: float) -> list[float]:
    """The losses up to there; the first is that before the first step."""
    pairs = zip(run["curve"][axis], run["curve"]["loss"], strict=True)
    return [float(loss) for x, loss in pairs if float(x) <= limit * (1 + 1e-9)]
