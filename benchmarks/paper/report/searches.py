"""What the searches found: how many trials, and the best of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.common.tables import Table
from benchmarks.paper.training.search_files import best

HEADER = ["task", "optimizer", "trials", "diverged", "loss of the best", "its hyperparameters", "of"]


def searches(folders: Sequence[Path]) -> Table:
    """A row for each task and optimizer; a later folder's files in place of an earlier's."""
    files = {path.name: path for folder in folders for path in (folder / "search").glob("*.json")}
    rows = [row for path in sorted(files.values()) for row in found(path.stem, results.load(path))]
    return Table("Searches", HEADER, rows)


def found(name: str, content: dict[str, Any]) -> list[list[str]]:
    """The rows of one search: its best trial for each optimizer."""
    length = f"{content['steps']} steps" if content["steps"] else f"{content['epochs']} epochs"
    rows = []
    for optimizer, trials in content["trials"].items():
        chosen = best(content, optimizer)
        hyper = "none came through" if chosen is None else ", ".join(f"{k}={v}" for k, v in chosen["hyper"].items())
        loss = "–" if chosen is None else f"{float(chosen['loss']):.4g}"
        diverged = sum(trial["status"] == "diverged" for trial in trials)
        rows.append([name, optimizer, str(len(trials)), str(diverged), loss, hyper, length])
    return rows
