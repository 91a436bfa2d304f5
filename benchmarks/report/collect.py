"""Results files below a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.tasks import TASKS
from benchmarks.training.optimizers import names

__all__ = ["Found", "collect", "described"]

Found = dict[str, list[dict[str, Any]]]
"""Results by task."""


def collect(folders: Sequence[Path]) -> Found:
    """Every run in ``FOLDER/runs/TASK/*.json``, in the order of the tasks. A later folder's replace an earlier's.

    Only runs of the same data, epochs and steps stand beside each other: of several lengths the one with the most
    files is taken, the longest of equals.
    """
    found: Found = {}
    for task in TASKS:
        by_file: dict[str, dict[str, Any]] = {}
        for folder in folders:
            for path in sorted((folder / "runs" / task).glob("*.json")):
                by_file[path.name] = results.load(path)
        kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for run in by_file.values():
            kinds.setdefault((run["data"], run["total_steps"]), []).append(run)
        if kinds:
            chosen = max(kinds.items(), key=lambda item: (len(item[1]), item[0][1]))[1]
            found[task] = sorted(chosen, key=lambda run: (_place(run["optimizer"]), run["precision"], run["seed"]))
    return found


def _place(optimizer: str) -> tuple[int, str]:
    """First-order methods first, each with its scheduled form after it."""
    known, base = names(), optimizer.partition("+")[0]
    return (known.index(base) if base in known else len(known)), optimizer


def described(runs: Sequence[dict[str, Any]]) -> str:
    """What a row must name: the data, how long, where."""
    machines = sorted({run["environment"]["device"] for run in runs})
    unfinished = sum(run["status"] == "unfinished" for run in runs)
    cut = f", {unfinished} cut off" if unfinished else ""
    epochs = f"{runs[0]['epochs']:.3g} epochs"
    return f"{runs[0]['data']}; {epochs}{cut}; {', '.join(machines)}"
