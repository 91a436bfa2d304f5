"""The file of a search, ``search/TASK.json``: every trial of every optimizer, and so the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.paper.tasks import named

COMMITTED = Path(__file__).parents[2] / "results"
"""Where the searches lie that come with the project."""


def file_of(out: Path, task: str, precision: str) -> Path:
    """``search/TASK.json``; in 16 bits ``search/TASK-bf16.json``."""
    return out / "search" / (f"{task}-{precision}.json" if precision in ("bf16", "fp16") else f"{task}.json")


def value_of(task: str, trial: dict[str, Any], judged_by: str) -> float:
    """What a trial is judged by, smaller being better; one that diverged is infinitely bad."""
    value = float(trial[judged_by])  # "nan" and "inf" are strings in the file
    if trial["status"] == "diverged" or not math.isfinite(value):
        return math.inf
    return -value if judged_by == "metric" and named(task).loss.higher_is_better else value


def best(content: dict[str, Any], optimizer: str) -> dict[str, Any] | None:
    """The best trial of an optimizer; None where it has none that came through."""
    trials = content["trials"].get(optimizer, [])
    if not trials:
        return None
    chosen: dict[str, Any] = min(trials, key=lambda t: value_of(content["task"], t, content["judged_by"]))
    return chosen if value_of(content["task"], chosen, content["judged_by"]) < math.inf else None


def found(out: Path, task: str, optimizer: str, precision: str) -> tuple[dict[str, Any], str]:
    """``(hyperparameters, where they come from)`` by the best trial of a search.

    Looked for in ``out`` first, then among those that come with the project; in 16 bits, where there is no search of
    its own, full precision's is taken, as the paper does with the λs. The defaults where there is none.
    """
    precisions = [precision] if precision not in ("bf16", "fp16") else [precision, "fp32"]
    for each in precisions:
        for folder in (out, COMMITTED):
            path = file_of(folder, task, each)
            if not path.is_file():
                continue
            content = results.load(path)
            trial = best(content, optimizer)
            if trial is not None:
                count = len(content["trials"][optimizer])
                return dict(trial["hyper"]), f"search of {count} trials in {each}, {path.name}"
    return {}, "defaults, not searched"
