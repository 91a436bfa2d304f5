"""Runs over seeds: medians, bounds, and losses at equal steps and at equal times."""

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

    def losses_up_to(self, axis: str, limit: float) -> list[list[float]]:
        """Each seed's losses up to a step, or a time in seconds. The first is that before the first step."""
        return [
            [
                float(loss)
                for x, loss in zip(run["curve"][axis], run["curve"]["loss"], strict=True)
                if float(x) <= limit * (1 + 1e-9)
            ]
            for run in self.runs
        ]

    def loss_at(self, axis: str, limit: float) -> list[float]:
        """Each seed's last loss up to there; infinite for one that diverged before."""
        return [losses[-1] if losses else math.nan for losses in self.losses_up_to(axis, limit)]

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
