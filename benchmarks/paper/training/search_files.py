"""The file of a search, ``search/TASK.json``: all trials, and the best of them."""

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


def best(content: dict[str, Any], optimizer: str) -> dict[str, Any] | None:
    """The best trial of an optimizer; None if no trial came through."""
    by = content["judged_by"]
    sign = -1 if by == "metric" and named(content["task"]).loss.higher_is_better else 1
    trials = content["trials"].get(optimizer, [])  # "nan" and "inf" are strings in the file
    sound = [trial for trial in trials if trial["status"] != "diverged" and math.isfinite(float(trial[by]))]
    return min(sound, key=lambda trial: sign * float(trial[by]), default=None)


def found(out: Path, task: str, optimizer: str, precision: str) -> tuple[dict[str, Any], str]:
    """``(hyperparameters, where they come from)`` by the best trial of a search.

    Searches are looked for in ``out``, then among those that come with the project. In 16 bits, full precision's search
    is taken if there is no other, as the paper does with the λs. Without any search: the defaults.
    """
    for each in (precision, "fp32") if precision in ("bf16", "fp16") else (precision,):
        for path in filter(Path.is_file, (file_of(out, task, each), file_of(COMMITTED, task, each))):
            content = results.load(path)
            trial = best(content, optimizer)
            if trial is not None:
                count = len(content["trials"][optimizer])
                return dict(trial["hyper"]), f"search of {count} trials in {each}, {path.name}"
    return {}, "defaults, not searched"
